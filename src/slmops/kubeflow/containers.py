"""Steps in containers on this machine: what KFP's DockerRunner is given, and what is put in place of its weak parts.

Each step runs in its own image, as in a cluster: not as root, on a read-only root file system, without capabilities. It
has no network; a step that names s3:// gets one socket that leads to the object store (see docs/adr/0006).
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops import relay
from slmops.errors import ArtifactError, SlmopsError, StoreError, UserError, explain_os_errors
from slmops.kubeflow.compile import Compiled
from slmops.resume import WORK_DIR

if TYPE_CHECKING:
    import docker

IMAGE_USER = 10001
"""UID and GID of the images' user; root's runs use them, anyone else's run with their own."""
LABEL = "slmops.run"
WRITABLE = "store_uri"
"""The run-time parameter whose folder steps may write; all others that end in `_uri` are read."""
TERMINATION_LOG = "/dev/termination-log"
SOCKET_IN_CONTAINER = "/run/slmops/object-store.sock"
SHARED_MEMORY = "1g"
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION")
PASSED_ON = ("OMP_NUM_THREADS",)
"""Environment variables that steps take over from the caller, as they do without containers."""

_REAPER = """
import shutil, sys
sys.stdin.read()  # until the run closes it, or is gone
import docker
client = docker.from_env()
for container in client.containers.list(all=True, filters={"label": sys.argv[1]}):
    try:
        container.remove(force=True)
    except docker.errors.APIError:
        pass
shutil.rmtree(sys.argv[2], ignore_errors=True)
"""


def image_ids(compiled: Compiled) -> dict[str, str]:
    """The id of each image that the pipeline names.

    Raises:
        UserError: Docker does not answer, or an image is not on this machine: none is pulled here.
    """
    import docker

    ids, missing = {}, []
    with closing(_connect()) as client:
        for name in sorted(compiled.images()):
            try:
                ids[name] = str(client.images.get(name).id)
            except docker.errors.ImageNotFound:
                missing.append(name)
    if missing:
        raise UserError(
            f"not on this machine: {', '.join(missing)}; build the images with `make images`, or `docker pull` them"
        )
    return ids


@contextmanager
def docker_runner(
    arguments: Mapping[str, Any], *, output_dir: Path, folders: Iterable[Path], termination_log: Path
) -> Iterator[Any]:
    """A `kfp.local.DockerRunner` for one run; every container that it started is gone when the block ends.

    Args:
        arguments: run-time parameters of the pipeline, and rows that its recipe names.
        output_dir: where the run writes.
        folders: those below it that steps write.
        termination_log: takes the error of a failed step.

    Raises:
        UserError: a local path cannot be used by the containers' user.
    """
    from kfp import local
    from kfp.local import docker_task_handler

    user = Owner.of_this_process()
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        user.own(folder)
    with ExitStack() as stack:
        scratch = Path(tempfile.mkdtemp(prefix="slmops-"))
        stack.enter_context(_reaper(f"{LABEL}={scratch.name}", scratch))
        run = _Run(user, termination_log, {**_inputs(arguments, user), **_store_folder(arguments, user)})
        run.volumes |= {str(output_dir / "work"): {"bind": str(output_dir / "work"), "mode": "rw"}}
        if endpoint_url := _endpoint(arguments):
            path = scratch / "store.sock"
            stack.enter_context(relay.offer_store(path, endpoint_url))
            user.own(path)
            run.store = _Store(path, endpoint_url)
        before = docker_task_handler.run_docker_container
        docker_task_handler.run_docker_container = run.container
        stack.callback(setattr, docker_task_handler, "run_docker_container", before)
        yield local.DockerRunner(
            user=f"{user.uid}:{user.gid}",
            read_only=True,
            tmpfs={"/tmp": "rw,exec,nosuid,nodev,mode=1777"},  # noqa: S108 - as an emptyDir in a cluster
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            network_mode="none",
            shm_size=SHARED_MEMORY,
            working_dir=str(Path.cwd()),  # relative paths mean what they mean to the caller
            environment={WORK_DIR: str(output_dir / "work"), **_set_here(PASSED_ON)},
            labels={LABEL: scratch.name},
            device_requests=_gpus(),
        )


@dataclass(frozen=True)
class Owner:
    """The user of the containers' processes."""

    uid: int
    gid: int

    @classmethod
    def of_this_process(cls) -> Owner:
        """Who runs this, so that they own what the steps write; for root, the images' own user."""
        return cls(os.getuid(), os.getgid()) if os.getuid() else cls(IMAGE_USER, IMAGE_USER)

    def own(self, path: Path) -> None:
        """Give `path` and all below it to this user. Only root's runs have anything to give."""
        if os.getuid() == 0:
            for entry in (path, *path.rglob("*")):
                os.chown(entry, self.uid, self.gid, follow_symlinks=False)

    def may(self, path: Path, right: int) -> bool:
        """Whether this user has `right` (4 to read, 2 to write) by the mode of `path`; for a folder, also to enter."""
        found = path.stat()
        shift = 6 if found.st_uid == self.uid else 3 if found.st_gid == self.gid else 0
        wanted = right | 1 if path.is_dir() else right
        return found.st_mode >> shift & wanted == wanted


