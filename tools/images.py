#!/usr/bin/env python3
"""Builds the four images; pushes them, and records registry and digests in images/digests.yaml.

    tools/images.py --registry registry.example.com/team     build, push, record, recompile what refers to them
    tools/images.py --build-only                             build, under the version tags that hold until then

With docker or podman, whichever is there. Nothing is recorded unless all four are pushed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import yaml

from slmops import __version__

ROOT = Path(__file__).resolve().parents[1]
DIGESTS = ROOT / "images" / "digests.yaml"
IMAGES = ("base", "train", "optimize", "edge")
REGISTRY = re.compile(r"^[\w.-]+(:\d+)?(/[\w.-]+)*$")
LOCAL = re.compile(r"^(localhost|127\.0\.0\.1)(:\d+)?(/|$)")
_STEP = re.compile(r"^(Step \d+/\d+ :|\[\d+/\d+\] |STEP \d+/\d+:|#\d+ \[)")
NUM_LAST_LINES = 30


class ToolError(Exception):
    """Says what is wrong and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        if not REGISTRY.match(options.registry):
            raise ToolError(f"a registry is host[:port][/team], without https://, found {options.registry!r}")
        engine: str = options.engine or _find_engine()
        base_image = options.base_image or str(yaml.safe_load(DIGESTS.read_text())["base_image"])
        builder = Builder(engine, base_image, options.torch_index, options.build_option)
        if options.build_only:
            builder.build_all()
            return 0
        with registry_answers(options.registry):
            builder.build_all()
            digests = builder.push_all(options.registry)
    except ToolError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    record(DIGESTS, options.registry, digests)
    print(f"recorded in {DIGESTS.relative_to(ROOT)}; recompiling", flush=True)
    return recompile()


def recompile() -> int:
    """Generate again what refers to the images; the exit code."""
    return subprocess.run([sys.executable, "-m", "slmops.kubeflow.generate"], check=False, cwd=ROOT).returncode


class Builder:
    """Builds and pushes with the command line of one engine."""

    def __init__(self, engine: str, base_image: str, torch_index: str, build_options: Sequence[str]) -> None:
        self.engine, self.base_image, self.torch_index = engine, base_image, torch_index
        self.build_options = build_options

    def build_all(self) -> None:
        """Build all images, one after the other.

        Side by side, Docker's first builder makes layers that two images share twice, and later finds the cached layers
        of one of the two only.
        """
        for image in IMAGES:
            self.build(image)

    def push_all(self, registry: str) -> dict[str, str]:
        """Push all images at once; their digests."""
        with ThreadPoolExecutor(len(IMAGES)) as pool:
            pushed = pool.map(lambda image: self.push(image, f"{registry}/slmops/{image}"), IMAGES)
            return dict(zip(IMAGES, pushed, strict=True))

    def build(self, image: str) -> None:
        """Build one image under its version tag."""
        started = time.monotonic()
        arguments = {
            "BASE_IMAGE": self.base_image,
            "VERSION": __version__,
            "REVISION": _revision(),
            **({"TORCH_INDEX": self.torch_index} if image in ("train", "optimize") else {}),
        }
        command = [self.engine, "build", *self.build_options, "--file", f"images/{image}/Containerfile"]
        command += [part for name, value in arguments.items() for part in ("--build-arg", f"{name}={value}")]
        print(f"{image}: building with {self.engine}", flush=True)
        self._run(image, [*command, "--tag", tag(image), "."], "not built")
        size = int(self._ask("image", "inspect", "--format", "{{.Size}}", tag(image)))
        print(f"{image}: built in {time.monotonic() - started:.0f} s, {size / 1e6:,.0f} MB: {tag(image)}", flush=True)

    def push(self, image: str, name: str) -> str:
        """Push one image as `name`; return its digest, as the registry knows it."""
        reference = f"{name}:{__version__}"
        print(f"{image}: pushing {reference}", flush=True)
        self._ask("tag", tag(image), reference)
        started = time.monotonic()
        self._run(image, [self.engine, "push", reference], f"not pushed; log in with `{self.engine} login` if need be")
        found = json.loads(self._ask("image", "inspect", "--format", "{{json .RepoDigests}}", reference))
        digests: set[str] = {entry.partition("@")[2] for entry in found if entry.startswith(f"{name}@")}
        if len(digests) != 1:
            raise ToolError(f"{self.engine} knows no single digest of {reference} after the push, found {found}")
        print(f"{image}: pushed in {time.monotonic() - started:.0f} s", flush=True)
        return digests.pop()

    def _ask(self, *arguments: str) -> str:
        asked = subprocess.run([self.engine, *arguments], capture_output=True, text=True, check=False)
        if asked.returncode != 0:
            raise ToolError(f"`{self.engine} {' '.join(arguments)}` failed: {asked.stderr.strip()}")
        return asked.stdout.strip()

    def _run(self, image: str, command: Sequence[str], failed: str) -> None:
        """Run a long command, show the steps that it names, and its last lines if it fails."""
        last: list[str] = []
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                last = [*last[1 - NUM_LAST_LINES :], line]
                if _STEP.match(line):
                    print(f"{image}:   {line.rstrip():.100}", flush=True)
        if process.returncode != 0:
            raise ToolError(f"{image}: {failed}; the last lines of `{' '.join(command[:2])}`:\n{''.join(last)}")


