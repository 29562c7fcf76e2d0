"""`slmops doctor`: what this machine has, and what to do about what it has not."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import slmops
from slmops import memory
from slmops.errors import SlmopsError

MIN_MEMORY_BYTES = 4 * 1024**3
"""A 135M-parameter teacher trains with LoRA in about this much."""
MIN_DISK_BYTES = 10 * 1024**3
"""Packages, checkpoints and the outputs of a few runs."""

_EXTRA = re.compile(r"^(?P<name>[\w.-]+)(\[(?P<extras>[\w,-]+)\])?.*extra == ['\"](?P<extra>[\w-]+)['\"]")
_PIN = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>[^\s;#]+)")


@dataclass(frozen=True)
class Check:
    """One finding."""

    state: Literal["ok", "warn", "fail"]
    what: str


def examine(store: str | None, model: Path | None) -> Iterator[Check]:
    """All checks, the quick ones first."""
    yield _python()
    yield _cores()
    yield _memory()
    yield _disk()
    yield from _extras()
    yield from _pins()
    yield _accelerator()
    yield _docker()
    if store is not None:
        yield _store(store)
    if model is not None:
        yield _model(model)


def _python() -> Check:
    return Check("ok", "Python " + ".".join(map(str, sys.version_info[:3])))


def _cores() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Check("ok" if cores > 1 else "warn", f"{cores} CPU cores" + ("" if cores > 1 else "; training will be slow"))


def _memory() -> Check:
    free = memory.free_bytes()
    if free is None:
        return Check("warn", "memory: cannot be read on this system")
    if free < MIN_MEMORY_BYTES:
        return Check("warn", f"{_gib(free)} of memory free; close programs, or use smaller batches and models")
    return Check("ok", f"{_gib(free)} of memory free")


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    if free < MIN_DISK_BYTES:
        return Check("warn", f"{_gib(free)} free on the disk of {Path.cwd()}; make room, or give another --output-dir")
    return Check("ok", f"{_gib(free)} free on the disk of {Path.cwd()}")


def _extras() -> Iterator[Check]:
    """Which groups of packages are complete."""
    wanted: dict[str, set[str]] = {}
    for requirement in metadata.requires("slmops") or ():
        if match := _EXTRA.match(requirement):
            names = set(match["extras"].split(",")) if match["extras"] else {match["name"]}
            wanted.setdefault(match["extra"], set()).update(f"[{n}]" if match["extras"] else n for n in names)
    for extra in sorted(wanted):
        missing = sorted(name for name in _packages(extra, wanted) if _version(name) is None)
        if missing:
            yield Check("warn", f"{extra}: {', '.join(missing)} missing; pip install 'slmops[{extra}]' if you need it")
        else:
            yield Check("ok", f"{extra}: all packages installed")


def _packages(extra: str, wanted: dict[str, set[str]]) -> set[str]:
    names: set[str] = set()
    for name in wanted.get(extra, ()):
        names |= _packages(name[1:-1], wanted) if name.startswith("[") else {name}
    return names


def _pins() -> Iterator[Check]:
    """Compare with constraints.txt, which only a checkout has."""
    constraints = Path(slmops.__file__).resolve().parents[2] / "constraints.txt"
    if not constraints.is_file():
        return
    pins = [match for line in constraints.read_text().splitlines() if (match := _PIN.match(line))]
    found = [(pin["name"], pin["version"], _version(pin["name"])) for pin in pins]
    wrong = [f"{n} {have} (tested: {want})" for n, want, have in found if have and have.partition("+")[0] != want]
    if wrong:
        yield Check("warn", f"versions: {', '.join(wrong)}; pip install -c constraints.txt to get what is tested")
    else:
        yield Check("ok", "versions: as in constraints.txt")


def _accelerator() -> Check:
    if importlib.util.find_spec("torch") is None:
        return Check("ok", "training: torch is not installed; only the train and optimize extras need it")
    import torch

    from slmops.hardware import pick_device, pick_dtype

    device = pick_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU, CPU"
    dtype = str(pick_dtype("auto", device)).removeprefix("torch.")
    return Check("ok", f"torch {torch.__version__}: {name}, training computes in {dtype}")


def _docker() -> Check:
    if shutil.which("docker") is None:
        return Check("ok", "docker: not installed; only `make images` and `slmops run --runner docker` need it")
    try:
        subprocess.run(["docker", "info"], check=True, capture_output=True, timeout=10)  # noqa: S607
    except (OSError, subprocess.SubprocessError):
        return Check(
            "warn",
            "docker: installed, but its daemon does not answer; start it to build images or to run steps in them",
        )
    return Check("ok", "docker: running")


def _store(uri: str) -> Check:
    from slmops.storage import open_store

    try:
        open_store(uri).probe()
    except SlmopsError as error:
        return Check("fail", f"store: {error}")
    return Check("ok", f"store: {uri} can be written, and keeps conditional writes")


def _model(path: Path) -> Check:
    from slmops.models import open_model

    try:
        sidecar = open_model(path)
    except SlmopsError as error:
        return Check("fail", f"model: {error}")
    size = sum(file.size_bytes for file in sidecar.files)
    return Check("ok", f"model: {path} is complete, {size / 1e6:,.0f} MB")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gib(size: int) -> str:
    return f"{size / 1024**3:.1f} GiB"
