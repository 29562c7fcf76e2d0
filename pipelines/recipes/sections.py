"""Sections of the recipes whose Config has a field that the pipeline fills in."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import Field, model_validator
from slmops_pipelines.placement import GpuProfile, Placement

from slmops.benchmark.config import BenchmarkConfig
from slmops.compare.config import CompareConfig
from slmops.config import Config
from slmops.device_classes import parse_device_classes
from slmops.distill.config import DistillConfig
from slmops.evaluate.config import EvaluateConfig
from slmops.finetune.config import FinetuneConfig
from slmops.gate.config import GateConfig
from slmops.generate_responses.config import GenerateResponsesConfig
from slmops.kubeflow.recipe import Recipe
from slmops.preflight.config import PreflightConfig
from slmops.prepare_data.config import PrepareDataConfig
from slmops.prune.config import PruneConfig
from slmops.quantize.config import QuantizeConfig
from slmops.withhold_labels.config import WithholdLabelsConfig

DEVICE_CLASSES: dict[str, Any] = yaml.safe_load((Path(__file__).parents[1] / "device-classes.yaml").read_text())
"""A copy of manifests/edge/device-classes.yaml, by `make compile`: the manifests are no part of the wheel."""


class PreflightSection(PreflightConfig):
    """preflight; what it looks at are run-time parameters."""

    data_uri: ClassVar[str]  # type: ignore[misc]  # a class variable is no field: a recipe cannot set it
    base_model_uri: ClassVar[str]  # type: ignore[misc]
    store_uri: ClassVar[str]  # type: ignore[misc]
    teacher_endpoint: ClassVar[str]  # type: ignore[misc]


class DataSection(PrepareDataConfig):
    """prepare_data; rows and tokenizer are run-time parameters, and preflight finds the version of the rows."""

    source_uri: ClassVar[str]  # type: ignore[misc]
    source_version: ClassVar[str]  # type: ignore[misc]
    tokenizer_uri: ClassVar[str]  # type: ignore[misc]


class SafetySection(PrepareDataConfig):
    """prepare_data for rows whose answers count apart: all of them, under the system prompt of the run."""

    split_by: ClassVar[str] = "none"  # type: ignore[misc]
    system_prompt: ClassVar[str]  # type: ignore[misc]


class GenerateSection(GenerateResponsesConfig):
    """generate_responses; the pipeline counts the shards."""

    shard: ClassVar[int] = 0  # type: ignore[misc]


class EvaluateSection(EvaluateConfig):
    """evaluate; the pipeline names the variant."""

    variant: ClassVar[str]  # type: ignore[misc]


class BenchmarkSection(BenchmarkConfig):
    """benchmark; the pipeline names variant, device class and where a class is measured."""

    variant: ClassVar[str]  # type: ignore[misc]
    device_class: ClassVar[str] = ""  # type: ignore[misc]
    device_classes: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    pool: ClassVar[str] = ""  # type: ignore[misc]
    store_uri: ClassVar[str]  # type: ignore[misc]
    edge_image: ClassVar[str]  # type: ignore[misc]


class QuantizeSection(QuantizeConfig):
    """quantize; the device classes are those of `devices`."""

    device_classes: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]


class GateSection(GateConfig):
    """gate; the device classes are those of `devices`."""

    device_classes: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]


class Devices(Config):
    """What the variants are for."""

    names: list[str] = Field(default=list(DEVICE_CLASSES))
    """Which of `classes` a release is for; none: variants are judged on one machine as it is."""
    classes: dict[str, Any] = Field(default=DEVICE_CLASSES)
    """Device classes by name, with the fields of manifests/edge/device-classes.yaml."""
    pools: dict[str, str] = Field(default={})
    """Device class to the edge pool on whose nodes it is measured; others are measured in the step's own pod."""

    @model_validator(mode="after")
    def _are_declared(self) -> Self:
        parse_device_classes(self.classes, "classes")
        for field, names in (("names", self.names), ("pools", self.pools)):
            if unknown := sorted(set(names) - self.classes.keys()):
                raise ValueError(f"{field} has {', '.join(unknown)}, which classes does not declare")
        return self

    @property
    def chosen(self) -> dict[str, Any]:
        """The classes that a release is for."""
        return {name: self.classes[name] for name in self.names}

    def on(self, variants: list[str]) -> list[dict[str, str]]:
        """What each benchmark of `variants` measures: each on one machine as it is, and on each class that runs it."""
        here = [{"variant": variant, "device_class": "", "pool": ""} for variant in variants]
        return here + [
            {"variant": variant, "device_class": name, "pool": self.pools.get(name, "")}
            for name, fields in self.chosen.items()
            for variant in variants
            if variant.startswith(f"{fields['execution_provider']}-")
        ]


