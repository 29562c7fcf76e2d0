"""The pipelines: compiled files up to date, few parameters, settings checked before anything runs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from slmops.errors import ConfigError
from slmops.kubeflow import registry
from slmops.kubeflow.compile import Compiled, prepare, with_changes
from slmops.kubeflow.components import component_folders
from slmops.kubeflow.generate import checkout, command_page, components_page, write_pipelines
from slmops.kubeflow.local import cache_key
from slmops.kubeflow.recipe import Recipe

RECIPES = [(name, recipe) for name in registry.names() for recipe in sorted(registry.find(name).recipes)]
COMPILED, MANIFESTS = checkout() / "pipelines" / "compiled", checkout() / "manifests" / "pipelines"
REQUIRED = {
    "data_uri": "rows.csv",
    "base_model_uri": "base",
    "student_model_uri": "student",
    "store_uri": "./store",
    "endpoint_url": "https://teacher/v1",
}


def _compiled(tmp_path: Path, pipeline: str, recipe: str = "default", *settings: str) -> Compiled:
    return prepare(pipeline, recipe, settings, tmp_path / "p.yaml")[0]


@pytest.mark.parametrize(("pipeline", "recipe"), RECIPES)
def test_every_recipe_compiles_to_settings_that_its_steps_take(tmp_path: Path, pipeline: str, recipe: str) -> None:
    compiled = _compiled(tmp_path, pipeline, recipe)
    assert len(compiled.parameters) <= 8
    assert all(parameter.get("description") for parameter in compiled.parameters.values())
    required = {name: REQUIRED[name] for name, p in compiled.parameters.items() if "defaultValue" not in p}
    compiled.check_settings(compiled.arguments(required))


def test_generated_files_are_up_to_date(tmp_path: Path) -> None:
    root = checkout()
    page = write_pipelines(tmp_path, tmp_path / "manifests")
    for written, stored in ((tmp_path, COMPILED), (tmp_path / "manifests", MANIFESTS)):
        files = sorted(path.name for path in stored.glob("*.yaml"))
        assert files == sorted(path.name for path in written.glob("*.yaml")), "run `make compile`"
        for name in files:
            assert (stored / name).read_text() == (written / name).read_text(), "run `make compile`"
    reference = root / "docs" / "reference"
    assert (reference / "pipelines.md").read_text() == page, "run `make compile`"
    assert (reference / "components.md").read_text() == components_page(component_folders()), "run `make compile`"
    assert (reference / "command.md").read_text() == command_page(), "run `make compile`"


@pytest.mark.parametrize("name", registry.names())
def test_the_version_of_a_manifest_is_its_content(name: str) -> None:
    pipeline, version = yaml.safe_load_all((MANIFESTS / f"{name}.yaml").read_text())
    compiled = Compiled(COMPILED / f"{name}.yaml")
    spec, platform = yaml.safe_load_all(compiled.path.read_text())
    digest = hashlib.sha256(compiled.path.read_bytes()).hexdigest()[:12]
    assert (pipeline["kind"], pipeline["metadata"]["name"]) == ("Pipeline", compiled.name)
    assert (version["kind"], version["metadata"]["name"]) == ("PipelineVersion", f"{compiled.name}-{digest}")
    assert version["spec"]["pipelineName"] == compiled.name
    assert version["spec"]["pipelineSpec"] == spec
    assert version["spec"]["platformSpec"] == platform


def test_compiling_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    one = _compiled(tmp_path, "distill_to_edge").path.read_bytes()
    assert _compiled(tmp_path, "distill_to_edge").path.read_bytes() == one


def test_what_distill_to_edge_runs(tmp_path: Path) -> None:
    compiled = _compiled(tmp_path, "distill_to_edge")
    tasks = {task.display_name: task for task in compiled.tasks.values()}
    assert tasks.keys() == {
        "preflight",
        "prepare-data",
        "import-base-model",
        "finetune-teacher",
        "generate-responses",
        "distill",
        *(f"{what}-{who}" for what in ("distill", "evaluate") for who in ("untrained", "labels-only")),
        "compare",
        "quantize",
        *(f"{what}-{who}" for what in ("evaluate", "benchmark") for who in ("teacher", "student")),
        "variants",
        "evaluate",
        "devices",
        "benchmark",
        "fetch-champion",
        "evaluate-champion",
        "gate",
        "publish",
    }
    always = {n for n, t in tasks.items() if not t.cached} - {"variants", "devices"}
    assert always == {"preflight", "fetch-champion", "publish"}
    assert tasks["evaluate-teacher"].settings["variant"] == "full_precision"
    assert tasks["evaluate"].rounds == ("cpu-int4",)
    assert tasks["benchmark"].rounds == (
        "cpu-int4",
        *(f"{device}-cpu-int4" for device in ("x86-avx2", "x86-avx512-vnni", "arm64-pi5", "arm64-server")),
    )
    assert compiled.cached_inputs() == {
        "data_uri",
        "base_model_uri",
        "prompt_template",
        "completion_template",
        "system_prompt",
    }


def test_the_gate_gets_each_figure_from_its_own_model(tmp_path: Path) -> None:
    spec = _compiled(tmp_path, "distill_to_edge").spec
    tasks: dict[str, Any] = spec["root"]["dag"]["tasks"]
    wires = tasks["gate"]["inputs"]["artifacts"]
    for name, wire in wires.items():
        who, what = name.split("_")
        producer = tasks[wire["taskOutputArtifact"]["producerTask"]]
        step = {"evaluation": "evaluate", "benchmark": "benchmark"}[what.removesuffix("s")]
        if who == "candidate":
            (inside,) = spec["components"][producer["componentRef"]["name"]]["dag"]["tasks"].values()
            assert inside["taskInfo"]["name"] == step
        else:
            assert producer["taskInfo"]["name"] == f"{step}-{who}"
    assert "champion_evaluation" in wires


@pytest.mark.parametrize("pipeline", registry.names())
def test_every_pipeline_holds_its_variants_against_what_the_channel_s_nodes_run(tmp_path: Path, pipeline: str) -> None:
    compiled = _compiled(tmp_path, pipeline)
    tasks = {task.display_name: task for task in compiled.tasks.values()}
    assert tasks["fetch-champion"].wired == {"store_uri": "store_uri", "channel": "channel"}
    assert tasks["evaluate-champion"].settings["variant"] == "champion"
    settings = tasks["evaluate-champion"].settings
    assert settings == tasks["evaluate"].settings | {"variant": "champion"}, "judged as the variants are"
    dag: dict[str, Any] = compiled.spec["root"]["dag"]["tasks"]
    assert dag["fetch-champion"]["dependentTasks"] == ["quantize"], "looked up late: a channel moves"
    (model,) = (t["inputs"]["artifacts"]["model"] for t in dag.values() if t["taskInfo"]["name"] == "evaluate-champion")
    assert model["taskOutputArtifact"] == {"outputArtifactKey": "champion", "producerTask": "fetch-champion"}


def test_safety_rows_go_to_all_that_is_judged_and_only_if_the_recipe_names_some(tmp_path: Path) -> None:
    def evaluations(*settings: str) -> dict[str, dict[str, Any]]:
        spec = _compiled(tmp_path, "distill_to_edge", "default", *settings).spec
        graphs = [spec["root"]["dag"], *(c["dag"] for c in spec["components"].values() if "dag" in c)]
        tasks = {t["taskInfo"]["name"]: t for graph in graphs for t in graph["tasks"].values()}
        assert ("prepare-safety" in tasks) == bool(settings)
        return {n: t["inputs"]["artifacts"] for n, t in tasks.items() if n.partition("-")[0] == "evaluate"}

    assert not any("safety" in inputs for inputs in evaluations().values())
    asked = evaluations("safety.source_uri=s3://data/safety.jsonl", "safety.prompt_template={question}")
    judged = {"evaluate", "evaluate-teacher", "evaluate-student", "evaluate-champion"}
    assert {name for name, inputs in asked.items() if "safety" in inputs} == judged
    prepared = asked["evaluate-teacher"]["safety"]["taskOutputArtifact"]
    assert prepared == {"outputArtifactKey": "test", "producerTask": "prepare-data-2"}


def test_all_safety_rows_are_kept_and_stand_under_the_run_s_system_prompt(tmp_path: Path) -> None:
    compiled = _compiled(tmp_path, "finetune_to_edge", "default", "safety.source_uri=s3://data/safety.jsonl")
    task = next(task for task in compiled.tasks.values() if task.display_name == "prepare-safety")
    assert (task.settings["split_by"], task.settings["source_uri"]) == ("none", "s3://data/safety.jsonl")
    assert task.wired == {"system_prompt": "system_prompt"}
    assert compiled.sources_of_recipe() == {f"{task.component}.source_uri": "s3://data/safety.jsonl"}


def test_a_changed_local_file_of_safety_rows_is_noticed(tmp_path: Path) -> None:
    rows = tmp_path / "safety.jsonl"
    rows.write_text("{}\n")
    compiled = _compiled(tmp_path, "finetune_to_edge", "default", f"safety.source_uri={rows}")
    before = cache_key(compiled, {}, {})
    assert cache_key(compiled, {}, {}) == before
    rows.write_text("{}\n{}\n")
    assert cache_key(compiled, {}, {}) != before


def test_the_recipe_gives_the_templates_that_a_run_may_change(tmp_path: Path) -> None:
    compiled = _compiled(tmp_path, "distill_to_edge", "default", "prepare_data.prompt_template=Say {text}")
    assert compiled.parameters["prompt_template"]["defaultValue"] == "Say {text}"


def test_changes_are_typed_and_checked_by_the_steps_own_settings() -> None:
    recipe = registry.find("distill_to_edge").recipe("default")
    changed: Any = with_changes(recipe, {"distill.num_epochs": "3", "distill.keep_layers": "[0, 2]"})
    assert changed.distill.num_epochs == 3.0
    assert changed.distill.keep_layers == [0, 2]
    with pytest.raises(ConfigError) as error:
        with_changes(recipe, {"distill.num_epochs": "-1", "gate.min_rows": "many"})
    assert "distill.num_epochs: input should be greater than or equal to 0, got '-1'" in str(error.value)
    assert "gate.min_rows: input should be a valid integer" in str(error.value)


@pytest.mark.parametrize(
    "field", ["prepare_data.source_uri", "evaluate.variant", "benchmark.variant", "safety.split_by"]
)
def test_what_the_pipeline_wires_cannot_be_set_in_a_recipe(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}: no such field of the recipe"):
        with_changes(registry.find("distill_to_edge").recipe("default"), {field: "x"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generate_responses.logits_top_k": "0"}, "needs generate_responses.logits_top_k of 1 or more, got 0"),
        ({"distill.temperature": "2"}, "distill.temperature must equal generate_responses.logits_temperature 1"),
    ],
)
def test_sections_that_do_not_fit_each_other_are_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_changes(registry.find("distill_to_edge").recipe("default"), changes)


def test_a_recipe_is_not_changed_in_place() -> None:
    recipe = registry.find("distill_to_edge").recipe("default")
    before = recipe.model_dump()
    recipe.changed({"distill": {"num_epochs": 9.0}})
    assert recipe.model_dump() == before
    assert isinstance(recipe, Recipe)


def test_a_misspelt_address_is_found_before_anything_runs(tmp_path: Path) -> None:
    compiled = _compiled(tmp_path, "distill_to_edge")
    wrong = {"data_uri": "rows.csv", "base_model_uri": "base", "store_uri": "s3:/bucket", "channel": "No_Such"}
    arguments = compiled.arguments(wrong)
    with pytest.raises(ConfigError) as error:
        compiled.check_settings(arguments)
    assert "store_uri" in str(error.value)
    assert "channel" in str(error.value)
