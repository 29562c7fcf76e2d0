"""The beginning of every pipeline: check what it is about to use, prepare the data, import the base model."""

from typing import NamedTuple

from kfp import dsl
from kfp.dsl.pipeline_channel import PipelineArtifactChannel
from slmops_components.data_processing.prepare_data.component import prepare_data
from slmops_components.validation.preflight.component import preflight
from slmops_pipelines.recipes.sections import EdgeRecipe

from slmops.preflight.config import NO_ENDPOINT

TEMPLATES = ("prompt_template", "completion_template", "system_prompt")
"""Settings of prepare_data that are run-time parameters."""


class Intake(NamedTuple):
    """What a pipeline works on."""

    train: PipelineArtifactChannel
    validation: PipelineArtifactChannel
    test: PipelineArtifactChannel
    base: PipelineArtifactChannel
    safety: PipelineArtifactChannel | None
    """Rows whose answers count apart, if the recipe names some."""

    @property
    def judging(self) -> dict[str, PipelineArtifactChannel]:
        """The rows by which every model is judged."""
        return {"test": self.test} | ({} if self.safety is None else {"safety": self.safety})


def take_in(
    recipe: EdgeRecipe, *, data_uri, base_model_uri, store_uri, teacher_endpoint=NO_ENDPOINT, **templates
) -> Intake:
    """Nothing starts before `preflight` has passed; what it says of the data's version goes into the cache's key."""
    checked = preflight(
        data_uri=data_uri,
        base_model_uri=base_model_uri,
        store_uri=store_uri,
        teacher_endpoint=teacher_endpoint,
        **recipe.preflight.parameters(),
    )
    base = dsl.importer(artifact_uri=base_model_uri, artifact_class=dsl.Model, reimport=False)
    base.set_display_name("import-base-model").after(checked)
    data = prepare_data(
        source_uri=data_uri,
        source_version=checked.outputs["data_version"],
        tokenizer_uri=base_model_uri,
        **templates,
        **recipe.prepare_data.parameters(*TEMPLATES),
    )
    safety = None
    if recipe.safety:
        section = recipe.safety.parameters()
        prepared = prepare_data(system_prompt=templates["system_prompt"], split_by=recipe.safety.split_by, **section)
        prepared.set_display_name("prepare-safety").after(checked)
        safety = prepared.outputs["test"]
    return Intake(*(data.outputs[split] for split in ("train", "validation", "test")), base.output, safety)
