"""Placement: on which node each step runs, with how much, for how long, and whether its result may be used again.

A pipeline calls `place_tasks` once, after its last task. A run on one machine ignores all of it but the retries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kfp import kubernetes
from kfp.dsl import PipelineTask, pipeline_context
from pydantic import Field

from slmops.config import TEACHER_API_KEY, Config
from slmops.models import FULL_PRECISION
from slmops.preflight.config import NO_ENDPOINT
from slmops.resume import MOUNTED_WORK_DIR
from slmops.step import TRANSIENT_RETRIES

RUN_AS = 10001
"""User and group of all images."""
NUM_RETRIES = 3
"""After errors that may pass; a step does it itself, because KFP would retry any failure."""

STORE_SECRET = "slmops-object-store"  # noqa: S105 - names of secrets, in the namespace that the pipeline runs in
STORE_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION")
ENDPOINT_SECRET = "slmops-teacher-endpoint"  # noqa: S105
ENDPOINT_KEY = "API_KEY"
WORK_CLAIM = "slmops-work"
"""The claim of a volume that keeps unfinished work, so that a step whose pod is gone goes on where it was."""


class Toleration(Config):
    """Which taint a pod may ignore."""

    key: str = Field(min_length=1)
    """The taint's key."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """`Exists`: whatever its value; `Equal`: with this value."""
    value: str | None = None
    """The taint's value, with `Equal`."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] = "NoSchedule"
    """The taint's effect."""


