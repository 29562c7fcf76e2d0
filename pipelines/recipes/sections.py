"""Sections of the recipes whose Config has a field that the pipeline fills in."""

from typing import ClassVar

from slmops_pipelines.placement import GpuProfile, Placement

from slmops.benchmark.config import BenchmarkConfig
from slmops.evaluate.config import EvaluateConfig
from slmops.finetune.config import FinetuneConfig
from slmops.gate.config import GateConfig
from slmops.generate_responses.config import GenerateResponsesConfig
from slmops.kubeflow.recipe import Recipe
from slmops.preflight.config import PreflightConfig
from slmops.prepare_data.config import PrepareDataConfig
from slmops.quantize.config import QuantizeConfig


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


class GenerateSection(GenerateResponsesConfig):
    """generate_responses; the pipeline counts the shards."""

    shard: ClassVar[int] = 0  # type: ignore[misc]


class EvaluateSection(EvaluateConfig):
    """evaluate; the pipeline names the variant."""

    variant: ClassVar[str]  # type: ignore[misc]


class BenchmarkSection(BenchmarkConfig):
    """benchmark; the pipeline names the variant."""

    variant: ClassVar[str]  # type: ignore[misc]


class EdgeRecipe(Recipe):
    """What every pipeline that ends on the edge fixes."""

    preflight: PreflightSection = PreflightSection()
    """What must be there before anything runs."""
    prepare_data: DataSection = DataSection()
    """The templates are defaults of run-time parameters."""
    finetune: FinetuneConfig = FinetuneConfig()
    """How the base model learns the task."""
    quantize: QuantizeConfig = QuantizeConfig()
    """The variants to build; the first is the candidate, which is judged and published."""
    evaluate: EvaluateSection = EvaluateSection()
    """The same for every model that is compared."""
    benchmark: BenchmarkSection = BenchmarkSection()
    """The same for every model that is compared."""
    gate: GateConfig = GateConfig()
    """What the candidate must reach."""
    placement: Placement = Placement()
    """The nodes of a cluster that steps run on."""


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
    """The sections of a recipe for one kind of GPU, which preflight then looks for."""
    return {
        "preflight": {"min_gpus": gpu.count, "min_gpu_memory_gib": gpu.memory_gib},
        "placement": {"gpu": gpu.model_dump(), "model_memory_gib": model_memory_gib},
    }
