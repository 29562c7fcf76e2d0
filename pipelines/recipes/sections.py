"""Sections of the recipes whose Config has a field that the pipeline fills in."""

from typing import ClassVar, Self

from pydantic import model_validator

from slmops.benchmark.config import BenchmarkConfig
from slmops.evaluate.config import EvaluateConfig
from slmops.finetune.config import FinetuneConfig
from slmops.gate.config import GateConfig
from slmops.kubeflow.recipe import Recipe
from slmops.prepare_data.config import PrepareDataConfig
from slmops.quantize.config import QuantizeConfig, VariantName


class DataSection(PrepareDataConfig):
    """prepare_data; where the rows are is a run-time parameter."""

    source_uri: ClassVar[str]  # type: ignore[misc]  # a class variable is no field: a recipe cannot set it


class EvaluateSection(EvaluateConfig):
    """evaluate; the pipeline names the variant."""

    variant: ClassVar[str]  # type: ignore[misc]


class BenchmarkSection(BenchmarkConfig):
    """benchmark; the pipeline names the variant."""

    variant: ClassVar[str]  # type: ignore[misc]


class EdgeRecipe(Recipe):
    """What every pipeline that ends on the edge fixes."""

    prepare_data: DataSection = DataSection()
    """The templates are defaults of run-time parameters."""
    finetune: FinetuneConfig = FinetuneConfig()
    """How the base model learns the task."""
    quantize: QuantizeConfig = QuantizeConfig()
    """The variants to build."""
    candidate: VariantName = "cpu-int4"
    """The variant that is judged; it must be one of those that are built."""
    evaluate: EvaluateSection = EvaluateSection()
    """The same for every model that is compared."""
    benchmark: BenchmarkSection = BenchmarkSection()
    """The same for every model that is compared."""
    gate: GateConfig = GateConfig()
    """What the candidate must reach."""

    @model_validator(mode="after")
    def _candidate_is_built(self) -> Self:
        if self.candidate not in self.quantize.variants:
            raise ValueError(
                f"candidate must be one of quantize.variants {self.quantize.variants}, got {self.candidate}"
            )
        return self
