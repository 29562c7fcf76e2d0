"""How a teacher's answers come about: in one task, or in shards side by side that are merged in order."""

from kfp import dsl
from kfp.dsl.pipeline_channel import PipelineArtifactChannel
from slmops_components.data_processing.generate_responses.component import generate_responses
from slmops_components.data_processing.merge_responses.component import merge_responses
from slmops_pipelines.placement import Placement
from slmops_pipelines.recipes.sections import GenerateSection


def generate(section: GenerateSection, placement: Placement, **inputs) -> PipelineArtifactChannel:
    """The answers to `prompts`, one of `inputs`.

    A shard is a task of its own: it is retried alone, and KFP's cache keeps the others.
    """
    settings = section.parameters(*inputs)
    if section.num_shards == 1:
        return generate_responses(**inputs, **settings).outputs["responses"]
    with dsl.ParallelFor(
        items=list(range(section.num_shards)), parallelism=placement.max_shards_at_once, name="shards"
    ) as shard:
        part = generate_responses(**inputs, **settings, shard=shard)
    merged = merge_responses(shards=dsl.Collected(part.outputs["responses"]))
    return merged.outputs["responses"]