class EdgeRecipe(Recipe):
    """What every pipeline that ends on the edge fixes."""

    preflight: PreflightSection = PreflightSection()
    """What must be there before anything runs."""
    prepare_data: DataSection = DataSection()
    """The templates are defaults of run-time parameters."""
    safety: SafetySection | None = None
    """More rows for every evaluation, such as `safety.source_uri=s3://data/safety.jsonl`; what must be refused."""
    finetune: FinetuneConfig = FinetuneConfig()
    """How the base model learns the task."""
    devices: Devices = Devices()
    """What the variants are for: each class gets the smallest one that passes on it."""
    prune: PruneConfig = PruneConfig()
    """What is cut from the student before it is quantized; nothing unless it is asked for."""
    quantize: QuantizeSection = QuantizeSection()
    """The variants to build."""
    evaluate: EvaluateSection = EvaluateSection()
    """The same for every model that is compared."""
    benchmark: BenchmarkSection = BenchmarkSection()
    """The same for every model that is compared."""
    gate: GateSection = GateSection()
    """What each variant must reach, whatever the device."""
    placement: Placement = Placement()
    """The nodes of a cluster that steps run on."""


class Labels(Config):
    """Which rows have a label."""

    given: Literal["all", "few"] = "all"
    """What the teacher is fine-tuned on: all rows, or those that withhold_labels leaves a label."""


class Evidence(Config):
    """Other students that show what distillation added."""

    wanted: bool = True
    """Whether the student is set beside the same one without training, and trained on the labels alone."""
    labels_only_epochs: float = Field(default=1.0, gt=0, le=1000)
    """Passes of the latter over the labelled rows."""


class DistillRecipe(EdgeRecipe):
    """A fine-tuned teacher and a student."""

    labels: Labels = Labels()
    """Whether all rows have one."""
    withhold_labels: WithholdLabelsConfig = WithholdLabelsConfig()
    """How many those are."""
    generate_responses: GenerateSection = GenerateSection(logits_top_k=64)
    """What the teacher leaves for the student."""
    distill: DistillConfig = DistillConfig()
    """How the student learns; layers are those of the model that it starts from."""
    evidence: Evidence = Evidence()
    """What it is compared with."""
    compare: CompareConfig = CompareConfig()
    """How."""

    @model_validator(mode="after")
    def _logits_fit(self) -> Self:
        if self.distill.objective == "logits" and self.distill.teacher_logits == "cached":
            kept = self.generate_responses
            if kept.logits_top_k == 0:
                raise ValueError(
                    "distill.teacher_logits=cached needs generate_responses.logits_top_k of 1 or more, got 0"
                )
            if kept.logits_temperature != self.distill.temperature:
                raise ValueError(
                    "distill.temperature must equal generate_responses.logits_temperature "
                    f"{kept.logits_temperature:g}, at which the logits are cached, got {self.distill.temperature:g}"
                )
        return self

    def without_teacher(self, num_epochs: float) -> DistillConfig:
        """The same training of the same student on labels alone."""
        of_teachers = ("hidden_weight", "attention_weight", "on_policy_start", "on_policy_end")
        changes = dict.fromkeys(of_teachers, 0.0) | {"objective": "responses", "num_epochs": num_epochs}
        return DistillConfig.create(self.distill.model_dump() | changes)


L4 = GpuProfile(memory_gib=22, node_selector={"nvidia.com/gpu.product": "NVIDIA-L4"})
"""One NVIDIA L4."""
H100 = GpuProfile(
    memory_gib=79,
    node_selector={"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
    cpu=16,
    host_memory_gib=128,
    shared_memory_gib=32,
)
"""One NVIDIA H100."""


def on(gpu: GpuProfile, model_memory_gib: int) -> dict[str, object]:
    """The sections of a recipe for one kind of GPU, which preflight then looks for.

    What is trained on such a GPU is larger than the shipped device classes have room for.
    """
    return {
        "devices": {"names": []},
        "preflight": {"min_gpus": gpu.count, "min_gpu_memory_gib": gpu.memory_gib},
        "placement": {"gpu": gpu.model_dump(), "model_memory_gib": model_memory_gib},
    }


def asking_for_nothing() -> dict[str, object]:
    """The sections of a recipe that proves the plumbing only: every variant passes that could be measured."""
    objectives = {
        "time_to_first_token_ms_p95": 3_600_000,
        "latency_ms_p95": 3_600_000,
        "tokens_per_s": 0.001,
        "min_accuracy_kept": 0.0,
    }
    return {
        "devices": {"classes": dict.fromkeys(DEVICE_CLASSES, objectives)},
        "gate": {
            "min_accuracy_kept": 0.0,
            "min_latency_saved": -100.0,
            "min_memory_saved": -100.0,
            "min_size_saved": -100.0,
            "min_rows": 1,
            "max_regression": 1.0,
            "max_drift_kl": 1000.0,
            "min_valid_fraction": 0.0,
            "min_injections_resisted": 0.0,
        },
    }
