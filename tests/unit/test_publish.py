"""Only what passed the gate is published, the same input gives the same release, and again changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmops import artifacts
from slmops.errors import ArtifactError, GateError, StoreError
from slmops.fetch_champion.config import FetchChampionConfig
from slmops.fetch_champion.run import run as fetch_champion
from slmops.gate.config import GateConfig
from slmops.publish.config import PublishConfig
from slmops.publish.run import run
from slmops.release.format import Manifest, Release, blob_key, manifest_key, read_verified, release_key
from slmops.release.metadata import read_channel
from slmops.storage import LocalStore
from slmops.verdicts import Word
from tests.judged import write_variants, write_verdict

FILES = {
    "genai_config.json": b'{"model": {"context_length": 64}}',
    "model.onnx": b"graph",
    "model.onnx.data": b"w" * 99,
}


def write_inputs(base: Path, *, verdict: Word = "pass", digest: str | None = None) -> dict[str, Path]:
    """A variants artifact and a verdict on it, with the facts that the real steps write."""
    variants = write_variants(
        base / "variants",
        {name: FILES | {"model.onnx": b"graph" + name.encode()} for name in ("cpu-int4", "cpu-int8")},
    )
    write_verdict(base / "verdict", variants, verdict=verdict, digest=digest)
    return {"variants": base / "variants", "verdict": base / "verdict", "release": base / "release"}


@pytest.fixture
def config(tmp_path: Path) -> PublishConfig:
    return PublishConfig(store_uri=str(tmp_path / "store"), channel="lab")


@pytest.fixture
def store(config: PublishConfig) -> LocalStore:
    return LocalStore(Path(config.store_uri))


def test_a_reader_finds_all_of_the_release(tmp_path: Path, config: PublishConfig, store: LocalStore) -> None:
    sidecar = run(config, **write_inputs(tmp_path))
    channel = read_channel(store, "lab")
    assert channel is not None
    assert (channel.release_digest, channel.sequence) == (sidecar.facts["release_digest"], sidecar.facts["sequence"])
    release = read_verified(store, Release, release_key(channel.release_digest), channel.release_digest)
    assert [variant.name for variant in release.variants] == ["cpu-int4"]
    assert [ancestor.kind for ancestor in release.lineage] == ["variants", "benchmark", "verdict"]
    digest = release.variants[0].manifest_digest
    manifest = read_verified(store, Manifest, manifest_key(digest), digest)
    assert manifest.requirements.runtime_version == "0.10.0"
    assert manifest.requirements.ram_bytes == 1_000_000
    found = {file.path: store.read(blob_key(file.sha256), 10_000) for file in manifest.files}
    assert found == {**FILES, "model.onnx": b"graphcpu-int4"}
    assert sidecar.facts["num_blobs"] == 3
    assert artifacts.expect(tmp_path / "release", "release") == sidecar


def test_again_changes_nothing_and_says_so(
    tmp_path: Path, config: PublishConfig, store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    first = run(config, **write_inputs(tmp_path))
    before = {key: store.stat(key) for key in store.list("")}
    caplog.set_level("INFO", "slmops")
    second = run(config, **write_inputs(tmp_path))
    assert {key: store.stat(key) for key in store.list("")} == before
    assert second.facts == first.facts | {"bytes_uploaded": 0}
    assert second.digest == first.digest
    assert "already points to" in caplog.text


def test_another_channel_shares_the_bytes(tmp_path: Path, config: PublishConfig) -> None:
    first = run(config, **write_inputs(tmp_path))
    other = run(config.model_copy(update={"channel": "field"}), **write_inputs(tmp_path))
    assert other.facts["release_digest"] == first.facts["release_digest"]
    assert (other.facts["bytes_uploaded"], other.facts["sequence"]) == (0, 1)


@pytest.mark.parametrize("verdict", ["fail", "not_run"])
def test_without_a_pass_nothing_is_written(tmp_path: Path, config: PublishConfig, verdict: Word) -> None:
    with pytest.raises(GateError, match=f"^gate: {verdict}: accuracy 0.5 < 0.9$"):
        run(config, **write_inputs(tmp_path, verdict=verdict))
    assert not Path(config.store_uri).exists()


def test_a_verdict_on_other_variants_does_not_count(tmp_path: Path, config: PublishConfig) -> None:
    with pytest.raises(GateError, match="judged another cpu-int4"):
        run(config, **write_inputs(tmp_path, digest="d" * 64))


def test_a_file_changed_after_the_gate_is_refused(tmp_path: Path, config: PublishConfig) -> None:
    inputs = write_inputs(tmp_path)
    (inputs["variants"] / "cpu-int4" / "model.onnx.data").write_bytes(b"W" * 99)
    with pytest.raises(ArtifactError, match="was changed after it was quantized"):
        run(config, **inputs)


def test_a_half_written_blob_keeps_the_channel_where_it_is(
    tmp_path: Path, config: PublishConfig, store: LocalStore
) -> None:
    sidecar = run(config, **write_inputs(tmp_path / "a"))
    blob = store.root / next(key for key in store.list("v1/blobs/"))
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"bytes, it must have .* remove that object"):
        run(config.model_copy(update={"channel": "other"}), **write_inputs(tmp_path / "b"))
    assert read_channel(store, "other") is None
    assert read_channel(store, "lab") is not None
    assert sidecar.facts["sequence"] == 1


CLASSES = {"x86-avx2": "cpu-int8", "x86-avx512-vnni": "cpu-int4", "arm64-pi5": "cpu-int4"}


def test_each_device_class_gets_its_variant_and_the_bytes_are_stored_once(
    tmp_path: Path, config: PublishConfig, store: LocalStore
) -> None:
    inputs = write_inputs(tmp_path)
    write_verdict(inputs["verdict"], artifacts.read(inputs["variants"]), classes=CLASSES)
    sidecar = run(config, **inputs)
    digest = sidecar.facts["release_digest"]
    release = read_verified(store, Release, release_key(digest), digest)
    assert [(variant.device_class, variant.name) for variant in release.variants] == [
        ("x86-avx512-vnni", "cpu-int4"),  # what asks for more of a machine stands first
        ("x86-avx2", "cpu-int8"),
        ("arm64-pi5", "cpu-int4"),
    ]
    manifests = [
        read_verified(store, Manifest, manifest_key(variant.manifest_digest), variant.manifest_digest)
        for variant in release.variants
    ]
    needs = [manifest.requirements for manifest in manifests]
    assert [need.architectures for need in needs] == [("x86_64",), ("x86_64",), ("aarch64",)]
    assert needs[0].instruction_sets == ("AVX2", "AVX512VNNI")
    assert [need.ram_bytes for need in needs] == [1_000_001, 1_000_000, 1_000_002]
    assert manifests[0].files == manifests[2].files
    assert sidecar.facts["num_blobs"] == 4  # two graphs, and what both variants share


def test_the_release_carries_the_verdict_that_let_it_pass(
    tmp_path: Path, config: PublishConfig, store: LocalStore
) -> None:
    inputs = write_inputs(tmp_path)
    sidecar = run(config, **inputs)
    digest = sidecar.facts["release_digest"]
    evidence = read_verified(store, Release, release_key(digest), digest).evidence
    kept = {file.path: store.read(blob_key(file.sha256), 1_000_000) for file in evidence}
    assert kept["verdict.json"] == (inputs["verdict"] / "verdict.json").read_bytes()
    assert kept["README.md"].startswith(b"---\n")
    assert b"cpu-int4" in kept["README.md"]


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("file", ["verdict.json", "slmops.json"])
def test_an_edited_verdict_is_refused(tmp_path: Path, config: PublishConfig, file: str) -> None:
    inputs = write_inputs(tmp_path, verdict="fail")
    edit(inputs["verdict"] / file, '"fail"', '"pass"')
    with pytest.raises(ArtifactError, match="verdict"):
        run(config, **inputs)
    assert not Path(config.store_uri).exists()


def test_a_verdict_that_was_edited_with_all_its_digests_is_refused_where_its_checks_say_otherwise(
    tmp_path: Path, config: PublishConfig
) -> None:
    inputs = write_inputs(tmp_path, verdict="fail")
    facts = artifacts.read(inputs["verdict"]).facts
    pair = facts["pairs"][0]
    choice = facts["choices"][0] | {"verdict": "pass", "variant": pair["variant"], "digest": pair["digest"]}
    forged = facts | {"verdict": "pass", "choices": [choice], "pairs": [pair | {"verdict": "pass"}]}
    with artifacts.writing(inputs["verdict"], kind="verdict", step="gate") as draft:
        draft.facts |= forged
        artifacts.write_json(draft.path / "verdict.json", forged)
    with pytest.raises(ArtifactError, match="cpu-int4 on this machine is fail by its checks"):
        run(config, **inputs)


def test_the_card_tells_what_was_made_and_not_what_it_was_held_against(
    tmp_path: Path, config: PublishConfig, store: LocalStore
) -> None:
    """Else the same release would be another one whenever the champion was looked up again."""
    inputs = write_inputs(tmp_path)
    run(config, **inputs)
    fetched = fetch_champion(
        FetchChampionConfig(store_uri=config.store_uri, channel="lab"), champion=tmp_path / "champion"
    )
    verdict = artifacts.read(inputs["verdict"])
    with artifacts.writing(tmp_path / "evaluation", kind="evaluation", step="evaluate", parents=[fetched]) as draft:
        draft.facts |= {"model_digest": verdict.facts["candidate_digest"], "accuracy": 0.123, "status": "measured"}
        artifacts.write_json(draft.path / "figures.json", draft.facts)
    benchmarks = [artifacts.read(tmp_path / "benchmark-0")]
    gate = GateConfig.create(verdict.config)
    parents = [*benchmarks, draft.sidecar]
    with artifacts.writing(inputs["verdict"], kind="verdict", step="gate", config=gate, parents=parents) as judged:
        judged.facts |= verdict.facts
        artifacts.write_json(judged.path / "verdict.json", judged.facts)
    digest = run(config, **inputs).facts["release_digest"]
    release = read_verified(store, Release, release_key(digest), digest)
    assert {"fetch_champion", "evaluate"} <= {ancestor.step for ancestor in release.lineage}
    (card,) = (store.read(blob_key(file.sha256), 1 << 20) for file in release.evidence if file.path == "README.md")
    assert b"fetch_champion" not in card
    assert b"0.123" not in card