def tag(image: str) -> str:
    """The name of an image on this machine, which references use until digests are recorded."""
    return f"slmops/{image}:{__version__}"


def record(path: Path, registry: str, digests: dict[str, str]) -> None:
    """Write registry and digests into digests.yaml, whole or not at all; comments and all else stay."""
    text = path.read_text()
    for key, value in {"registry": registry, **digests}.items():
        indent = "" if key == "registry" else "  "
        text, num_found = re.subn(rf"(?m)^{indent}{key}:.*$", f"{indent}{key}: {value}", text)
        if num_found != 1:
            raise ToolError(f"{path} must have one line `{indent}{key}:`, found {num_found}")
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)


@contextmanager
def registry_answers(registry: str) -> Iterator[None]:
    """Check first that the registry is there; for a local one, start Debian's where that is installed."""
    host = registry.partition("/")[0]
    if _answers(host):
        yield
        return
    program = shutil.which("docker-registry")
    if not LOCAL.match(registry) or program is None:
        raise ToolError(
            f"no registry answers at {host}; give yours with REGISTRY=host/team"
            + (", or apt-get install docker-registry for one on this machine" if LOCAL.match(registry) else "")
        )
    storage = ROOT / ".work" / "registry"
    storage.mkdir(parents=True, exist_ok=True)
    log_path = storage / "registry.log"  # it also tells of each blob that it does not have yet
    print(f"no registry answers at {host}: starting {program} for this push, with its images in {storage}", flush=True)
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as config, open(log_path, "wb") as log:
        json.dump(
            {
                "version": 0.1,
                "storage": {"filesystem": {"rootdirectory": str(storage)}},
                "http": {"addr": host if ":" in host else f"{host}:80"},
                "log": {"level": "error", "accesslog": {"disabled": True}},
            },
            config,
        )
        config.flush()
        server = subprocess.Popen([program, "serve", config.name], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 15
            while not _answers(host):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise ToolError(f"{program} did not start at {host}; its reason is in {log_path}")
                time.sleep(0.1)
            yield
        finally:
            server.terminate()
            server.wait()


def _answers(host: str) -> bool:
    """Whether a registry answers, also one that wants a login."""
    schemes = ("http",) if LOCAL.match(host) else ("https", "http")
    for scheme in schemes:
        try:
            with urllib.request.urlopen(f"{scheme}://{host}/v2/", timeout=10):
                return True
        except urllib.error.HTTPError as error:
            return error.code in (401, 403)
        except OSError:
            continue
    return False


def _find_engine() -> str:
    for engine in ("docker", "podman"):
        if shutil.which(engine) and subprocess.run([engine, "info"], capture_output=True, check=False).returncode == 0:
            return engine
    raise ToolError(
        "neither docker nor podman works here; install one (on Debian: apt-get install docker.io), and start its daemon"
    )


def _revision() -> str:
    """The commit that is built, marked if the tree differs from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    return described.stdout.strip() or "unknown"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", default="localhost:5000", help="where to push: host[:port][/team] [%(default)s]")
    parser.add_argument("--build-only", action="store_true", help="neither push nor record")
    parser.add_argument("--engine", default="", help="docker or podman [whichever works]")
    parser.add_argument("--base-image", default="", help="image to build on [base_image of images/digests.yaml]")
    parser.add_argument(
        "--torch-index", default="", help="extra package index with torch for other hardware [pip's own: CUDA]"
    )
    parser.add_argument(
        "--build-option", action="append", default=[], metavar="OPTION", help="for the engine's build; repeatable"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as after Ctrl-C, a registry that was started here ends
    sys.exit(main())
