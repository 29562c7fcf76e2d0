"""A base model is fine-tuned, quantized and goes to the edge."""

from kfp import dsl
from kfp.dsl.graph_component import GraphComponent
from slmops_components.data_processing.prepare_data.component import prepare_data
from slmops_components.training.finetune.component import finetune, finetune_on_nodes
from slmops_components.validation.preflight.component import preflight
from slmops_pipelines.delivery import deliver, measure_full_precision
from slmops_pipelines.placement import place_tasks
from slmops_pipelines.recipes.finetune_to_edge import Recipe


def finetune_to_edge(recipe: Recipe) -> GraphComponent:
    """The pipeline with `recipe` compiled into it."""
    templates = recipe.prepare_data

    @dsl.pipeline(name="finetune-to-edge")
    def pipeline(
        data_uri: str,
        base_model_uri: str,
        store_uri: str,
        channel: str = "default",
        prompt_template: str = templates.prompt_template,
        completion_template: str = templates.completion_template,
        system_prompt: str = templates.system_prompt,
    ) -> None:
        """Fine-tune a model, quantize, judge and publish it.

        Args:
            data_uri: A .jsonl, .csv or .parquet file: a local path or s3://bucket/key.
            base_model_uri: The model to start from: a Hugging Face directory.
            store_uri: Where releases go: s3://bucket/prefix, or a local folder.
            channel: The channel (a pool of edge nodes) that is pointed to the release.
            prompt_template: The user's turn, with column names in braces.
            completion_template: The assistant's turn, with column names in braces.
            system_prompt: The system turn of every conversation that has none; empty for no such turn.
        """
        checked = preflight(
            data_uri=data_uri,
            base_model_uri=base_model_uri,
            store_uri=store_uri,
            **recipe.preflight.parameters(),
        )
        data = prepare_data(
            source_uri=data_uri,
            source_version=checked.outputs["data_version"],
            prompt_template=prompt_template,
            completion_template=completion_template,
            system_prompt=system_prompt,
            **recipe.prepare_data.parameters("prompt_template", "completion_template", "system_prompt"),
        )
        train, validation, test = (data.outputs[split] for split in ("train", "validation", "test"))
        base = dsl.importer(artifact_uri=base_model_uri, artifact_class=dsl.Model, reimport=False)
        base.set_display_name("import-base-model").after(checked)

        train_model = finetune_on_nodes if recipe.finetune.num_nodes > 1 else finetune
        finetuned = train_model(train=train, validation=validation, base=base.output, **recipe.finetune.parameters())
        model = finetuned.outputs["model"]

        measured = measure_full_precision(recipe, "finetuned", model=model, test=test)
        deliver(
            recipe,
            teacher=measured,  # there is no larger model: the candidate is judged beside what it was quantized from
            student=measured,
            model=model,
            test=test,
            store_uri=store_uri,
            channel=channel,
        )
        place_tasks(recipe.placement)

    return pipeline
