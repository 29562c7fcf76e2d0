"""Kills, cuts, damage and races between publishers, a real S3 server and nodes: nobody ever sees half a release."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from slmops.demo.object_store import ObjectStore, object_store
from slmops.edge import node
from slmops.edge.pull import pull
from slmops.errors import CorruptDownload, DiskFullError, StoreError, StoreUnavailable
from slmops.publish.config import PublishConfig
from slmops.publish.run import run
from slmops.release import fetch
from slmops.release.format import RANGE_BYTES, Manifest, manifest_key
from slmops.release.metadata import read_channel
from slmops.storage import open_store
from tests.judged import write_variants, write_verdict

pytestmark = pytest.mark.slow

NUM_RANGES = 8
SIZE_BYTES = NUM_RANGES * RANGE_BYTES


def use(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in store.environment().items():
        monkeypatch.setenv(name, value)


def write_inputs(base: Path, weights: bytes) -> dict[str, Path]:
    """A variants artifact and a passing verdict, with the facts that the real steps write."""
    files = {"genai_config.json": b"{}", "model.onnx.data": weights}
    write_verdict(base / "verdict", write_variants(base / "variants", {"cpu-int4": files}))
    return {"variants": base / "variants", "verdict": base / "verdict", "release": base / "release"}


def publish(uri: str, base: Path, weights: bytes) -> str:
    sidecar = run(PublishConfig(store_uri=uri), **write_inputs(base, weights))
    return str(sidecar.facts["release_digest"])


def python(code: str, *arguments: object, store: ObjectStore | None = None) -> subprocess.Popen[bytes]:
    environment = os.environ | (store.environment() if store else {})
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=environment)


PULL = """
import sys
from pathlib import Path
from slmops.edge.pull import pull
pull(sys.argv[1], "default", Path(sys.argv[2]))
"""
PUBLISH = """
import sys
from pathlib import Path
from slmops.publish.config import PublishConfig
from slmops.publish.run import run
names = ("variants", "verdict", "release")
run(PublishConfig(store_uri=sys.argv[1]), **{name: Path(sys.argv[2]) / name for name in names})
"""
KILL_AT = """
import os, sys
from slmops import storage
left = int(sys.argv.pop(1))
def count(function):
    def counted(*arguments, **keywords):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
        return function(*arguments, **keywords)
    return counted
