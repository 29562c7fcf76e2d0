"""What `make compile` writes below manifests/ follows from its sources, and has not been changed by hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import slmops_images
import yaml

from slmops.kubeflow import manifests
from tests.manifests.rendering import CHECKOUT

GENERATED = [
    *CHECKOUT.glob("manifests/components/*images/kustomization.yaml"),
    *CHECKOUT.glob("manifests/edge/classes/*/kustomization.yaml"),
    CHECKOUT / "manifests" / "base" / "images.yaml",
]


def test_generated_components_are_up_to_date(tmp_path: Path) -> None:
    for source in ("images/digests.yaml", "manifests/edge/device-classes.yaml"):
        (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CHECKOUT / source, tmp_path / source)
    (tmp_path / "manifests" / "base").mkdir()

    manifests.write(tmp_path)

    written = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.glob("**/[ki]*.yaml")}
    assert written == {path.relative_to(CHECKOUT): path.read_text() for path in GENERATED}, "run: make compile"


def test_manifests_and_pipelines_name_the_same_images() -> None:
    recorded = yaml.safe_load((CHECKOUT / "images" / "digests.yaml").read_text())

    for entry in manifests.images(recorded)["images"]:
        end = f"@{entry['digest']}" if "digest" in entry else f":{entry['newTag']}"
        assert entry["newName"] + end == slmops_images.reference(Path(entry["name"]).name)


@pytest.mark.parametrize("missing", ["base", "edge"])
def test_one_image_without_a_digest_leaves_all_unpinned(missing: str) -> None:
    digests = {image: f"sha256:{index:064x}" for index, image in enumerate(("base", "train", "optimize", "edge"))}
    pinned = {"registry": "registry.example/team", "digests": digests}

    assert "resources" not in manifests.pinned_images(pinned)
    assert manifests.pinned_images({**pinned, "digests": digests | {missing: None}}) == {
        "resources": [manifests.NOT_PINNED]
    }
