"""The champion is what a node would run, byte for byte; where there is none, that is a result with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from slmops import artifacts
from slmops.artifacts import Sidecar
from slmops.demo.object_store import ObjectStore
from slmops.device_classes import this_architecture
from slmops.errors import CorruptDownload, StoreError, StoreUnavailable
from slmops.evaluate.config import EvaluateConfig
from slmops.evaluate.run import run as evaluate
from slmops.evaluate.run import write_confusion_matrix
from slmops.fetch_champion.config import CHAMPION, FetchChampionConfig
from slmops.fetch_champion.run import run
from slmops.publish.config import PublishConfig
from slmops.publish.run import run as publish
from slmops.quantize.config import QuantizeConfig
from slmops.quantize.run import run as quantize
from slmops.release.format import blob_key
from slmops.storage import open_store
from tests.judged import CANDIDATE, write_variants, write_verdict

FILES = {"genai_config.json": b'{"model": {}}', "model.onnx.data": b"w" * 99}


def released(store_uri: str, folder: Path, weights: bytes = b"w", classes: Mapping[str, str] | None = None) -> Sidecar:
    """A release of files that are no model, in channel `lab`."""
    variants = write_variants(folder / "variants", {CANDIDATE: FILES | {"model.onnx.data": weights}})
    verdict = write_verdict(folder / "verdict", variants, classes=classes)
    config = PublishConfig(store_uri=store_uri, channel="lab")
    return publish(config, variants=folder / "variants", verdict=verdict, release=folder / "release")


def fetched(store_uri: str, path: Path, channel: str = "lab") -> Sidecar:
    return run(FetchChampionConfig(store_uri=store_uri, channel=channel), champion=path)


def evaluated(champion: Path, rows: Path, path: Path) -> Sidecar:
    config = EvaluateConfig(variant=CHAMPION, max_new_tokens=16)
    return evaluate(config, model=champion, test=rows, evaluation=path)


def test_the_champion_answers_as_the_variant_that_was_published(
    tiny_teacher: Path, held_out_rows: Path, bucket: str, tmp_path: Path
) -> None:
    variants = quantize(QuantizeConfig(), model=tiny_teacher, variants=tmp_path / "variants")
    verdict = write_verdict(tmp_path / "verdict", variants)
    config = PublishConfig(store_uri=bucket)
    release = publish(config, variants=tmp_path / "variants", verdict=verdict, release=tmp_path / "release")
    sidecar = fetched(bucket, tmp_path / "champion", "default")

    assert sidecar == artifacts.expect(tmp_path / "champion", "variants")
    built = variants.facts["variants"][CANDIDATE]
    assert sidecar.facts["variants"][CHAMPION]["digest"] == built["digest"]
    assert (sidecar.facts["status"], sidecar.facts["released_as"]) == ("found", CANDIDATE)
    assert sidecar.facts["release"] == {"digest": release.facts["release_digest"], "sequence": 1}

    champion = evaluated(tmp_path / "champion", held_out_rows, tmp_path / "of-champion")
    config_of_variant = EvaluateConfig(variant=CANDIDATE, max_new_tokens=16)
    variant = evaluate(
        config_of_variant, model=tmp_path / "variants", test=held_out_rows, evaluation=tmp_path / "of-variant"
    )
    names = {"variant": CHAMPION, "released_as": CANDIDATE, "channel": "default"}
    assert champion.facts == variant.facts | names
    assert champion.facts["accuracy"] > 0.5


def test_a_store_without_a_release_is_the_normal_first_run(bucket: str, held_out_rows: Path, tmp_path: Path) -> None:
    sidecar = fetched(bucket, tmp_path / "champion")
    assert (sidecar.facts["status"], sidecar.facts["reason"]) == ("no_release", "no release in this channel yet")
    evaluation = evaluated(tmp_path / "champion", held_out_rows, tmp_path / "evaluation")
    assert evaluation.facts == {
        "variant": CHAMPION,
        "channel": "lab",
        "status": "not_run",
        "reason": "no release in this channel yet",
    }
    assert evaluation.parents == (sidecar.digest, artifacts.read(held_out_rows).digest)
    assert write_confusion_matrix(tmp_path / "evaluation", tmp_path / "confusion") == (["(other)"], [[0]])


def test_a_release_in_another_channel_is_none_here(bucket: str, tmp_path: Path) -> None:
    released(bucket, tmp_path)
    assert fetched(bucket, tmp_path / "champion", "field").facts["status"] == "no_release"
    assert fetched(bucket, tmp_path / "champion", "lab").facts["status"] == "found"


def test_a_release_that_no_machine_like_this_runs_says_what_it_lacks(
    bucket: str, held_out_rows: Path, tmp_path: Path
) -> None:
    elsewhere = "x86-avx2" if this_architecture() == "aarch64" else "arm64-pi5"
    released(bucket, tmp_path, classes={elsewhere: CANDIDATE})
    sidecar = fetched(bucket, tmp_path / "champion")
    assert (sidecar.facts["status"], sidecar.facts["variants"]) == ("cannot_run", {})
    assert f"{CANDIDATE}: needs " in sidecar.facts["reason"]
    assert f"this machine is {this_architecture()}" in sidecar.facts["reason"]
    evaluation = evaluated(tmp_path / "champion", held_out_rows, tmp_path / "evaluation")
    assert (evaluation.facts["status"], evaluation.facts["reason"]) == ("not_run", sidecar.facts["reason"])


def test_the_same_model_in_a_later_release_is_the_same_to_caches(bucket: str, tmp_path: Path) -> None:
    released(bucket, tmp_path / "a", b"a")
    first = fetched(bucket, tmp_path / "first")
    released(bucket, tmp_path / "b", b"b")
    other = fetched(bucket, tmp_path / "other")
    released(bucket, tmp_path / "again", b"a")
    again = fetched(bucket, tmp_path / "again" / "champion")
    assert first.facts["release"]["sequence"] < again.facts["release"]["sequence"]
    assert first.digest == again.digest != other.digest
    assert first.metadata() == again.metadata() != other.metadata()


def test_the_store_s_address_goes_no_further(bucket: str, tmp_path: Path) -> None:
    """A step whose inputs name s3:// gets the store's credentials, where each runs in a container of its own."""
    released(bucket, tmp_path)
    assert "s3://" not in str(fetched(bucket, tmp_path / "champion").metadata())


def test_a_damaged_release_is_an_error_and_leaves_nothing(bucket: str, s3: ObjectStore, tmp_path: Path) -> None:
    released(bucket, tmp_path, b"w" * 99)
    digest = next(
        file.sha256 for file in artifacts.list_files(tmp_path / "variants" / CANDIDATE) if "data" in file.path
    )
    s3.client().put_object(Bucket=bucket.removeprefix("s3://"), Key=blob_key(digest), Body=b"x" * 99)
    with pytest.raises(CorruptDownload, match="do not match their digest"):
        fetched(bucket, tmp_path / "champion")
    assert not list(tmp_path.glob("champion*"))


def test_a_release_that_the_metadata_does_not_name_is_an_error(bucket: str, s3: ObjectStore, tmp_path: Path) -> None:
    released(bucket, tmp_path)
    key = next(open_store(bucket).list("v1/channels/"))
    s3.client().put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=b"{}")
    with pytest.raises(CorruptDownload, match="does not match the metadata"):
        fetched(bucket, tmp_path / "champion")


def test_a_store_that_is_not_there_is_no_store_without_releases(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match="the bucket does not exist"):
        fetched("s3://no-such-bucket", tmp_path / "champion")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StoreUnavailable, match="does not answer"):
        fetched(bucket, tmp_path / "champion")
