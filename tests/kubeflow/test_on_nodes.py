"""Training on several nodes as a pipeline sees it: which pod settings go to the step, and which to the TrainJob."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from slmops.kubeflow import compile as compiling
from slmops.kubeflow import registry

TO_THE_TRAINJOB_ALONE = {"RESOURCES", "KUBERNETES_AFFINITY", "KUBERNETES_NODE_SELECTOR", "KUBERNETES_TOLERATIONS"}
TO_BOTH = {"ENV", "KUBERNETES_VOLUMES"}


def compiled(tmp_path: Path, pipeline: str, **sections: Any) -> dict[str, Any]:
    """The components of a pipeline whose recipe is changed, by name."""
    found = registry.find(pipeline)
    compiling.write(found, found.recipe("default").changed(sections), tmp_path / "p.yaml")
    content: dict[str, Any] = next(yaml.safe_load_all((tmp_path / "p.yaml").read_text()))["components"]
    return content


@pytest.mark.parametrize(
    ("pipeline", "step"),
    [("distill_to_edge", "finetune"), ("distill_to_edge", "distill"), ("finetune_to_edge", "finetune")],
)
def test_a_recipe_with_several_nodes_forwards_the_tasks_settings_and_one_without_does_not(
    pipeline: str, step: str, tmp_path: Path
) -> None:
    alone = compiled(tmp_path, pipeline)[f"comp-{step}"]
    assert not alone.get("taskConfigPassthroughs"), "a step that trains itself keeps its GPU"
    several = compiled(tmp_path, pipeline, **{step: {"num_nodes": 2}})[f"comp-{step}"]
    forwarded = {each["field"]: each.get("applyToTask", False) for each in several["taskConfigPassthroughs"]}
    assert forwarded == dict.fromkeys(TO_THE_TRAINJOB_ALONE, False) | dict.fromkeys(TO_BOTH, True)
    assert several["inputDefinitions"] == alone["inputDefinitions"], "the same component otherwise"