@dataclass(frozen=True)
class _Store:
    socket: Path
    endpoint_url: str

    def options(self) -> dict[str, Any]:
        """What a container needs to reach the store."""
        environment = _set_here(CREDENTIALS) | {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            relay.STORE_SOCKET: SOCKET_IN_CONTAINER,
        }
        host = relay.address_of(self.endpoint_url)[0]
        return {"environment": environment, "extra_hosts": {} if _is_ip(host) else {host: "127.0.0.1"}}


@dataclass
class _Run:
    """Starts the containers of one run."""

    user: Owner
    termination_log: Path
    volumes: dict[str, dict[str, str]]
    store: _Store | None = None

    def container(
        self, client: docker.DockerClient, image: str, command: list[str], volumes: dict[str, Any], **options: Any
    ) -> int:
        """In place of `kfp.local.docker_task_handler.run_docker_container`: run one step and return its exit code.

        KFP's own removes a container as soon as it ends, and takes one that it then does not find for a success; and it
        pulls images. This one waits for the exit code first, pulls nothing, and removes the container itself.
        """
        import docker

        self.termination_log.touch()
        self.user.own(self.termination_log)
        volumes = {**volumes, **self.volumes, str(self.termination_log): {"bind": TERMINATION_LOG, "mode": "rw"}}
        if self.store and any("s3://" in part for part in command):
            volumes[str(self.store.socket)] = {"bind": SOCKET_IN_CONTAINER, "mode": "rw"}
            extra = self.store.options()
            options = {**options, **extra, "environment": {**options["environment"], **extra["environment"]}}
        try:
            container = client.containers.create(image, command, volumes=volumes, **options)
            try:
                container.start()
                for line in _lines(container.logs(stream=True, follow=True)):
                    print(line)
                return int(container.wait()["StatusCode"])
            finally:
                container.remove(force=True)
        except docker.errors.NotFound as error:
            raise SlmopsError(f"a container of {image} was removed while it ran ({error}); run it again") from error
        except docker.errors.APIError as error:
            raise SlmopsError(f"Docker could not run {image}: {error.explanation or error}") from error


def _connect() -> docker.DockerClient:
    try:
        import docker
    except ImportError:
        raise UserError("--runner docker needs the Python package docker; pip install docker") from None
    try:
        return docker.from_env()
    except docker.errors.DockerException as error:
        raise UserError(f"Docker does not answer ({error}); start its daemon, or leave out --runner docker") from None


@contextmanager
def _reaper(label: str, scratch: Path) -> Iterator[None]:
    """A process that removes the run's containers and `scratch` when the block ends, or this process in any way."""
    reaper = subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", _REAPER, label, str(scratch)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is not for it
    )
    try:
        yield
    finally:
        reaper.communicate()
        shutil.rmtree(scratch, ignore_errors=True)


def _inputs(arguments: Mapping[str, Any], user: Owner) -> dict[str, dict[str, str]]:
    """Read-only mounts of the local files and folders that parameters name."""
    mounts = {}
    for name, value in arguments.items():
        path = Path(str(value))
        if name.endswith("_uri") and name != WRITABLE and "://" not in str(value) and path.exists():
            unreadable = [p for p in (path, *path.rglob("*")) if not user.may(p, 4)]
            if unreadable:
                raise ArtifactError(
                    f"{name}: {unreadable[0]} cannot be read by user {user.uid}, who runs the steps; "
                    f"chmod -R a+rX {path}"
                )
            mounts[str(path.absolute())] = {"bind": str(path.absolute()), "mode": "ro"}
    return mounts


def _store_folder(arguments: Mapping[str, Any], user: Owner) -> dict[str, dict[str, str]]:
    """The mount of a store that is a folder."""
    uri = str(arguments.get(WRITABLE, ""))
    if not uri or "://" in uri:
        return {}
    path = Path(uri).absolute()
    with explain_os_errors(path):
        if not path.exists():
            path.mkdir(parents=True)
            user.own(path)
        if not user.may(path, 2):
            raise StoreError(
                f"{WRITABLE}: {path} cannot be written by user {user.uid}, who runs the steps; "
                f"chown -R {user.uid}:{user.gid} {path}"
            )
    return {str(path): {"bind": str(path), "mode": "rw"}}


def _endpoint(arguments: Mapping[str, Any]) -> str | None:
    """The address of the object store, if a parameter names one."""
    if not any(str(value).startswith("s3://") for value in arguments.values()):
        return None
    endpoint_url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    if not endpoint_url.startswith(("http://", "https://")):
        raise StoreError(
            "steps in containers reach an object store only by the address in AWS_ENDPOINT_URL, found "
            f"{endpoint_url or 'none'}; set it, such as http://127.0.0.1:8333"
        )
    host = relay.address_of(endpoint_url)[0]
    if _is_ip(host) and not ipaddress.ip_address(host).is_loopback:
        raise StoreError(
            f"AWS_ENDPOINT_URL is {endpoint_url}; steps in containers need a name there, not an address: give {host} a "
            "name in /etc/hosts"
        )
    return endpoint_url


def _set_here(names: Iterable[str]) -> dict[str, str]:
    return {name: os.environ[name] for name in names if name in os.environ}


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _gpus() -> list[Any]:
    """All GPUs, where Docker has NVIDIA's runtime."""
    import docker

    with closing(_connect()) as client:
        if "nvidia" not in client.info().get("Runtimes", {}):
            return []
    return [docker.types.DeviceRequest(count=-1, capabilities=[["gpu"]])]


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    pending = b""
    for chunk in chunks:
        *lines, pending = (pending + chunk).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
    if pending:
        yield pending.decode(errors="replace")