"""


@contextmanager
def slow_link(store: ObjectStore, bytes_per_s: float = 1e12, cuts: int = 0) -> Iterator[ObjectStore]:
    """The store behind a TCP proxy that limits its answers' speed, and cuts the first `cuts` long answers half-way."""
    server_port = urlsplit(store.endpoint_url).port
    listener = socket.create_server(("127.0.0.1", 0))
    left = [cuts]
    lock = threading.Lock()

    def copy(source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        copied = 0
        try:
            while data := source.recv(65536):
                if is_answer:
                    time.sleep(len(data) / bytes_per_s)
                    copied += len(data)
                    with lock:
                        cut = copied > RANGE_BYTES // 2 and left[0] > 0
                        left[0] -= cut
                    if cut:
                        break
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()

    def accept() -> None:
        while True:
            try:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", server_port))
            except OSError:
                return
            threading.Thread(target=copy, args=(near, far, False), daemon=True).start()
            threading.Thread(target=copy, args=(far, near, True), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield ObjectStore(url, store.access_key, store.secret_key)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def test_objects_and_keys_outlast_a_kill_of_everything(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from slmops.demo.object_store import object_store
with object_store(Path(sys.argv[1])) as store:
    store.make_bucket("kept")
    store.client().put_object(Bucket="kept", Key="key", Body=b"value")
    print(store.endpoint_url, store.access_key, flush=True)
    os.kill(os.getpid(), 9)
"""
    result = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL
    url, access_key = result.stdout.split()
    deadline = time.monotonic() + 5
    while _listens(url) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _listens(url), "the server outlived the process that started it"
    assert (tmp_path / "s3.json").stat().st_mode & 0o777 == 0o600
    with object_store(tmp_path) as store:
        assert store.access_key == access_key
        assert store.client().get_object(Bucket="kept", Key="key")["Body"].read() == b"value"
        assert store.secret_key not in repr(store)
    assert not _listens(store.endpoint_url)


def _listens(url: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", urlsplit(url).port or 0)) == 0


def test_a_node_keeps_what_it_has_while_the_store_is_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "node"
    with object_store(tmp_path / "s3") as store:
        use(store, monkeypatch)
        uri = store.make_bucket()
        digest = publish(uri, tmp_path / "a", b"w" * 100)
        pull(uri, "default", root)
    with pytest.raises(StoreUnavailable, match="does not answer"):
        pull(uri, "default", root)
    assert node.open_current(root)[0].release_digest == digest


def test_wrong_keys_are_the_users_to_fix(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(bucket, tmp_path / "a", b"w")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mistyped-secret")
    for act in (lambda: pull(bucket, "default", tmp_path / "node"), lambda: publish(bucket, tmp_path / "b", b"v")):
        with pytest.raises(StoreError, match="check AWS_ACCESS_KEY_ID") as caught:
            act()
        assert "mistyped-secret" not in str(caught.value)


def blob_of(uri: str, size_bytes: int) -> str:
    store = open_store(uri)
    for key in store.list("v1/blobs/"):
        found = store.stat(key)
        if found is not None and found.size_bytes == size_bytes:
            return key
    raise AssertionError("no such blob")


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_damage_in_the_store_never_gets_current(s3: ObjectStore, bucket: str, tmp_path: Path, damage: str) -> None:
    root = tmp_path / "node"
    first = publish(bucket, tmp_path / "a", b"old")
    pull(bucket, "default", root)
    weights = bytearray(os.urandom(2 * RANGE_BYTES))
    publish(bucket, tmp_path / "b", bytes(weights))
    key = blob_of(bucket, len(weights))
    if damage == "flipped":
        weights[RANGE_BYTES + 7] ^= 1
    else:
        del weights[-1000:]
    s3.client().put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=bytes(weights))
    with pytest.raises(CorruptDownload, match=r"model\.onnx\.data.*remove that object from the store"):
        pull(bucket, "default", root)
    assert node.open_current(root)[0].release_digest == first


def test_cut_connections_are_made_up_for(
    s3: ObjectStore, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = os.urandom(SIZE_BYTES)
    publish(bucket, tmp_path / "a", weights)
    with slow_link(s3, cuts=5) as link:
        use(link, monkeypatch)
        result = pull(bucket, "default", tmp_path / "node")
    assert (result.path / "model.onnx.data").read_bytes() == weights


def test_a_killed_pull_goes_on_where_it_was(s3: ObjectStore, bucket: str, tmp_path: Path) -> None:
    root = tmp_path / "node"
    weights = os.urandom(SIZE_BYTES)
    publish(bucket, tmp_path / "a", weights)
    with slow_link(s3, bytes_per_s=1.5e6) as link:
        process = python(PULL, bucket, root, store=link)
        deadline = time.monotonic() + 60
        while _blocks(root) < SIZE_BYTES / 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    kept = _blocks(root)
    assert SIZE_BYTES / 2 <= kept < SIZE_BYTES
    assert node.current_digest(root) is None
    result = pull(bucket, "default", root)
    assert (result.path / "model.onnx.data").read_bytes() == weights
    # Only ranges that were being written when the kill came are fetched again.
    assert result.bytes_fetched <= SIZE_BYTES - kept + fetch.NUM_IN_FLIGHT * RANGE_BYTES
    assert result.bytes_fetched <= SIZE_BYTES * 3 // 4


def _blocks(root: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in root.glob("staging/*/model.onnx.data"))


def test_a_publisher_killed_at_the_upload_shows_nothing(s3: ObjectStore, bucket: str, tmp_path: Path) -> None:
    first = publish(bucket, tmp_path / "a", b"old")
    inputs = write_inputs(tmp_path / "b", os.urandom(SIZE_BYTES))
    process = python(PUBLISH, bucket, tmp_path / "b", store=s3)
    before = len(list(open_store(bucket).list("v1/blobs/")))
    while len(list(open_store(bucket).list("v1/"))) <= before + 7 and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    result = pull(bucket, "default", tmp_path / "node")
    second = run(PublishConfig(store_uri=bucket), **inputs).facts
    assert result.release_digest in (first, second["release_digest"])
    assert second["sequence"] == 2
    assert pull(bucket, "default", tmp_path / "node").release_digest == second["release_digest"]


def test_a_publisher_killed_at_any_write_leaves_old_or_new(tmp_path: Path) -> None:
    uri = str(tmp_path / "store")
    first = publish(uri, tmp_path / "a", b"old")
    write_inputs(tmp_path / "b", b"new" * 1000)
    kill = KILL_AT + "storage.os.replace = count(storage.os.replace)\n"
    seen = []
    for point in range(40):
        process = python(kill + PUBLISH, point, uri, tmp_path / "b")
        ended = process.wait()
        root = tmp_path / f"node-{point}"
        seen.append(pull(uri, "default", root).release_digest)
        node.open_current(root)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    assert ended == 0
    assert seen[0] == first
    assert seen[-1] != first
    assert len(seen) > 3
    channel = read_channel(open_store(uri), "default")
    assert channel is not None
    assert channel.sequence == 2


def test_a_pull_killed_at_any_change_leaves_old_or_new(tmp_path: Path) -> None:
    uri, root = str(tmp_path / "store"), tmp_path / "node"
    digests = {publish(uri, tmp_path / "a", b"old")}
    pull(uri, "default", root)
    digests.add(publish(uri, tmp_path / "b", os.urandom(RANGE_BYTES + 9)))
    kill = KILL_AT + "for name in ('replace', 'rename', 'fsync', 'pwrite', 'unlink', 'rmdir'):\n"
    kill += "    setattr(os, name, count(getattr(os, name)))\n"
    for point in range(40):
        attempt = tmp_path / f"node-{point}"
        shutil.copytree(root, attempt, symlinks=True)
        ended = python(kill + PULL, point, uri, attempt).wait()
        assert node.open_current(attempt)[0].release_digest in digests
        result = pull(uri, "default", attempt)
        assert node.open_current(attempt)[0].release_digest == result.release_digest
        assert node.read_state(attempt).sequences == {"default": 2}
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    assert ended == 0
    assert point > 5


def test_eight_publishers_at_once_lose_nothing(bucket: str, tmp_path: Path) -> None:
    inputs = [write_inputs(tmp_path / str(n), f"weights {n}".encode()) for n in range(8)]
    config = PublishConfig(store_uri=bucket)
    with ThreadPoolExecutor(8) as pool:
        facts = [sidecar.facts for sidecar in pool.map(lambda one: run(config, **one), inputs)]
    assert sorted(fact["sequence"] for fact in facts) == list(range(1, 9))
    last = max(facts, key=lambda fact: int(fact["sequence"]))
    channel = read_channel(open_store(bucket), "default")
    assert channel is not None
    assert (channel.release_digest, channel.sequence) == (last["release_digest"], 8)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", path]).returncode:
        pytest.skip("mounting a small file system needs root")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_full_disk_is_told_before_and_during_the_fetch(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "store")
    publish(uri, tmp_path / "a", os.urandom(2 * RANGE_BYTES))
    with pytest.raises(DiskFullError, match="free some space and run the same command again"):
        pull(uri, "default", small_disk / "node")
    # Another program takes the space after it was counted.
    monkeypatch.setattr(fetch, "MARGIN_BYTES", -SIZE_BYTES)
    with pytest.raises(DiskFullError, match="no space left"):
        pull(uri, "default", small_disk / "node")
    assert node.current_digest(small_disk / "node") is None


def test_a_manifest_that_was_swapped_is_refused(s3: ObjectStore, bucket: str, tmp_path: Path) -> None:
    publish(bucket, tmp_path / "a", b"w")
    key = next(open_store(bucket).list("v1/manifests/"))
    manifest = Manifest.model_validate_json(open_store(bucket).read(key, 1 << 20))
    other = manifest.model_copy(update={"variant": "cpu-int8"})
    assert key == manifest_key(manifest.digest)
    s3.client().put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=other.to_bytes())
    with pytest.raises(CorruptDownload, match="does not have the digest in its name"):
        pull(bucket, "default", tmp_path / "node")
