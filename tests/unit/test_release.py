"""The release format refuses what an edge node must not read, and the metadata shows all of a release or nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata, Targets  # type: ignore[attr-defined]

from slmops.errors import CorruptDownload, DataError
from slmops.release.build import build_manifest, variant_digest
from slmops.release.format import (
    RANGE_BYTES,
    Channel,
    Manifest,
    Requirements,
    manifest_key,
    parse,
    read_verified,
    refuse_native_code,
)
from slmops.release.metadata import TIMESTAMP_KEY, channel_key, point_channel, read_channel, read_view
from slmops.storage import LocalStore

A, B = "a" * 64, "b" * 64
REQUIREMENTS = Requirements(
    architectures=("x86_64",), runtime="onnxruntime-genai", runtime_version="0.18.0", ram_bytes=100
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "cpu-int4"
    path.mkdir()
    (path / "genai_config.json").write_text('{"model": {"context_length": 128}}')
    (path / "model.onnx").write_bytes(b"graph")
    (path / "model.onnx.data").write_bytes(bytes(RANGE_BYTES) + b"rest")
    return path


@pytest.fixture
def manifest(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(build_manifest(directory, "cpu-int4", REQUIREMENTS).to_bytes())
    return content


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def test_a_manifest_describes_every_range(directory: Path) -> None:
    data = next(f for f in build_manifest(directory, "cpu-int4", REQUIREMENTS).files if f.path.endswith(".data"))
    assert data.size_bytes == RANGE_BYTES + 4
    assert data.ranges == (hashlib.sha256(bytes(RANGE_BYTES)).hexdigest(), hashlib.sha256(b"rest").hexdigest())
    assert data.range_at(1) == (RANGE_BYTES, 4)


def test_the_same_files_make_the_same_bytes(directory: Path) -> None:
    first = build_manifest(directory, "cpu-int4", REQUIREMENTS)
    assert first.to_bytes() == build_manifest(directory, "cpu-int4", REQUIREMENTS).to_bytes()
    assert parse(Manifest, first.to_bytes(), "it") == first
    (directory / "model.onnx").write_bytes(b"grapH")
    assert variant_digest(build_manifest(directory, "cpu-int4", REQUIREMENTS)) != variant_digest(first)


@pytest.mark.parametrize("name", ["kernel.so", "a.dll", "weights.bin", "model.pickle", "x.tar.gz", ".hidden.json"])
def test_other_files_are_refused(directory: Path, name: str) -> None:
    (directory / name).write_bytes(b"x")
    with pytest.raises(DataError, match="may not be in a release"):
        build_manifest(directory, "cpu-int4", REQUIREMENTS)


def test_links_and_folders_are_refused(directory: Path) -> None:
    (directory / "link.json").symlink_to("/etc/hostname")
    with pytest.raises(DataError, match=r"link\.json may not"):
        build_manifest(directory, "cpu-int4", REQUIREMENTS)
    (directory / "link.json").unlink()
    (directory / "sub").mkdir()
    with pytest.raises(DataError, match="sub may not"):
        build_manifest(directory, "cpu-int4", REQUIREMENTS)


def test_settings_that_load_native_code_are_refused(directory: Path) -> None:
    nested = {"model": {"decoder": {"session_options": [{"custom_ops_library": "evil.so"}]}}}
    (directory / "genai_config.json").write_text(json.dumps(nested))
    with pytest.raises(DataError, match="native code"):
        build_manifest(directory, "cpu-int4", REQUIREMENTS)


@pytest.mark.parametrize(
    "settings", [b"[" * 100_000, b"{", b"[]", b"\xff", b'{"Custom_Ops_Library": "x"}', b"1" * 2_000_000]
)
def test_settings_that_are_no_settings_are_refused(settings: bytes) -> None:
    with pytest.raises(DataError):
        refuse_native_code(settings, "it")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: m["files"][0].update(path="../../etc/passwd.json"), "path"),
        (lambda m: m["files"][0].update(path="lib.so"), "path"),
        (lambda m: m["files"][0].update(sha256="A" * 64), "sha256"),
        (lambda m: m["files"][0].update(size_bytes="12"), "size_bytes"),
        (lambda m: m["files"][0].update(size_bytes=1 << 50), "size_bytes"),
        (lambda m: m["files"][0]["ranges"].append(A), "ranges must be 1 digests"),
        (lambda m: m["files"].append(m["files"][0]), "different names"),
        (lambda m: m["files"].pop(0), "genai_config.json"),
        (lambda m: m.update(files=m["files"] * 40), "files"),
        (lambda m: m.update(comment="hello"), "comment"),
        (lambda m: m.update(schema_version=2), "schema_version"),
        (lambda m: m["requirements"].update(architectures=[]), "architectures"),
    ],
)
def test_a_reader_takes_nothing_else(manifest: dict[str, Any], change: Any, complaint: str) -> None:
    change(manifest)
    with pytest.raises(DataError, match=complaint):
        parse(Manifest, json.dumps(manifest).encode(), "it")


def test_an_object_must_match_the_digest_in_its_name(store: LocalStore, directory: Path) -> None:
    manifest = build_manifest(directory, "cpu-int4", REQUIREMENTS)
    store.create(manifest_key(manifest.digest), manifest.to_bytes() + b" ")
    with pytest.raises(CorruptDownload, match="digest in its name"):
        read_verified(store, Manifest, manifest_key(manifest.digest), manifest.digest)


def test_a_channel_rises_and_others_keep_theirs(store: LocalStore) -> None:
    assert read_channel(store, "lab") is None
    assert point_channel(store, "lab", A) == (Channel(release_digest=A, sequence=1), True)
    assert point_channel(store, "lab", A) == (Channel(release_digest=A, sequence=1), False)
    assert point_channel(store, "field", B)[0].sequence == 1
    assert point_channel(store, "lab", B)[0].sequence == 2
    assert point_channel(store, "lab", A)[0].sequence == 3
    assert read_channel(store, "field") == Channel(release_digest=B, sequence=1)


def test_only_the_timestamp_ever_changes(store: LocalStore) -> None:
    before: dict[str, bytes] = {}
    for digest in (A, B, A):
        point_channel(store, "lab", digest)
        after = {key: store.read(key, 1 << 20) for key in store.list("")}
        assert [key for key in before if before[key] != after[key]] in ([], [TIMESTAMP_KEY])
        before = after


def test_the_files_are_tuf_metadata(store: LocalStore) -> None:
    point_channel(store, "lab", A)
    point_channel(store, "lab", B)
    for key, role in ((TIMESTAMP_KEY, "timestamp"), ("v1/metadata/2.snapshot.json", "snapshot")):
        metadata = Metadata.from_bytes(store.read(key, 1 << 20))
        assert (metadata.signed.type, metadata.signed.version) == (role, 2)
    targets = Metadata[Targets].from_bytes(store.read("v1/metadata/2.targets.json", 1 << 20)).signed
    target = targets.targets["lab/channel.json"]
    # What TUF's own client asks for with consistent snapshots: the hash in front of the name.
    assert f"v1/channels/{target.get_prefixed_paths()[0]}" == channel_key("lab", target.hashes["sha256"])


def test_a_publisher_that_was_killed_blocks_nobody(store: LocalStore) -> None:
    point_channel(store, "lab", A)
    store.create("v1/metadata/2.targets.json", b"left by a killed publisher")
    store.create("v1/metadata/2.snapshot.json", b"left by a killed publisher")
    assert read_channel(store, "lab") == Channel(release_digest=A, sequence=1)
    assert point_channel(store, "lab", B)[0].sequence == 2
    assert read_channel(store, "lab") == Channel(release_digest=B, sequence=2)


@pytest.mark.parametrize("role", ["snapshot", "targets", "channel"])
def test_damage_anywhere_on_the_way_is_noticed(store: LocalStore, role: str) -> None:
    point_channel(store, "lab", A)
    digest = Channel(release_digest=A, sequence=1).digest
    key = channel_key("lab", digest) if role == "channel" else f"v1/metadata/1.{role}.json"
    data = bytearray((store.root / key).read_bytes())
    data[len(data) // 2] ^= 1
    (store.root / key).write_bytes(data)
    with pytest.raises(CorruptDownload, match="does not match the metadata"):
        read_channel(store, "lab")


@pytest.mark.parametrize("data", [b"", b"{}", b"not json", b"[" * 100_000])
def test_a_timestamp_that_is_none_is_refused(store: LocalStore, data: bytes) -> None:
    store.create(TIMESTAMP_KEY, data)
    with pytest.raises(DataError, match="no TUF metadata"):
        read_view(store)
