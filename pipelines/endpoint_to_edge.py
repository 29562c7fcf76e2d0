"""A teacher behind an endpoint answers, a base model learns from its answers, is quantized and goes to the edge."""

from kfp import dsl
from kfp.dsl.graph_component import GraphComponent
from slmops_components.training.finetune.component import finetune, finetune_on_nodes
from slmops_pipelines.delivery import deliver, measure_full_precision
from slmops_pipelines.generation import generate
from slmops_pipelines.intake import take_in
from slmops_pipelines.placement import place_tasks
from slmops_pipelines.recipes.endpoint_to_edge import Recipe


def endpoint_to_edge(recipe: Recipe) -> GraphComponent:
    """The pipeline with `recipe` compiled into it."""
    templates = recipe.prepare_data

    @dsl.pipeline(name="endpoint-to-edge")
    def pipeline(
        data_uri: str,
        base_model_uri: str,
        endpoint_url: str,
        store_uri: str,
        channel: str = "default",
        prompt_template: str = templates.prompt_template,
        completion_template: str = templates.completion_template,
        system_prompt: str = templates.system_prompt,
    ) -> None:
        """Ask a teacher behind an endpoint, fine-tune a model on its answers, quantize, judge and publish it.

        Args:
            data_uri: A .jsonl, .json, .csv or .parquet file or a folder of them; hf://datasets/owner/name.
            base_model_uri: The student to start from: a Hugging Face directory.
            endpoint_url: The teacher: the base address of a server with the OpenAI chat API, such as https://host/v1.
            store_uri: Where releases go: s3://bucket/prefix, or a local folder.
            channel: The channel (a pool of edge nodes) that is pointed to the release.
            prompt_template: The user's turn, with column names in braces.
            completion_template: The assistant's turn, with column names in braces; the test rows are judged by it.
            system_prompt: The system turn of every conversation that has none; empty for no such turn.
        """
        data = take_in(
            recipe,
            data_uri=data_uri,
            base_model_uri=base_model_uri,
            store_uri=store_uri,
            teacher_endpoint=endpoint_url,
            prompt_template=prompt_template,
            completion_template=completion_template,
            system_prompt=system_prompt,
        )

        responses = generate(recipe.generate_responses, recipe.placement, prompts=data.train, endpoint_url=endpoint_url)
        train_student = finetune_on_nodes if recipe.finetune.num_nodes > 1 else finetune
        student = train_student(
            train=responses, validation=data.validation, base=data.base, **recipe.finetune.parameters()
        )
        student.set_display_name("finetune-student")
        model = student.outputs["model"]

        measured = measure_full_precision(recipe, "student", model=model, data=data)
        deliver(
            recipe,
            teacher=measured,  # an endpoint's memory and files cannot be measured
            student=measured,
            model=model,
            data=data,
            store_uri=store_uri,
            channel=channel,
        )
        place_tasks(recipe.placement)

    return pipeline
