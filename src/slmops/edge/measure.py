"""Measure a variant on the device that it is for: `python -m slmops.edge.measure`, in a Job that benchmark creates.

Fetches the variant by the digest of its manifest, verified as for a node that will serve it, measures it in a process
of its own, and prints the outcome as the last line of its output. The container's limits are the device class's.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import tempfile
import zlib
from pathlib import Path

from pydantic import ValidationError

from slmops.config import explain
from slmops.errors import ConfigError
from slmops.measuring.process import Task, measure
from slmops.release.fetch import fetch_files
from slmops.release.format import Manifest, manifest_key, read_verified
from slmops.step import step
from slmops.storage import open_store

TASK = "SLMOPS_MEASURE_TASK"
"""Environment variable: what to measure, packed by `pack_task`."""
MAX_PACKED_BYTES = 96 * 1024
"""Linux takes no longer variable than 128 KiB."""
MAX_TASK_BYTES = 8 * 1024 * 1024


def pack_task(task: Task) -> str:
    """A task as text for an environment variable.

    Raises:
        ConfigError: its prompts are too long.
    """
    packed = base64.b64encode(zlib.compress(task.model_dump_json().encode(), 9)).decode()
    if len(packed) > MAX_PACKED_BYTES:
        raise ConfigError(
            f"the prompts for a pool take {len(packed):,} bytes, at most {MAX_PACKED_BYTES:,} can be handed over; "
            "lower num_requests"
        )
    return packed


def unpack_task(packed: str) -> Task:
    """The task that `pack_task` packed.

    Raises:
        ConfigError: the text is something else.
    """
    unzip = zlib.decompressobj()
    try:
        data = unzip.decompress(base64.b64decode(packed, validate=True), MAX_TASK_BYTES)
        return Task.model_validate_json(data)
    except ValidationError as error:
        raise ConfigError(f"${TASK}: {explain(error, 'Task')}") from None
    except (ValueError, zlib.error) as error:
        raise ConfigError(f"${TASK} holds no packed task ({error}); let benchmark create the Job") from None


def run(store_uri: str, manifest_digest: str, task: Task, scratch: Path) -> str:
    """Fetch the variant into `scratch`, measure it, and return the outcome as one line of JSON.

    Raises:
        StoreError, StoreUnavailable, CorruptDownload, DataError, DiskFullError: it cannot be had as it was deposited.
    """
    store = open_store(store_uri)
    manifest = read_verified(store, Manifest, manifest_key(manifest_digest), manifest_digest)
    directory = scratch / manifest.variant
    fetch_files(store, manifest, directory, {})
    outcome = measure(directory, task)
    return json.dumps({"facts": outcome.facts, "requests": outcome.requests})


def main() -> None:
    parser = argparse.ArgumentParser(prog="slmops.edge.measure", description=__doc__)
    parser.add_argument("--store", required=True, help="s3://bucket/prefix that holds the variant")
    parser.add_argument("--manifest", required=True, type=_digest, help="digest of its manifest")
    arguments = parser.parse_args()
    with step("measure"), tempfile.TemporaryDirectory(prefix="slmops-measure-") as scratch:
        task = unpack_task(os.environ.get(TASK, ""))
        print(run(arguments.store, arguments.manifest, task, Path(scratch)), flush=True)


def _digest(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise argparse.ArgumentTypeError(f"expected 64 lowercase hex digits, got {text!r:.80}")
    return text


if __name__ == "__main__":
    main()
