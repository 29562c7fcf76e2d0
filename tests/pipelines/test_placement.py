"""Placement: every step of every recipe has what a cluster asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from slmops_pipelines.placement import NUM_RETRIES, STEPS, GpuProfile
from slmops_pipelines.recipes.sections import H100, L4

from slmops.kubeflow import registry
from slmops.kubeflow.compile import prepare
from slmops.kubeflow.components import component_folders

RECIPES = [(name, recipe) for name in registry.names() for recipe in sorted(registry.find(name).recipes)]
GPU_STEPS = {"finetune", "distill", "generate_responses"}


class Placed:
    """A compiled pipeline by tasks: container and Kubernetes settings of each."""

    def __init__(self, pipeline: str, recipe: str, tmp_path: Path, *settings: str) -> None:
        compiled, _ = prepare(pipeline, recipe, settings, tmp_path / "p.yaml")
        spec, *platform = yaml.safe_load_all(compiled.path.read_text())
        executors = spec["deploymentSpec"]["executors"]
        kubernetes = platform[0]["platforms"]["kubernetes"]["deploymentSpec"]["executors"] if platform else {}
        self.tasks: dict[str, dict[str, Any]] = {}
        self.steps: dict[str, str] = {}
        for task in compiled.tasks.values():
            if step := compiled.step_of(task):
                label = f"exec-{task.component}"
                self.tasks[task.display_name] = {
                    "container": executors[label]["container"],
                    "kubernetes": kubernetes.get(label, {}),
                    "cached": task.cached,
                }
                self.steps[task.display_name] = step


@pytest.mark.parametrize(("pipeline", "recipe"), RECIPES)
def test_every_step_is_placed(tmp_path: Path, pipeline: str, recipe: str) -> None:
    placed = Placed(pipeline, recipe, tmp_path)
    for name, task in placed.tasks.items():
        resources = task["container"]["resources"]
        for kind in ("resourceCpuRequest", "resourceCpuLimit", "resourceMemoryRequest", "resourceMemoryLimit"):
            assert resources[kind], f"{name} has no {kind}"
        assert {"name": "SLMOPS_TRANSIENT_RETRIES", "value": str(NUM_RETRIES)} in task["container"]["env"]
        assert int(task["kubernetes"]["activeDeadlineSeconds"]) >= 1800
        assert task["kubernetes"]["securityContext"] == {
            "runAsUser": "10001",
            "runAsGroup": "10001",
            "runAsNonRoot": True,
        }
        assert task["cached"] == STEPS[placed.steps[name]].cached
        assert "retryPolicy" not in task, "KFP would retry what a user must fix"


def test_what_is_never_cached() -> None:
    assert {step for step, needs in STEPS.items() if not needs.cached} == {"preflight", "fetch_champion", "publish"}


def test_every_component_has_its_needs_and_says_where_it_runs() -> None:
    for folder in component_folders():
        place = "GPU" if STEPS[folder.step].gpu else "CPU"
        assert folder.metadata["place"] == place, f"{folder.step}: metadata.yaml and placement differ"


def test_a_gpu_step_gets_all_of_its_profile(tmp_path: Path) -> None:
    placed = Placed("distill_to_edge", "smollm2_distill_1xl4", tmp_path)
    on_gpu = {name for name, task in placed.tasks.items() if "accelerator" in task["container"]["resources"]}
    assert {placed.steps[name] for name in on_gpu} == GPU_STEPS | {"evaluate", "preflight"}
    assert "evaluate" not in on_gpu, "what is quantized for CPUs is judged on one"
    student = placed.tasks["distill"]
    resources = student["container"]["resources"]
    assert resources["accelerator"]["resourceType"] == "nvidia.com/gpu"
    assert resources["accelerator"]["resourceCount"] == "1"
    assert resources["resourceMemoryRequest"] == resources["resourceMemoryLimit"] == f"{L4.host_memory_gib}Gi"
    kubernetes = student["kubernetes"]
    assert kubernetes["nodeSelector"]["labels"] == {"nvidia.com/gpu.product": "NVIDIA-L4"}
    assert kubernetes["tolerations"] == [{"effect": "NoSchedule", "key": "nvidia.com/gpu", "operator": "Exists"}]
    assert kubernetes["emptyDirMounts"] == [
        {"medium": "Memory", "mountPath": "/dev/shm", "sizeLimit": "8Gi", "volumeName": "shared-memory"}  # noqa: S108
    ]
    assert kubernetes["podMetadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "slmops-gpu"}
    assert kubernetes["pvcMount"][0]["mountPath"] == "/var/lib/slmops/work"


def test_a_step_that_waits_for_several_nodes_does_not_queue_itself(tmp_path: Path) -> None:
    placed = Placed("distill_to_edge", "smollm2_distill_1xl4", tmp_path, "distill.num_nodes=4")
    student, teacher = placed.tasks["distill"], placed.tasks["finetune-teacher"]
    assert "podMetadata" not in student["kubernetes"]
    assert "podMetadata" in teacher["kubernetes"]
    assert student["kubernetes"]["pvcMount"], "what step and nodes exchange"
    assert student["container"]["resources"]["accelerator"]["resourceCount"] == "1", "of each node"


def test_another_accelerator_is_a_setting(tmp_path: Path) -> None:
    settings = (
        "placement.gpu.resource_name=amd.com/gpu",
        "placement.gpu.count=4",
        'placement.gpu.tolerations=[{"key": "pool", "operator": "Equal", "value": "mi300", "effect": "NoExecute"}]',
        'placement.gpu.node_selector={"pool": "mi300"}',
    )
    task = Placed("finetune_to_edge", "phi4_mini_qlora_1xh100", tmp_path, *settings).tasks["finetune"]
    assert task["container"]["resources"]["accelerator"]["resourceType"] == "amd.com/gpu"
    assert task["kubernetes"]["tolerations"] == [
        {"effect": "NoExecute", "key": "pool", "operator": "Equal", "value": "mi300"}
    ]
    assert task["kubernetes"]["nodeSelector"]["labels"]["pool"] == "mi300"


def test_a_teacher_behind_an_endpoint_takes_no_gpu(tmp_path: Path) -> None:
    task = Placed("endpoint_to_edge", "deepseek_v3_to_phi4_mini", tmp_path).tasks["generate-responses"]
    assert "accelerator" not in task["container"]["resources"]
    (secret,) = task["kubernetes"]["secretAsEnv"]
    assert secret["keyToEnv"] == [{"envVar": "SLMOPS_TEACHER_API_KEY", "secretKey": "API_KEY"}]


def test_preflight_tries_the_endpoint_with_its_key_and_a_gpu_only_if_asked(tmp_path: Path) -> None:
    secrets = Placed("endpoint_to_edge", "default", tmp_path).tasks["preflight"]["kubernetes"]["secretAsEnv"]
    assert {secret["secretName"] for secret in secrets} == {"slmops-object-store", "slmops-teacher-endpoint"}
    without = Placed("distill_to_edge", "default", tmp_path).tasks["preflight"]
    assert [secret["secretName"] for secret in without["kubernetes"]["secretAsEnv"]] == ["slmops-object-store"]
    assert "accelerator" not in without["container"]["resources"]
    asked = Placed("distill_to_edge", "smollm2_distill_1xl4", tmp_path, "preflight.min_gpus=1").tasks["preflight"]
    assert asked["container"]["resources"]["accelerator"]["resourceCount"] == "1"


def test_only_steps_that_use_the_store_get_its_keys(tmp_path: Path) -> None:
    placed = Placed("distill_to_edge", "default", tmp_path)
    with_keys = {placed.steps[name] for name, task in placed.tasks.items() if "secretAsEnv" in task["kubernetes"]}
    assert with_keys == {step for step, needs in STEPS.items() if needs.store} & set(placed.steps.values())
    assert "fetch_champion" in with_keys
    assert "evaluate" not in with_keys


def test_the_champion_is_chosen_by_a_pod_like_the_one_that_evaluates_it(tmp_path: Path) -> None:
    tasks = Placed("distill_to_edge", "smollm2_distill_1xl4", tmp_path).tasks
    chooses, evaluates = (tasks[name]["container"] for name in ("fetch-champion", "evaluate-champion"))
    assert chooses["image"] == evaluates["image"], "the same runtime"
    assert chooses["resources"]["resourceMemoryLimit"] == evaluates["resources"]["resourceMemoryLimit"]


def test_without_a_gpu_everything_runs_on_cpus(tmp_path: Path) -> None:
    placed = Placed("distill_to_edge", "demo", tmp_path)
    assert not any("accelerator" in task["container"]["resources"] for task in placed.tasks.values())


def test_profiles_are_values() -> None:
    assert H100.memory_gib > L4.memory_gib
    assert GpuProfile().count == 1
