"""The exception tree of slmops.

    SlmopsError
    ├── UserError               the user can fix it; retrying changes nothing   exit code 2
    │   ├── ConfigError         a setting is out of range, unknown or contradictory
    │   ├── DataError           rows or files that do not fit
    │   ├── ModelError          a model directory that cannot be used as asked
    │   ├── ArtifactError       an input that is missing, half-written or of another kind
    │   ├── StoreError          an object store that refuses: credentials, bucket, missing guarantees
    │   ├── DiskFullError       no space left
    │   └── GateError           the verdict is not `pass`                       exit code 3
    └── TransientError          trying again may help                           exit code 75
        ├── Stopped             asked to end; what was done is kept             exit code 143
        ├── StoreUnavailable    an object store that does not answer
        └── CorruptDownload     bytes that do not match their digest

Any other exception is a defect of slmops and ends with exit code 1. 75 is `EX_TEMPFAIL` of sysexits.h, so that
a scheduler can retry on that code alone.

A message says what is wrong, what was found, and what to do.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class SlmopsError(Exception):
    """Base of all errors that slmops raises on purpose."""

    exit_code = 1


class UserError(SlmopsError):
    """The user can fix it; retrying changes nothing."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is out of range, unknown or contradictory."""


class DataError(UserError):
    """Rows or files that do not fit."""


class ModelError(UserError):
    """A model directory that cannot be used as asked."""


class ArtifactError(UserError):
    """An input that is missing, half-written or of another kind."""


class StoreError(UserError):
    """An object store that refuses: credentials, bucket, missing guarantees."""


class DiskFullError(UserError):
    """No space left on a device."""


class GateError(UserError):
    """The verdict is not `pass`."""

    exit_code = 3


class TransientError(SlmopsError):
    """Trying again may help."""

    exit_code = 75


class Stopped(TransientError):
    """The process was asked to end; what was done is kept. Nothing starts it again but whoever asked."""

    exit_code = 143


class StoreUnavailable(TransientError):
    """An object store that does not answer."""


class CorruptDownload(TransientError):
    """Bytes that do not match their digest."""


@contextmanager
def explain_full_disk(path: Path | str) -> Iterator[None]:
    """Turn the operating system's error for a full disk into one that says what to do.

    Raises:
        DiskFullError: the device is full or a quota is used up.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"no space left while writing {error.filename or path}; free some space and run the same command again"
            ) from error
        raise


@contextmanager
def explain_os_errors(path: Path | str) -> Iterator[None]:
    """Turn the operating system's errors about a path that the user gave into errors that say what to do.

    Raises:
        DiskFullError: the device is full or a quota is used up.
        ArtifactError: the file is absent or may not be read.
    """
    try:
        with explain_full_disk(path):
            yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactError(f"{error.filename or path} does not exist; check the path") from error
    except PermissionError as error:
        raise ArtifactError(
            f"{error.filename or path} cannot be opened: permission denied; check its owner and mode"
        ) from error
