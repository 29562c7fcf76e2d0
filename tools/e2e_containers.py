#!/usr/bin/env python3
"""Runs tests/e2e/test_containers.py with real images, on a bare Debian machine too.

Installs and starts Docker where it is missing (as root), makes the base image with debootstrap, copies this checkout
to .work/e2e, runs `make images` there against a registry on this machine, and then the tests. What it started is
stopped in the end; images stay in Docker, whose layers make the next run fast. Where Docker cannot run, it says so and
ends well.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".work" / "e2e"
REGISTRY = "localhost:5055"
INDEX_PORT = 18765  # a fixed one: the index's address is part of what Docker's layer cache goes by
SETUP = "slmops.setup"  # label of a base image made here: digest of what went into it
PROGRAMS = {"dockerd": "docker.io", "docker-registry": "docker-registry"}
CERTIFICATES = Path("/usr/local/share/ca-certificates")
PIP_SETTINGS = ("index-url", "extra-index-url", "trusted-host")


class CannotRunError(Exception):
    """Docker cannot run here; says why."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-index", default="", help="package index with torch [the wheel that pip finds here]")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.monotonic()
    WORK.mkdir(parents=True, exist_ok=True)
    try:
        with ExitStack() as stack:
            try:
                stack.enter_context(docker())
            except CannotRunError as reason:
                print(f"SKIPPED: end-to-end test in containers: {reason}")
                return 0
            make_base_image()
            torch_index = options.torch_index or stack.enter_context(serve_torch())
            checkout = copy_checkout()
            make_images(checkout, torch_index)
            stack.callback(remove_pushed_names)
            return run_tests(checkout, torch_index)
    finally:
        shutil.rmtree(WORK / "checkout", ignore_errors=True)
        print(f"end-to-end test in containers: {time.monotonic() - started:.0f} s", flush=True)


