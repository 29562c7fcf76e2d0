"""Both stores keep the same promises: nothing is overwritten, a swap has one winner, errors say what to do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from slmops.demo.object_store import ObjectStore
from slmops.errors import ArtifactError, DiskFullError, StoreError, StoreUnavailable
from slmops.s3 import S3Store
from slmops.storage import LocalStore, Store, fetch, open_store


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "local":
        yield open_store(str(tmp_path / "store"))
    else:
        yield open_store(request.getfixturevalue("bucket") + "/some/prefix")


def test_create_never_overwrites(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"from a file")
    assert store.create("v1/a", file)
    assert not store.create("v1/a", b"other")
    assert store.read("v1/a", 100) == b"from a file"
    assert store.read_range("v1/a", 5, 3) == b"a f"
    assert store.read_range("v1/a", 7, 100) == b"file"
    assert store.read_range("v1/a", 100, 5) == b""


def test_stat_tells_size_and_absence(store: Store) -> None:
    assert store.stat("v1/a") is None
    store.create("v1/a", b"12345")
    found = store.stat("v1/a")
    assert found is not None
    assert found.size_bytes == 5


def test_replace_needs_the_current_etag(store: Store) -> None:
    assert store.replace("t", b"1", if_match=None)
    assert not store.replace("t", b"2", if_match=None)
    first = store.stat("t")
    assert first is not None
    assert store.replace("t", b"2", if_match=first.etag)
    assert not store.replace("t", b"3", if_match=first.etag)
    assert store.read("t", 10) == b"2"
    assert not store.replace("absent", b"1", if_match=first.etag)


def test_a_swap_has_one_winner(store: Store) -> None:
    store.create("t", b"start")
    start = store.stat("t")
    assert start is not None
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: store.replace("t", f"writer {n}".encode(), start.etag), range(8)))
    assert won.count(True) == 1
    assert store.read("t", 100) == f"writer {won.index(True)}".encode()


def test_list_is_by_prefix_and_in_order(store: Store) -> None:
    for key in ("v1/b/2", "v1/b/1", "v1/a", "v2/x"):
        store.create(key, b".")
    assert list(store.list("v1/b")) == ["v1/b/1", "v1/b/2"]
    assert list(store.list("")) == ["v1/a", "v1/b/1", "v1/b/2", "v2/x"]


def test_read_refuses_what_is_too_large_or_absent(store: Store) -> None:
    store.create("big", b"x" * 100)
    with pytest.raises(StoreError, match="larger than 99 bytes"):
        store.read("big", 99)
    with pytest.raises(StoreError, match="has no object nothing"):
        store.read("nothing", 99)
    with pytest.raises(StoreError, match="has no object nothing"):
        store.read_range("nothing", 0, 9)


def test_a_good_store_passes_the_probe_twice(store: Store) -> None:
    store.probe()
    store.probe()


class ForgetfulStore(LocalStore):
    """A double for stores that answer conditional writes as if there was no condition (`rclone serve s3` does)."""

    def create(self, key: str, data: bytes | Path) -> bool:
        self._path(key).unlink(missing_ok=True)
        return super().create(key, data)


def test_a_store_that_ignores_conditions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="ignores conditional writes"):
        ForgetfulStore(tmp_path).probe()


def test_a_killed_write_leaves_nothing_to_read(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        os.fsync = lambda _: os.kill(os.getpid(), 9)  # type: ignore[assignment]
        LocalStore(tmp_path).create("v1/a", b"half")
    os.waitpid(pid, 0)
    store = LocalStore(tmp_path)
    assert store.stat("v1/a") is None
    assert list(store.list("")) == []
    assert store.create("v1/a", b"whole")


def test_a_full_disk_is_called_by_its_name(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=64k tmpfs {disk} 2>/dev/null") != 0:  # noqa: S605
        pytest.skip("this sandbox does not let root mount")
    try:
        with pytest.raises(DiskFullError, match="no space left"):
            LocalStore(disk).create("v1/a", b"x" * 200_000)
        assert LocalStore(disk).stat("v1/a") is None
    finally:
        os.system(f"umount {disk}")  # noqa: S605


def test_keys_stay_inside_the_folder(tmp_path: Path) -> None:
    for key in ("../x", "/etc/passwd", "a/../../x", "", ".lock"):
        with pytest.raises(StoreError):
            LocalStore(tmp_path).read(key, 10)


@pytest.mark.parametrize("uri", ["gs://bucket", "s3://", "s3:///key", "s3://user:secret@bucket"])
def test_other_uris_are_refused_without_their_secrets(uri: str) -> None:
    with pytest.raises(StoreError) as caught:
        open_store(uri)
    assert "secret" not in str(caught.value)


def test_fetch_leaves_a_local_path_alone(tmp_path: Path) -> None:
    assert fetch("some/file.jsonl", tmp_path) == Path("some/file.jsonl")


@pytest.mark.slow
def test_fetch_brings_a_file_from_s3(bucket: str, tmp_path: Path) -> None:
    content = os.urandom(9_000_000)
    open_store(bucket).create("in/rows.jsonl", content)
    path = fetch(f"{bucket}/in/rows.jsonl", tmp_path)
    assert path == tmp_path / "rows.jsonl"
    assert path.read_bytes() == content
    with pytest.raises(StoreError, match="does not exist"):
        fetch(f"{bucket}/in/other.jsonl", tmp_path)


@pytest.mark.slow
def test_upload_of_an_absent_file_is_the_file_s_fault(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        open_store(bucket).create("x", tmp_path / "absent")


@pytest.mark.slow
class TestRefusals:
    """What a user sees when the store refuses."""

    def test_wrong_secret(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-right-one")
        acts: list[Callable[[Store], object]] = [Store.probe, lambda s: s.stat("x"), lambda s: s.read("x", 9)]
        for act in acts:
            with pytest.raises(StoreError, match=r"refuses these credentials.*check AWS_ACCESS_KEY_ID") as caught:
                act(open_store(bucket))
            assert "not-the-right-one" not in str(caught.value)

    def test_unknown_key_id(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "NOBODY")
        with pytest.raises(StoreError, match="refuses these credentials"):
            open_store(bucket).create("x", b"1")

    def test_no_credentials(self, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(StoreError, match="set AWS_ACCESS_KEY_ID"):
            open_store(bucket).stat("x")

    def test_no_bucket(self, bucket: str) -> None:
        store = open_store(bucket + "-other")
        acts: list[Callable[[Store], object]] = [Store.probe, lambda s: s.stat("x"), lambda s: s.read("x", 9)]
        acts.append(lambda s: list(s.list("")))
        for act in acts:
            with pytest.raises(StoreError, match=r"bucket does not exist; create it"):
                act(store)


def test_a_store_that_is_down_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    down = replace(ObjectStore("http://127.0.0.1:9", "KEY", "the-secret"))
    for name, value in down.environment().items():
        monkeypatch.setenv(name, value)
    store = open_store("s3://bucket")
    assert isinstance(store, S3Store)
    with pytest.raises(StoreUnavailable, match=r"does not answer at http://127\.0\.0\.1:9") as caught:
        store.stat("x")
    assert "the-secret" not in str(caught.value)
