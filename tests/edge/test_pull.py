"""A node gets what its channel points to, once, whole, and never goes back."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest

from slmops.edge import node
from slmops.edge import pull as pull_module
from slmops.edge.pull import pull
from slmops.errors import ArtifactError, CorruptDownload, DataError, DiskFullError, StoreError, TransientError
from slmops.release.build import build_manifest
from slmops.release.format import (
    RANGE_BYTES,
    Gate,
    Manifest,
    Release,
    ReleaseVariant,
    Requirements,
    blob_key,
    manifest_key,
    release_key,
)
from slmops.release.machine import Machine
from slmops.release.metadata import point_channel
from slmops.storage import LocalStore

REQUIREMENTS = Requirements(
    architectures=("aarch64", "x86_64"), runtime="onnxruntime-genai", runtime_version="0.10", ram_bytes=1_000
)


class Source:
    """A folder to which small releases are published."""

    def __init__(self, path: Path) -> None:
        self.path, self.store = path, LocalStore(path / "store")
        self.uri = str(path / "store")

    def publish(self, weights: bytes, *requirements: Requirements, genai: bytes = b'{"model": {}}') -> str:
        """Publish a release with one variant per requirement; return its digest."""
        variants = []
        for number, needs in enumerate(requirements or (REQUIREMENTS,)):
            directory = self.path / "files"
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            (directory / "genai_config.json").write_bytes(b"{}")
            (directory / "model.onnx.data").write_bytes(weights)
            (directory / "tokenizer.json").write_bytes(b'{"the same": "in all releases"}' * 1000)
            manifest = build_manifest(directory, f"v{number}", needs)
            (directory / "genai_config.json").write_bytes(genai)
            if genai != b"{}":
                manifest = _rebuilt(manifest, directory)
            for file in manifest.files:
                self.store.create(blob_key(file.sha256), directory / file.path)
            self.store.create(manifest_key(manifest.digest), manifest.to_bytes())
            variants.append(ReleaseVariant(name=f"v{number}", manifest_digest=manifest.digest))
        gate = Gate(verdict="pass", reason="all hold", verdict_digest="a" * 64)
        release = Release(variants=tuple(variants), gate=gate, lineage=())
        self.store.create(release_key(release.digest), release.to_bytes())
        point_channel(self.store, "lab", release.digest)
        return release.digest


def _rebuilt(manifest: Manifest, directory: Path) -> Manifest:
    """The manifest with the digests of what lies in `directory` now, as a hostile publisher would write it."""
    from slmops.release.build import hash_file

    files = tuple(hash_file(directory / file.path, file.path) for file in manifest.files)
    return manifest.model_copy(update={"files": files})


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path / "source")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "node"


def test_the_node_runs_what_the_channel_says(source: Source, root: Path) -> None:
    weights = os.urandom(2 * RANGE_BYTES + 5)
    digest = source.publish(weights)
    result = pull(source.uri, "lab", root)
    assert (result.release_digest, result.variant, result.switched) == (digest, "v0", True)
    assert (root / "current" / "model.onnx.data").read_bytes() == weights
    assert result.path.samefile(root / "current")
    assert sorted(path.name for path in result.path.iterdir()) == [
        "genai_config.json", "model.onnx.data", "tokenizer.json",
    ]  # fmt: skip
    assert all(path.stat().st_nlink == 1 and not path.is_symlink() for path in result.path.iterdir())
    assert node.open_current(root)[0].release_digest == digest


def test_a_second_pull_fetches_nothing(source: Source, root: Path) -> None:
    source.publish(b"w" * 100)
    first = pull(source.uri, "lab", root)
    second = pull(source.uri, "lab", root)
    assert first.bytes_fetched > 0
    assert (second.bytes_fetched, second.switched, second.path) == (0, False, first.path)


def test_files_that_did_not_change_are_not_fetched_again(source: Source, root: Path) -> None:
    source.publish(b"a" * 1000)
    pull(source.uri, "lab", root)
    source.publish(b"b" * 1000)
    assert pull(source.uri, "lab", root).bytes_fetched == 1000


def test_current_and_previous_stay_and_older_go(source: Source, root: Path) -> None:
    digests = []
    for content in (b"1", b"2", b"3"):
        digests.append(source.publish(content))
        pull(source.uri, "lab", root)
    kept = {path.name.partition(".")[0] for path in (root / "releases").iterdir()}
    assert kept == set(digests[1:])
    assert not list((root / "staging").iterdir())


def test_a_wanted_rollback_is_a_higher_sequence(source: Source, root: Path) -> None:
    first = source.publish(b"1")
    pull(source.uri, "lab", root)
    source.publish(b"2")
    pull(source.uri, "lab", root)
    assert source.publish(b"1") == first
    result = pull(source.uri, "lab", root)
    assert (result.release_digest, result.bytes_fetched, result.switched) == (first, 0, True)


def test_an_old_copy_of_the_store_is_refused(source: Source, root: Path, tmp_path: Path) -> None:
    source.publish(b"1")
    shutil.copytree(source.uri, tmp_path / "old")
    second = source.publish(b"2")
    pull(source.uri, "lab", root)
    with pytest.raises(StoreError, match="at sequence 1, but this node has accepted 2"):
        pull(str(tmp_path / "old"), "lab", root)
    assert node.current_digest(root) == second


def test_another_release_under_an_accepted_sequence_is_refused(source: Source, root: Path, tmp_path: Path) -> None:
    source.publish(b"1")
    pull(source.uri, "lab", root)
    other = Source(tmp_path / "other")
    other.publish(b"2")
    with pytest.raises(StoreError, match="another release under sequence 1"):
        pull(other.uri, "lab", root)


def test_a_processor_without_the_instructions_takes_the_next_variant(
    source: Source, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vnni = REQUIREMENTS.model_copy(update={"instruction_sets": ("AVX2", "AVX512VNNI")})
    cuda = REQUIREMENTS.model_copy(update={"execution_provider": "cuda"})
    source.publish(b"w", cuda, vnni, REQUIREMENTS)
    for features, expected in (({"avx2", "avx512_vnni"}, "v1"), ({"avx2"}, "v2")):
        machine = Machine("x86_64", "0.18", 10_000, frozenset(features))
        monkeypatch.setattr(pull_module, "this_machine", lambda machine=machine: machine)
        assert pull(source.uri, "lab", root / expected).variant == expected
        assert machine.unmet(cuda) == ["needs cuda, this runtime has cpu"]


def test_the_first_variant_that_runs_here_is_taken(source: Source, root: Path) -> None:
    too_new = REQUIREMENTS.model_copy(update={"runtime_version": "999.0"})
    source.publish(b"1", too_new, REQUIREMENTS, REQUIREMENTS)
    assert pull(source.uri, "lab", root).variant == "v1"


def test_if_none_runs_here_every_reason_is_told(source: Source, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull_module, "this_machine", lambda: Machine("riscv64", "0.9.1", 500))
    only_arm = REQUIREMENTS.model_copy(update={"architectures": ("aarch64",)})
    source.publish(b"1", REQUIREMENTS, only_arm)
    with pytest.raises(DataError) as caught:
        pull(source.uri, "lab", root)
    message = str(caught.value)
    assert "v0: needs aarch64 or x86_64, this machine is riscv64" in message
    assert "v1: needs aarch64, this machine is riscv64" in message
    assert "needs onnxruntime-genai 0.10, found 0.9.1" in message
    assert "needs 1,000 bytes of memory, found 500" in message
    assert node.current_digest(root) is None


def test_versions_are_compared_as_numbers() -> None:
    for found, holds in (("0.10", True), ("0.10.0", True), ("0.9.9", False), ("0.10.1rc1", True), ("1", True)):
        assert (Machine("x86_64", found, 10_000).unmet(REQUIREMENTS) == []) is holds, found


def test_native_code_in_the_settings_never_gets_current(source: Source, root: Path) -> None:
    source.publish(b"1", genai=b'{"model": {"custom_ops_library": "/lib/evil.so"}}')
    with pytest.raises(DataError, match="native code"):
        pull(source.uri, "lab", root)
    assert node.current_digest(root) is None


def test_a_nameless_channel_says_so(source: Source, root: Path) -> None:
    source.publish(b"1")
    with pytest.raises(StoreError, match="nothing was published to channel field"):
        pull(source.uri, "field", root)


def test_an_unfit_disk_is_found_before_the_fetch(source: Source, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source.publish(b"w" * 50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(DiskFullError, match="10 are free"):
        pull(source.uri, "lab", root)
    assert not any(path.stat().st_size for path in root.glob("staging/*/*"))


def test_two_pulls_at_once_do_not_mix(source: Source, root: Path) -> None:
    source.publish(b"1")
    root.mkdir()
    with open(root / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(TransientError, match="another pull"):
            pull(source.uri, "lab", root)
    assert pull(source.uri, "lab", root).switched


def test_damage_on_the_node_is_found_and_mended(source: Source, root: Path) -> None:
    source.publish(b"w" * 1000)
    result = pull(source.uri, "lab", root)
    (result.path / "model.onnx.data").write_bytes(b"w" * 999 + b"W")
    with pytest.raises(ArtifactError, match=r"is damaged.*remove .* and pull again"):
        node.open_current(root)
    shutil.rmtree(result.path)
    assert pull(source.uri, "lab", root).bytes_fetched > 0
    node.open_current(root)


def test_a_foreign_file_in_the_release_is_found(source: Source, root: Path) -> None:
    source.publish(b"w")
    (pull(source.uri, "lab", root).path / "extra.so").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"extra\.so, which its manifest does not name"):
        node.open_current(root)


def test_a_damaged_state_is_not_forgotten_in_silence(source: Source, root: Path) -> None:
    source.publish(b"w")
    pull(source.uri, "lab", root)
    (root / "state.json").write_text(json.dumps({"sequences": "many"}))
    with pytest.raises(ArtifactError, match=r"state\.json is damaged"):
        pull(source.uri, "lab", root)


def test_a_damaged_blob_leaves_the_node_as_it_was(source: Source, root: Path) -> None:
    first = source.publish(b"a" * 1000)
    pull(source.uri, "lab", root)
    source.publish(b"b" * 1000)
    for blob in (source.path / "store/v1/blobs").rglob("*"):
        if blob.is_file() and blob.read_bytes() == b"b" * 1000:
            blob.write_bytes(b"b" * 999 + b"c")
    with pytest.raises(CorruptDownload, match=r"model\.onnx\.data"):
        pull(source.uri, "lab", root)
    assert node.current_digest(root) == first
    node.open_current(root)
