"""What a measured process may use: the cores and the memory of a device class.

Cores are held by affinity, which any process may set for itself. Memory is held by a cgroup of its own, below the one
that this process is in, so that outer limits stay in force; version 2 where this process may write the cgroup that it
is in or one above it, and version 1. RLIMIT_AS is no stand-in: it counts addresses, and a model that is mapped from its
file and the stacks of idle threads take many that never become memory.

A process joins its cgroup before it becomes the program that is measured, so all of its memory counts. Pages of files
that other processes have read before (weights, libraries) are counted where they were read first; see `judge`.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slmops import memory
from slmops.progress import log

PREFIX = "slmops-measured-"
CANNOT_JOIN = 125
"""Exit code of a process that could not enter its cgroup."""
REMOVE_S = 5.0
"""How long the kernel may take to empty the cgroup of processes that have ended."""
MIB = 1 << 20

_JOIN = f'echo $$ > "$1" || exit {CANNOT_JOIN}; shift; exec "$@"'
_numbers = itertools.count()


@dataclass(frozen=True)
class Limits:
    """What the measured process may use."""

    num_cpus: int
    ram_bytes: int


@dataclass(frozen=True)
class MemoryGroup:
    """A cgroup with a memory limit and without swap."""

    path: Path
    version: Literal[1, 2]

    def command(self, argv: Sequence[str]) -> list[str]:
        """A command that enters the cgroup and then becomes `argv`."""
        return ["/bin/sh", "-c", _JOIN, "sh", str(self.path / "cgroup.procs"), *argv]

    @property
    def events(self) -> Path:
        """The file that counts what the limit led to."""
        return self.path / ("memory.oom_control" if self.version == 1 else "memory.events")


@contextmanager
def memory_group(ram_bytes: int, process: Path = Path("/proc/self")) -> Iterator[MemoryGroup | None]:
    """A cgroup for the body, removed after it with all that still runs in it; None where none can be made.

    Those that killed processes have left behind are removed, too.

    Args:
        ram_bytes: its limit.
        process: this process, as procfs shows it.
    """
    for parent, version in _parents(process):
        remove_stale(parent)
        if group := _make(parent, version, ram_bytes):
            break
    else:
        yield None
        return
    try:
        yield group
    finally:
        remove(group.path)


def num_killed(group: MemoryGroup | None) -> int:
    """Processes that the kernel ended because the limit was reached: the group's, or this process's own container's."""
    events = group.events if group else memory.LIMIT.with_name("memory.events")
    try:
        found = re.search(r"^oom_kill (\d+)$", events.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def holds_already(ram_bytes: int) -> bool:
    """Whether the container that this process is in has a limit at or below `ram_bytes`."""
    return memory.limit_bytes() <= ram_bytes


def judge(peak_rss_bytes: int, ram_bytes: int) -> str | None:
    """Why a process that was not ended still does not fit; None if it does.

    Resident memory counts mapped files, which the kernel could drop and read again: a process that fits by this rule
    fits without doing so.
    """
    if peak_rss_bytes <= ram_bytes:
        return None
    return f"its memory reached {_mib(peak_rss_bytes)}, the device has {_mib(ram_bytes)}"


def killed(ram_bytes: int) -> str:
    return f"killed by its memory limit of {_mib(ram_bytes)}"


def choose_cpus(count: int, topology: Path = Path("/sys/devices/system/cpu")) -> list[int]:
    """`count` of this process's CPUs, or all if there are fewer: one of each core first, as a device's are cores."""
    cores: dict[str, list[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = topology / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        try:
            core = siblings.read_text().strip()
        except OSError:  # not every virtual machine tells
            core = str(cpu)
        cores.setdefault(core, []).append(cpu)
    turns = itertools.zip_longest(*cores.values())
    ordered = [cpu for turn in turns for cpu in turn if cpu is not None]
    return sorted(ordered[:count])


def remove(path: Path) -> None:
    """End what runs in a cgroup, and remove it."""
    deadline = time.monotonic() + REMOVE_S
    while True:
        with suppress(OSError):
            for pid in (path / "cgroup.procs").read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        try:
            path.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            if time.monotonic() > deadline:
                log.warning("%s cannot be removed (%s); remove it by hand", path, error.strerror)
                return
            time.sleep(0.02)
        else:
            return


def remove_stale(parent: Path) -> None:
    """Remove the cgroups below `parent` whose makers are gone."""
    for path in parent.glob(f"{PREFIX}*"):
        owner = re.fullmatch(rf"{PREFIX}(\d+)-(\d+)-\d+", path.name)
        if owner and _started(int(owner[1])) != int(owner[2]):
            log.info("removing %s, which a process that is gone has left", path)
            remove(path)


def _parents(process: Path) -> Iterator[tuple[Path, Literal[1, 2]]]:
    """Cgroups in which one with a memory limit may be made, the nearest first."""
    mounts = _mounts(process / "mountinfo")
    for line in (process / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            if "memory" in mounts:
                yield _below(*mounts["memory"], path), 1
                return  # the controller is in one hierarchy only
        elif not controllers and "" in mounts:
            root, point = mounts[""]
            nearest = _below(root, point, path)
            for candidate in (nearest, *nearest.parents):
                with suppress(OSError):
                    if "memory" in (candidate / "cgroup.subtree_control").read_text().split():
                        yield candidate, 2
                if candidate == point:
                    break


def _mounts(mountinfo: Path) -> dict[str, tuple[str, Path]]:
    """`memory` (version 1) and `` (version 2) → (what of the hierarchy is mounted, where); see proc(5)."""
    found: dict[str, tuple[str, Path]] = {}
    for line in mountinfo.read_text().splitlines():
        mounted, _, source = line.partition(" - ")
        root, point = mounted.split()[3:5]
        kind, _, options = source.split()[:3]
        if kind == "cgroup2":
            found.setdefault("", (root, Path(point)))
        elif kind == "cgroup" and "memory" in options.split(","):
            found.setdefault("memory", (root, Path(point)))
    return found


def _below(root: str, point: Path, path: str) -> Path:
    """Where the cgroup `path` of a hierarchy is to be seen, of which `root` is mounted at `point`."""
    inside = os.path.relpath(path, root)
    seen = point / inside
    # A container may be shown its own cgroup as the root while its processes are told the path on the host.
    return point if inside == "." or inside.startswith("..") or not seen.is_dir() else seen


def _make(parent: Path, version: Literal[1, 2], ram_bytes: int) -> MemoryGroup | None:
    pid = os.getpid()
    path = parent / f"{PREFIX}{pid}-{_started(pid)}-{next(_numbers)}"
    limit = str(ram_bytes)
    try:
        path.mkdir()
    except OSError as error:
        log.info("no memory limit by cgroup: %s: %s", path, error.strerror)
        return None
    try:
        if version == 2:
            (path / "memory.max").write_text(limit)
            _without_swap(path / "memory.swap.max", "0")
        else:
            (path / "memory.limit_in_bytes").write_text(limit)
            _without_swap(path / "memory.memsw.limit_in_bytes", limit)
            _without_swap(path / "memory.swappiness", "0")
    except OSError as error:
        log.info("no memory limit by cgroup: %s: %s", path, error.strerror)
        remove(path)
        return None
    return MemoryGroup(path, version)


def _without_swap(path: Path, value: str) -> None:
    with suppress(FileNotFoundError, PermissionError):  # a kernel that does not account for swap has no such file
        path.write_text(value)


def _started(pid: int) -> int | None:
    """When a process was started, in ticks since boot, which with its number names it for good; None if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:,.0f} MiB"
