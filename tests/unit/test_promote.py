"""Promoting copies a release from one store to another, verified, and moves the channel there."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slmops.cli import app
from slmops.demo.object_store import ObjectStore
from slmops.errors import CorruptDownload, DataError, StoreError, UserError
from slmops.publish.config import PublishConfig
from slmops.publish.run import run
from slmops.release.format import GENAI_CONFIG, release_key
from slmops.release.metadata import point_channel, read_channel
from slmops.release.promote import promote
from slmops.storage import LocalStore, Store, open_store
from tests.judged import write_variants, write_verdict

FILES = {GENAI_CONFIG: b'{"model": {"context_length": 64}}', "model.onnx": b"graph", "model.onnx.data": b"w" * 9_000}


def publish(uri: str, base: Path, *, weights: bytes = FILES["model.onnx.data"]) -> str:
    """Publish made-up files to channel `lab` of the store at `uri`; returns the release's digest."""
    variants = write_variants(base / "variants", {"cpu-int4": FILES | {"model.onnx.data": weights}})
    write_verdict(base / "verdict", variants)
    config = PublishConfig(store_uri=uri, channel="lab")
    sidecar = run(config, variants=base / "variants", verdict=base / "verdict", release=base / "release")
    return str(sidecar.facts["release_digest"])


@pytest.fixture
def staging(tmp_path: Path) -> LocalStore:
    publish(str(tmp_path / "staging"), tmp_path / "inputs")
    return LocalStore(tmp_path / "staging")


@pytest.fixture
def releases(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "releases")


def _objects(store: Store) -> dict[str, bytes]:
    return {
        key: store.read(key, 1 << 20) for key in store.list("v1/") if "/metadata/" not in key and "probe" not in key
    }


def test_the_destination_holds_what_the_source_holds(staging: LocalStore, releases: LocalStore) -> None:
    result = promote(staging, releases, "lab")
    assert result is not None
    assert (result.changed, result.channel.sequence) == (True, 1)
    assert read_channel(releases, "lab") == read_channel(staging, "lab")
    assert _objects(releases) == _objects(staging)


def test_again_copies_nothing(staging: LocalStore, releases: LocalStore) -> None:
    promote(staging, releases, "lab")
    result = promote(staging, releases, "lab")
    assert result is not None
    assert (result.changed, result.bytes_copied) == (False, 0)


def test_the_next_release_brings_only_what_is_new(staging: LocalStore, releases: LocalStore, tmp_path: Path) -> None:
    promote(staging, releases, "lab")
    digest = publish(staging.uri, tmp_path / "next", weights=b"x" * 9_000)
    result = promote(staging, releases, "lab")
    assert result is not None
    assert (result.channel.release_digest, result.channel.sequence) == (digest, 2)
    assert 9_000 < result.bytes_copied < 9_000 + 5_000


def test_other_channels_of_the_destination_stay(staging: LocalStore, releases: LocalStore, tmp_path: Path) -> None:
    config = PublishConfig(store_uri=releases.uri, channel="field")
    inputs = tmp_path / "inputs"
    run(config, variants=inputs / "variants", verdict=inputs / "verdict", release=tmp_path / "other")
    field = read_channel(releases, "field")
    promote(staging, releases, "lab")
    assert read_channel(releases, "field") == field


def test_an_empty_channel_is_no_error(staging: LocalStore, releases: LocalStore) -> None:
    assert promote(staging, releases, "berlin") is None
    assert not releases.root.exists()


def test_one_store_is_not_two(staging: LocalStore) -> None:
    with pytest.raises(UserError, match="are both"):
        promote(staging, staging, "lab")


def _blob(store: LocalStore, content: bytes) -> Path:
    return next(store.root / key for key in store.list("v1/blobs/") if store.read(key, 1 << 20) == content)


def test_a_changed_blob_moves_nothing(staging: LocalStore, releases: LocalStore) -> None:
    _blob(staging, FILES["model.onnx.data"]).write_bytes(b"W" + FILES["model.onnx.data"][1:])
    with pytest.raises(CorruptDownload, match=r"model\.onnx\.data"):
        promote(staging, releases, "lab")
    assert read_channel(releases, "lab") is None


def test_a_release_without_a_pass_is_refused(staging: LocalStore, releases: LocalStore) -> None:
    written = next(iter(staging.list("v1/releases/")))
    data = staging.read(written, 1 << 20).replace(b'"verdict":"pass"', b'"verdict":"fail"')
    digest = hashlib.sha256(data).hexdigest()
    staging.create(release_key(digest), data)
    point_channel(staging, "lab", digest)
    with pytest.raises(DataError, match="verdict"):
        promote(staging, releases, "lab")
    assert read_channel(releases, "lab") is None


def test_native_code_is_refused(tmp_path: Path, releases: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FILES, GENAI_CONFIG, b'{"model": {"custom_ops_library": "evil.so"}}')
    monkeypatch.setattr("slmops.release.build.refuse_native_code", lambda *_: None)
    publish(str(tmp_path / "staging"), tmp_path / "inputs")
    with pytest.raises(DataError, match="custom_ops_library"):
        promote(LocalStore(tmp_path / "staging"), releases, "lab")
    assert read_channel(releases, "lab") is None


def test_the_command_takes_each_stores_credentials_from_its_profile(
    s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = s3.environment()
    staging, releases = s3.make_bucket(), s3.make_bucket()
    with monkeypatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        publish(staging, tmp_path / "inputs")
    keys = environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    for name in environment:
        monkeypatch.delenv(name, raising=False)
    endpoint = f"endpoint_url = {environment['AWS_ENDPOINT_URL']}\nregion = us-east-1\n"
    (tmp_path / "config").write_text(f"[profile staging]\n{endpoint}[profile releases]\n{endpoint}")
    right = "aws_access_key_id = {}\naws_secret_access_key = {}\n".format(*keys)
    wrong = right.replace(keys[1], "wrong")
    command = ["promote", "--from", staging, "--to", releases, "--channel", "lab", "--from-profile", "staging"]
    command += ["--to-profile", "releases"]

    (tmp_path / "credentials").write_text(f"[staging]\n{right}[releases]\n{wrong}")
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, StoreError)
    assert "refuses these credentials" in str(refused.exception)

    (tmp_path / "credentials").write_text(f"[staging]\n{right}[releases]\n{right}")
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.exception
    assert done.output.startswith("lab: now points to ")
    assert read_channel(open_store(releases, "releases"), "lab") == read_channel(open_store(staging, "staging"), "lab")


def test_a_profile_that_does_not_exist_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "absent"))
    with pytest.raises(StoreError, match="nobody"):
        open_store("s3://bucket", "nobody")
