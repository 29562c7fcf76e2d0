"""A base model becomes a teacher, a smaller checkpoint learns from it, and the quantized student goes to the edge."""

from kfp import dsl
from kfp.dsl.graph_component import GraphComponent
from slmops_pipelines.delivery import deliver
from slmops_pipelines.intake import take_in
from slmops_pipelines.placement import place_tasks
from slmops_pipelines.recipes.distill_pair_to_edge import Recipe
from slmops_pipelines.teaching import teach


def distill_pair_to_edge(recipe: Recipe) -> GraphComponent:
    """The pipeline with `recipe` compiled into it."""
    templates = recipe.prepare_data

    @dsl.pipeline(name="distill-pair-to-edge")
    def pipeline(
        data_uri: str,
        base_model_uri: str,
        student_model_uri: str,
        store_uri: str,
        channel: str = "default",
        prompt_template: str = templates.prompt_template,
        completion_template: str = templates.completion_template,
        system_prompt: str = templates.system_prompt,
    ) -> None:
        """Fine-tune a teacher, distill another model from it, quantize, judge and publish that.

        Args:
            data_uri: A .jsonl, .json, .csv or .parquet file or a folder of them; hf://datasets/owner/name.
            base_model_uri: The model that the teacher starts from: a Hugging Face directory.
            student_model_uri: The model that the student starts from: a Hugging Face directory.
            store_uri: Where releases go: s3://bucket/prefix, or a local folder.
            channel: The channel (a pool of edge nodes) that is pointed to the release.
            prompt_template: The user's turn, with column names in braces.
            completion_template: The assistant's turn, with column names in braces.
            system_prompt: The system turn of every conversation that has none; empty for no such turn.
        """
        data = take_in(
            recipe,
            data_uri=data_uri,
            base_model_uri=base_model_uri,
            store_uri=store_uri,
            prompt_template=prompt_template,
            completion_template=completion_template,
            system_prompt=system_prompt,
        )
        checkpoint = dsl.importer(artifact_uri=student_model_uri, artifact_class=dsl.Model, reimport=False)
        checkpoint.set_display_name("import-student-model")
        taught = teach(recipe, data, checkpoint.output)
        deliver(
            recipe,
            teacher=taught.teacher,
            student=taught.student,
            model=taught.model,
            data=data,
            store_uri=store_uri,
            channel=channel,
            after=taught.evidence,
        )
        place_tasks(recipe.placement)

    return pipeline
