"""A base model is fine-tuned, quantized and goes to the edge."""

from kfp import dsl
from kfp.dsl.graph_component import GraphComponent
from slmops_components.training.finetune.component import finetune, finetune_on_nodes
from slmops_pipelines.delivery import deliver, measure_full_precision
from slmops_pipelines.intake import take_in
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
            data_uri: A .jsonl, .json, .csv or .parquet file or a folder of them; hf://datasets/owner/name.
            base_model_uri: The model to start from: a Hugging Face directory.
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

        train_model = finetune_on_nodes if recipe.finetune.num_nodes > 1 else finetune
        finetuned = train_model(
            train=data.train, validation=data.validation, base=data.base, **recipe.finetune.parameters()
        )
        model = finetuned.outputs["model"]

        measured = measure_full_precision(recipe, "finetuned", model=model, data=data)
        deliver(
            recipe,
            teacher=measured,  # there is no larger model: the candidate is judged beside what it was quantized from
            student=measured,
            model=model,
            data=data,
            store_uri=store_uri,
            channel=channel,
        )
        place_tasks(recipe.placement)

    return pipeline