@contextmanager
def docker() -> Iterator[None]:
    """A Docker daemon that answers: the one that runs, or one that is started here and stopped in the end."""
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    if docker_answers() and "docker-registry" not in missing:
        yield
        return
    if os.getuid() != 0:
        raise CannotRunError("Docker or docker-registry is missing or not running, and only root can change that")
    if missing:
        install(*missing)
    if docker_answers():
        yield
        return
    say("starting dockerd")
    log_path = WORK / "dockerd.log"
    with open(log_path, "wb") as log:
        daemon = subprocess.Popen(["dockerd"], stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not docker_answers():
            if daemon.poll() is not None or time.monotonic() > deadline:
                last = log_path.read_text(errors="replace").strip().rpartition("\n")[2]
                raise CannotRunError(f"dockerd does not start on this machine: {last}")
            time.sleep(0.5)
        yield
    finally:
        daemon.terminate()
        daemon.wait()


def docker_answers() -> bool:
    return (
        shutil.which("docker") is not None
        and subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0
    )


def install(*packages: str) -> None:
    """Debian's packages."""
    if shutil.which("apt-get") is None:
        raise CannotRunError(f"not installed: {', '.join(packages)}, and this is no Debian to install them from")
    say(f"installing {', '.join(packages)}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
        done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CannotRunError(f"{', '.join(packages)} cannot be installed: {done.stderr.strip()}")


def make_base_image() -> None:
    """The image that digests.yaml builds on, from Debian's packages, unless Docker has it.

    The machine's own certificates and package indexes go into it, so that pip works in a build as it works here. An
    image of that name that was not made here is taken as it is.
    """
    name = yaml.safe_load((ROOT / "images" / "digests.yaml").read_text())["base_image"]
    suite = name.rpartition("-")[2]
    certificates = sorted(CERTIFICATES.glob("*.crt"))
    pip_conf = pip_configuration()
    facts = [suite, pip_conf, *(path.read_text() for path in certificates)]
    setup = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    found = subprocess.run(
        ["docker", "image", "inspect", "--format", f'{{{{index .Config.Labels "{SETUP}"}}}}', name],
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode == 0 and found.stdout.strip() in ("", setup):
        say(f"base image {name} is there")
        return
    if shutil.which("debootstrap") is None:
        install("debootstrap")
    say(f"making the base image {name} with debootstrap")
    root = WORK / "root"
    shutil.rmtree(root, ignore_errors=True)
    include = "--include=python3,python3-venv,python3-pip,ca-certificates"
    run(["debootstrap", "--variant=minbase", include, suite, str(root)], log=WORK / "debootstrap.log")
    for path in certificates:
        shutil.copy(path, root / CERTIFICATES.relative_to("/"))
    run(["chroot", str(root), "update-ca-certificates"], log=WORK / "debootstrap.log")
    (root / "etc" / "pip.conf").write_text(pip_conf)
    for path in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        path.unlink()
    for link in ("python", "python3"):
        (root / "usr/local/bin" / link).symlink_to("/usr/bin/python3")
    environment = "ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt"
    command = [
        "docker",
        "import",
        "-c",
        'CMD ["python3"]',
        "-c",
        environment,
        "-c",
        f"LABEL {SETUP}={setup}",
        "-",
        name,
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as importing:
        assert importing.stdin is not None
        with tarfile.open(fileobj=importing.stdin, mode="w|") as archive:
            archive.add(root, ".", filter=without_apt_files)
        importing.stdin.close()
    if importing.returncode != 0:
        sys.exit(f"error: `docker import` of {name} failed")
    shutil.rmtree(root)


def without_apt_files(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if entry.name.startswith(("./var/cache/apt/", "./var/lib/apt/lists/")) else entry


def pip_configuration() -> str:
    """/etc/pip.conf with this machine's indexes, as far as they can be reached from a container."""
    lines = ["[global]", "cert = /etc/ssl/certs/ca-certificates.crt"]
    for name in PIP_SETTINGS:
        set_to = os.environ.get(f"PIP_{name.upper().replace('-', '_')}")
        if set_to is None:
            asked = [sys.executable, "-m", "pip", "config", "get", f"global.{name}"]
            set_to = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
        if values := [value for value in set_to.split() if not value.startswith("file:")]:
            lines.append(f"{name} = {' '.join(values)}")
    return "\n".join(lines) + "\n"


@contextmanager
def serve_torch() -> Iterator[str]:
    """The torch wheel that pip finds on this machine, as a package index on loopback; yields its URL."""
    pin = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    folder = WORK / "index"
    say(f"looking for the wheel of {pin}")
    run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder / "torch"), pin],
        log=WORK / "download.log",
    )

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", INDEX_PORT), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{INDEX_PORT}/"
        server.shutdown()


def copy_checkout() -> Path:
    """A copy of this checkout with a Python of its own, so that digests are recorded there and not here."""
    target = WORK / "checkout"
    shutil.rmtree(target, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    run([sys.executable, "-m", "venv", "--without-pip", str(target / ".venv")])
    packages = [path for path in sys.path if path.endswith("site-packages")]
    next(target.glob(".venv/lib/python3*/site-packages")).joinpath("borrowed.pth").write_text("\n".join(packages))
    pip = [sys.executable, "-m", "pip", "--python", str(target / ".venv" / "bin" / "python"), "install", "--quiet"]
    run([*pip, "--no-index", "--no-deps", "--no-build-isolation", "--editable", str(target)])
    (target / ".venv" / ".dev").touch()
    return target


def make_images(checkout: Path, torch_index: str) -> None:
    """`make images` as a user would call it. The builds share this machine's network, for the index on loopback."""
    settings = [f"REGISTRY={REGISTRY}/e2e", "ENGINE=docker", f"TORCH_INDEX={torch_index}"]
    say(f"make images {' '.join(settings)}")
    run(["make", "--no-print-directory", "-C", str(checkout), "images", *settings, "BUILD_OPTION=--network=host"])


def run_tests(checkout: Path, torch_index: str) -> int:
    environment = os.environ | {
        "SLMOPS_E2E_CHECKOUT": str(checkout),
        "SLMOPS_E2E_BUILD_OPTIONS": json.dumps([f"--torch-index={torch_index}", "--build-option=--network=host"]),
    }
    command = [sys.executable, "-m", "pytest", "-s", "--durations=5", "tests/e2e/test_containers.py"]
    return wait_for(subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True))


def remove_pushed_names() -> None:
    """The names of the registry that is gone; the images keep their version tags."""
    listed = subprocess.run(
        ["docker", "images", "--format", "{{.Repository}}:{{.Tag}}"], capture_output=True, text=True, check=True
    ).stdout
    if names := [name for name in listed.split() if name.startswith(f"{REGISTRY}/") and not name.endswith(":<none>")]:
        subprocess.run(["docker", "rmi", *names], capture_output=True, check=False)


def run(command: Sequence[str], log: Path | None = None) -> None:
    """Run a command; its output goes to `log` if that is given. Ends the program if it fails."""
    with open(log or os.devnull, "ab") as file:
        output = file if log else None
        code = wait_for(subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True))
    if code != 0:
        sys.exit(f"error: `{' '.join(command[:4])} …` failed" + (f"; read {log}" if log else ""))


def wait_for(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a process that leads a session; if this program is told to end, so is all that it started."""
    try:
        return process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise


def say(what: str) -> None:
    print(f"e2e: {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
