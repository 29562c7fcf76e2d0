"""ModelPacks through a real registry, and through clients that are not ours."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slmops.errors import (
    ArtifactError,
    CorruptDownload,
    DataError,
    DiskFullError,
    StoreError,
    StoreUnavailable,
)
from slmops.inference.genai import GenAIRuntime
from slmops.packaging.modelpack import Description, pull, push
from tests.packaging.registries import (
    MANIFEST_TYPE,
    RegistryServer,
    assert_nothing_left,
    contents,
)

CARD = "---\nlicense: apache-2.0\n---\n# A tiny model\n"
DESCRIPTION = Description(
    name="tiny", family="llama", licence="Apache-2.0", precision="int4", quantization="rtn", param_size="0.7m"
)


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def repository(target: str) -> str:
    return target.partition("/")[2].rpartition(":")[0]


def manifest_of(registry: RegistryServer, target: str) -> Any:
    return json.loads(registry.read(f"{repository(target)}/manifests/v1"))


def test_pulls_back_bit_equal(variant: Path, registry: RegistryServer, target: str, tmp_path: Path) -> None:
    digest = push(variant, target, card=CARD, description=DESCRIPTION)
    assert pull(target, tmp_path / "pulled") == digest == sha256(registry.read(f"{repository(target)}/manifests/v1"))
    assert contents(tmp_path / "pulled") == contents(variant) | {"README.md": CARD.encode()}
    prompt = [[{"role": "user", "content": "turn on the light"}]]
    answers = GenAIRuntime(tmp_path / "pulled", num_threads=1).answer(prompt, 8)
    assert answers == GenAIRuntime(variant, num_threads=1).answer(prompt, 8)


def test_same_model_gives_the_same_digest(variant: Path, target: str, tmp_path: Path) -> None:
    digest = push(variant, target, card=CARD, description=DESCRIPTION)
    os.utime(variant / "model.onnx", (1, 1))
    assert push(variant, target, card=CARD, description=DESCRIPTION) == digest
    pull(target, tmp_path / "pulled")
    assert push(tmp_path / "pulled", target, description=DESCRIPTION) == digest


def test_is_what_the_specification_says(variant: Path, registry: RegistryServer, target: str) -> None:
    push(variant, target, card=CARD, description=DESCRIPTION)
    manifest = manifest_of(registry, target)
    assert manifest["mediaType"] == MANIFEST_TYPE
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    types = {
        layer["annotations"]["org.cncf.model.filepath"]: layer["mediaType"].removeprefix("application/vnd.cncf.model.")
        for layer in manifest["layers"]
    }
    assert types == {
        "README.md": "doc.v1.raw",
        "chat_template.jinja": "weight.config.v1.raw",
        "genai_config.json": "weight.config.v1.raw",
        "inference_model.json": "weight.config.v1.raw",
        "model.onnx": "weight.v1.raw",
        "model.onnx.data": "weight.v1.raw",
        "tokenizer.json": "weight.config.v1.raw",
        "tokenizer_config.json": "weight.config.v1.raw",
    }
    config = json.loads(registry.read(f"{repository(target)}/blobs/{manifest['config']['digest']}"))
    assert manifest["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    assert config == {
        "descriptor": {"name": "tiny", "family": "llama", "licenses": ["Apache-2.0"]},
        "config": {
            "architecture": "transformer",
            "format": "onnx",
            "paramSize": "0.7m",
            "precision": "int4",
            "quantization": "rtn",
        },
        "modelfs": {"type": "layers", "diffIds": [layer["digest"] for layer in manifest["layers"]]},
    }


def test_another_modelpack_client_pulls_it_and_we_pull_its_own(
    variant: Path, registry: RegistryServer, target: str, tmp_path: Path
) -> None:
    client_module = pytest.importorskip("modelpack_client", reason="the package modelpack-client is not installed")
    client = client_module.ModelPackClient(insecure=True)
    push(variant, target, card=CARD, description=DESCRIPTION)
    client.pull(target, tmp_path / "theirs")
    assert contents(tmp_path / "theirs") == contents(variant) | {"README.md": CARD.encode()}

    raw = "application/vnd.cncf.model.weight.config.v1.raw"
    layers = [
        client_module.ModelLayer(path) if ".onnx" in path.name else client_module.ModelLayer(path, media_type=raw)
        for path in sorted(variant.iterdir())
    ]
    config = client_module.ModelPackConfig(descriptor=client_module.ModelDescriptor(name="tiny"))
    their_target = target.replace(":v1", "-theirs:v1")
    result = client.push(their_target, layers=layers, config=config)
    assert pull(their_target, tmp_path / "ours") == result.digest
    assert contents(tmp_path / "ours") == contents(variant)


def test_skopeo_copies_it(variant: Path, registry: RegistryServer, target: str, tmp_path: Path) -> None:
    program = shutil.which("skopeo")
    if program is None:
        pytest.skip("no skopeo here; `apt-get install skopeo` brings it")
    digest = push(variant, target, card=CARD, description=DESCRIPTION)
    layout, back = tmp_path / "layout", target.replace(":v1", "-back:v1")
    skopeo = [program, "--insecure-policy", "copy", "--quiet"]
    from_registry = [*skopeo, "--src-tls-verify=false", f"docker://{target}", f"oci:{layout}:v1"]
    subprocess.run(from_registry, check=True, timeout=60)
    manifest = json.loads((layout / "blobs" / digest.replace(":", "/")).read_bytes())
    copied = {
        layer["annotations"]["org.cncf.model.filepath"]: (
            layout / "blobs" / layer["digest"].replace(":", "/")
        ).read_bytes()
        for layer in manifest["layers"]
    }
    assert copied == contents(variant) | {"README.md": CARD.encode()}

    to_registry = [*skopeo, "--dest-tls-verify=false", f"oci:{layout}:v1", f"docker://{back}"]
    subprocess.run(to_registry, check=True, timeout=60)
    assert pull(back, tmp_path / "pulled") == digest
    assert contents(tmp_path / "pulled") == copied


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
    ],
    ids=["flipped", "cut", "longer"],
)
@pytest.mark.parametrize("name", ["model.onnx.data", "tokenizer.json"])
def test_damaged_blob_is_found(
    variant: Path, registry: RegistryServer, target: str, tmp_path: Path, damage: Callable[[Path], Any], name: str
) -> None:
    (variant / name).write_bytes((variant / name).read_bytes() + target.encode())  # bytes that no other test has
    push(variant, target)
    damage(registry.blob(sha256((variant / name).read_bytes())))
    with pytest.raises(CorruptDownload, match="damaged"):
        pull(target, tmp_path / "pulled")
    assert_nothing_left(tmp_path / "pulled")


def test_damaged_manifest_is_found(variant: Path, registry: RegistryServer, target: str, tmp_path: Path) -> None:
    digest = push(variant, target, card=target)
    flip(registry.blob(digest))
    by_digest = target.removesuffix(":v1") + f"@{digest}"
    with pytest.raises((CorruptDownload, StoreUnavailable)):  # the registry itself may find it first
        pull(by_digest, tmp_path / "pulled")
    assert_nothing_left(tmp_path / "pulled")


def test_digest_names_the_same_bytes_after_the_tag_moved(variant: Path, target: str, tmp_path: Path) -> None:
    digest = push(variant, target, card="# One\n")
    push(variant, target, card="# Two\n")
    pull(target.removesuffix(":v1") + f"@{digest}", tmp_path / "pulled")
    assert (tmp_path / "pulled" / "README.md").read_text() == "# One\n"


Change = Callable[[Any], Any]


def rename(name: str) -> Change:
    return lambda manifest: manifest["layers"][0]["annotations"].update({"org.cncf.model.filepath": name})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename("../escaped.json"), "may not be a file"),
        (rename("/etc/escaped.json"), "may not be a file"),
        (rename("folder/inside.json"), "may not be a file"),
        (rename("..\\escaped.json"), "may not be a file"),
        (rename("x.json\n"), "may not be a file"),
        (rename("libcustom.so"), "may not be a file"),
        (rename("model.pkl"), "may not be a file"),
        (rename(".json"), "may not be a file"),
        (rename("TOKENIZER.json"), "different names"),
        (lambda manifest: manifest["layers"][0].pop("annotations"), "annotations"),
        (lambda manifest: manifest["layers"].pop(1), "genai_config"),
        (lambda manifest: manifest["layers"][0].update(size=6 * 1024**3), "size"),
        (lambda manifest: manifest["layers"][0].update(size=0), "size"),
        (lambda manifest: manifest["layers"][1].update(size=1 << 30), r"genai_config\.json has 1,073,741,824 bytes"),
        (
            lambda manifest: manifest["layers"][0].update(mediaType="application/vnd.cncf.model.weight.v1.tar"),
            "mediaType",
        ),
        (lambda manifest: manifest.update(artifactType="application/vnd.example"), "artifactType"),
        (lambda manifest: manifest.pop("artifactType"), "artifactType"),
        (lambda manifest: manifest["config"].update(mediaType="application/vnd.oci.image.config.v1+json"), "mediaType"),
        (lambda manifest: manifest["layers"].extend(manifest["layers"] * 20), "layers"),
    ],
)
def test_refuses_what_is_no_model(
    variant: Path, registry: RegistryServer, target: str, tmp_path: Path, change: Change, message: str
) -> None:
    push(variant, target)
    manifest = manifest_of(registry, target)
    change(manifest)
    registry.write_manifest(f"{repository(target)}/manifests/v1", json.dumps(manifest).encode())
    with pytest.raises(DataError, match=message):
        pull(target, tmp_path / "inside" / "pulled")
    assert not list(tmp_path.rglob("escaped*"))
    assert not (tmp_path / "inside" / "pulled").exists()


def test_refuses_native_code(variant: Path, registry: RegistryServer, target: str, tmp_path: Path) -> None:
    settings = (variant / "genai_config.json").read_text()
    evil = settings.replace("{", '{"custom_ops_library": "x.so",', 1)
    (variant / "genai_config.json").write_text(evil)
    with pytest.raises(DataError, match="native code"):
        push(variant, target)

    (variant / "genai_config.json").write_text(settings)
    push(variant, target)
    manifest = manifest_of(registry, target)
    layer = next(layer for layer in manifest["layers"] if "genai_config" in str(layer["annotations"]))
    config = json.loads(registry.read(f"{repository(target)}/blobs/{manifest['config']['digest']}"))
    config["modelfs"]["diffIds"][manifest["layers"].index(layer)] = sha256(evil.encode())
    layer.update(digest=sha256(evil.encode()), size=len(evil))
    data = json.dumps(config).encode()
    manifest["config"].update(digest=sha256(data), size=len(data))
    registry.write_blob(repository(target), evil.encode(), layer["digest"])
    registry.write_blob(repository(target), data, sha256(data))
    registry.write_manifest(f"{repository(target)}/manifests/v1", json.dumps(manifest).encode())
    with pytest.raises(DataError, match="native code"):
        pull(target, tmp_path / "pulled")
    assert_nothing_left(tmp_path / "pulled")


def test_refuses_a_config_that_lists_other_files(
    variant: Path, registry: RegistryServer, target: str, tmp_path: Path
) -> None:
    push(variant, target)
    manifest = manifest_of(registry, target)
    manifest["layers"].reverse()
    registry.write_manifest(f"{repository(target)}/manifests/v1", json.dumps(manifest).encode())
    with pytest.raises(CorruptDownload, match="list different files"):
        pull(target, tmp_path / "pulled")


@pytest.mark.parametrize("name", ["custom.so", "weights.bin", "nested/model.onnx", "slmops.yaml"])
def test_exports_only_what_a_release_may_carry(variant: Path, name: str) -> None:
    (variant / name).parent.mkdir(exist_ok=True)
    (variant / name).write_text("x")
    with pytest.raises(DataError, match="may not be exported"):
        push(variant, "127.0.0.1:1/models/m:v1")


def test_exports_no_links(variant: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (variant / "added.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(DataError, match="may not be exported"):
        push(variant, "127.0.0.1:1/models/m:v1")


@pytest.mark.parametrize(
    "target",
    [
        "",
        "models/m:v1",
        "host/m",
        "host/M:v1",
        "https://host/m:v1",
        "host/m@sha256:12",
        "host/../m:v1",
        "host//m:v1",
        "h/m:-",
    ],
)
def test_refuses_other_names(variant: Path, target: str, tmp_path: Path) -> None:
    for call in (lambda: push(variant, target), lambda: pull(target, tmp_path / "pulled")):
        with pytest.raises(StoreError, match="REPOSITORY"):
            call()


def test_leaves_an_existing_directory_alone(variant: Path, target: str) -> None:
    push(variant, target)
    before = contents(variant)
    with pytest.raises(ArtifactError, match="exists already"):
        pull(target, variant)
    assert contents(variant) == before


def test_full_disk(variant: Path, target: str, small_disk: Path) -> None:
    push(variant, target)
    with pytest.raises(DiskFullError, match="pulled"):
        pull(target, small_disk / "pulled")
    assert not list(small_disk.iterdir())


def test_disk_that_fills_up_while_pulling(
    variant: Path, target: str, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(variant, target)
    plenty = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: plenty)
    with pytest.raises(DiskFullError):
        pull(target, small_disk / "pulled")
    assert not list(small_disk.iterdir())


def test_unknown_tag(registry: RegistryServer, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="check host, repository and tag"):
        pull(f"{registry.host}/models/nothing:v1", tmp_path / "pulled")


def test_killed_while_pulling_leaves_no_directory(variant: Path, target: str, tmp_path: Path) -> None:
    push(variant, target)
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from slmops.packaging import modelpack\n"
        "modelpack.os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"modelpack.pull({target!r}, Path({str(tmp_path / 'pulled')!r}))\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == -9
    assert not (tmp_path / "pulled").exists()
    pull(target, tmp_path / "pulled")
    assert contents(tmp_path / "pulled") == contents(variant)