class GpuProfile(Config):
    """One kind of GPU node, and what a step takes of it."""

    resource_name: str = Field(default="nvidia.com/gpu", pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")
    """The extended resource that the device plugin offers."""
    count: int = Field(default=1, ge=1, le=64)
    """GPUs of one pod."""
    memory_gib: int = Field(default=16, ge=1, le=1024)
    """Memory of one GPU, as it reports it: somewhat less than its name says."""
    node_selector: dict[str, str] = Field(default={})
    """Labels that the node must have."""
    tolerations: list[Toleration] = Field(default=[Toleration(key="nvidia.com/gpu")])
    """Taints of such nodes."""
    cpu: int = Field(default=4, ge=1, le=512)
    """CPU cores of the pod."""
    host_memory_gib: int = Field(default=24, ge=1, le=4096)
    """Memory of the pod."""
    shared_memory_gib: int = Field(default=8, ge=1, le=1024)
    """Size of /dev/shm, which lies in the pod's memory; NCCL and data loaders need more than the default of 64 MiB."""
    queue_name: str = Field(default="slmops-gpu", pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    """Kueue's LocalQueue; a cluster without Kueue ignores it."""


class Placement(Config):
    """What differs from recipe to recipe; `STEPS` holds what does not."""

    gpu: GpuProfile | None = None
    """Where training, generation and evaluation in full precision run; without one, on CPUs."""
    max_shards_at_once: int = Field(default=4, ge=1, le=1000)
    """Shards of generation that run side by side, if the recipe has several."""
    max_measured_at_once: int = Field(default=1, ge=1, le=1000)
    """Variants that are measured side by side: on one machine they would disturb each other."""
    model_memory_gib: int = Field(default=8, ge=1, le=4096)
    """Memory of a pod that holds the recipe's largest model on CPUs."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a step takes, whatever the recipe."""

    cpu: int = 1
    """Cores."""
    memory_gib: int | None = None
    """Memory; None: as much as the recipe's models need."""
    timeout_h: float
    """The longest that it may run; waiting for a node does not count."""
    cached: bool = True
    """Whether a result may be used again: only if the inputs say all that it depends on."""
    gpu: bool = False
    """Whether it runs on the recipe's GPU, if there is one."""
    store: bool = False
    """Whether it reads or writes the object store itself."""


STEPS = {
    "preflight": Needs(memory_gib=2, timeout_h=1, cached=False, store=True),
    "prepare_data": Needs(cpu=2, memory_gib=8, timeout_h=4, store=True),
    "generate_responses": Needs(cpu=2, timeout_h=24, gpu=True),
    "merge_responses": Needs(memory_gib=2, timeout_h=4),
    "withhold_labels": Needs(memory_gib=2, timeout_h=1),
    "synthesize": Needs(cpu=2, timeout_h=24, gpu=True, store=True),
    "finetune": Needs(cpu=4, timeout_h=48, gpu=True),
    "distill": Needs(cpu=4, timeout_h=48, gpu=True),
    "prune": Needs(cpu=4, timeout_h=12, gpu=True),
    "quantize": Needs(cpu=4, timeout_h=12),
    "evaluate": Needs(cpu=4, timeout_h=12),
    "lm_evaluate": Needs(cpu=4, timeout_h=24),
    "compare": Needs(memory_gib=4, timeout_h=2),
    "benchmark": Needs(cpu=4, timeout_h=4),
    "gate": Needs(memory_gib=2, timeout_h=0.5),
    "fetch_champion": Needs(timeout_h=2, cached=False, store=True),
    "publish": Needs(memory_gib=2, timeout_h=2, cached=False, store=True),
}

KEEP_WORK = {"prepare_data", "generate_responses", "synthesize", "finetune", "distill", "quantize"}


def place_tasks(placement: Placement) -> None:
    """Place all tasks of the pipeline that is being defined."""
    for task in pipeline_context.Pipeline.get_default_pipeline().tasks.values():
        step = task.component_spec.name.replace("-", "_") if task.component_spec else ""
        if step in STEPS:
            place(task, step, placement)


def place(task: PipelineTask, step: str, placement: Placement) -> None:
    """Give one task what its step needs."""
    needs = STEPS[step]
    memory = f"{needs.memory_gib or placement.model_memory_gib}Gi"
    task.set_cpu_request(str(needs.cpu)).set_cpu_limit(str(needs.cpu))
    task.set_memory_request(memory).set_memory_limit(memory)
    task.set_caching_options(needs.cached)
    task.set_env_variable(TRANSIENT_RETRIES, str(NUM_RETRIES))
    kubernetes.set_timeout(task, round(needs.timeout_h * 3600))
    kubernetes.set_security_context(task, run_as_user=RUN_AS, run_as_group=RUN_AS, run_as_non_root=True)
    if needs.store or any(teacher.get("model_uri", "").startswith("s3:") for teacher in _more_teachers(task)):
        kubernetes.use_secret_as_env(task, STORE_SECRET, {key: key for key in STORE_KEYS})
    if _asks_endpoint(task):
        kubernetes.use_secret_as_env(task, ENDPOINT_SECRET, {ENDPOINT_KEY: TEACHER_API_KEY}, optional=True)
    if step in KEEP_WORK:
        kubernetes.mount_pvc(task, WORK_CLAIM, str(MOUNTED_WORK_DIR))
    if placement.gpu and _wants_gpu(task, step):
        on_gpu(task, placement.gpu)


def on_gpu(task: PipelineTask, profile: GpuProfile) -> PipelineTask:
    """Run `task` on the GPUs of `profile`, with its CPU and memory."""
    task.set_accelerator_type(profile.resource_name).set_accelerator_limit(profile.count)
    task.set_cpu_request(str(profile.cpu)).set_cpu_limit(str(profile.cpu))
    task.set_memory_request(f"{profile.host_memory_gib}Gi").set_memory_limit(f"{profile.host_memory_gib}Gi")
    for label, value in profile.node_selector.items():
        kubernetes.add_node_selector(task, label, value)
    for toleration in profile.tolerations:
        kubernetes.add_toleration(task, **toleration.model_dump())
    kubernetes.empty_dir_mount(
        task,
        "shared-memory",
        "/dev/shm",  # noqa: S108
        medium="Memory",
        size_limit=f"{profile.shared_memory_gib}Gi",
    )
    if task.inputs.get("num_nodes", 1) == 1:  # else a TrainJob gets GPUs and label, and the step's own pod neither
        kubernetes.add_pod_label(task, "kueue.x-k8s.io/queue-name", profile.queue_name)
    return task


def _asks_endpoint(task: PipelineTask) -> bool:
    endpoint = task.inputs.get("teacher_endpoint", NO_ENDPOINT)
    given = not isinstance(endpoint, str) or endpoint != NO_ENDPOINT  # else a run-time parameter
    return given or "endpoint" in _teacher_kinds(task)


def _teacher_kinds(task: PipelineTask) -> set[str]:
    first = {task.inputs["teacher_kind"]} if "teacher_kind" in task.inputs else set()
    return first | {teacher["kind"] for teacher in _more_teachers(task)}


def _more_teachers(task: PipelineTask) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = task.inputs.get("more_teachers", [])
    return found


def _wants_gpu(task: PipelineTask, step: str) -> bool:
    if step in ("evaluate", "lm_evaluate"):  # what is quantized for CPUs is judged on one
        variant = task.inputs.get("variant")
        return (
            isinstance(variant, str) and variant == FULL_PRECISION
        )  # in a loop it is a channel, which equals anything
    if step == "preflight":  # it waits in the queue for GPUs only if it is to check them
        return bool(task.inputs.get("min_gpus"))
    if step in ("generate_responses", "synthesize"):
        return bool(_teacher_kinds(task) - {"endpoint", "genai"})  # genai: what is quantized for CPUs
    return STEPS[step].gpu
