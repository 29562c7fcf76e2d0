"""A base model becomes a teacher, the teacher makes a student, and the quantized student goes to the edge."""

from kfp import dsl
from kfp.dsl.graph_component import GraphComponent
from slmops_components.training.distill.component import distill, distill_on_nodes
from slmops_components.training.finetune.component import finetune, finetune_on_nodes
from slmops_pipelines.delivery import deliver, measure_full_precision
from slmops_pipelines.generation import generate
from slmops_pipelines.intake import take_in
from slmops_pipelines.placement import place_tasks
from slmops_pipelines.recipes.distill_to_edge import Recipe


def distill_to_edge(recipe: Recipe) -> GraphComponent:
    """The pipeline with `recipe` compiled into it."""
    templates = recipe.prepare_data

    @dsl.pipeline(name="distill-to-edge")
    def pipeline(
        data_uri: str,
        base_model_uri: str,
        store_uri: str,
        channel: str = "default",
        prompt_template: str = templates.prompt_template,
        completion_template: str = templates.completion_template,
        system_prompt: str = templates.system_prompt,
    ) -> None:
        """Fine-tune a teacher, distill a student from it, quantize, judge and publish it.

        Args:
            data_uri: A .jsonl, .json, .csv or .parquet file or a folder of them; hf://datasets/owner/name.
            base_model_uri: The model that the teacher starts from: a Hugging Face directory.
            store_uri: Where releases go: s3://bucket/prefix, or a local folder.
            channel: The channel (a pool of edge nodes) that is pointed to the release.
            prompt_template: The user's turn, with column names in braces.
            completion_template: The assistant's turn, with column names in braces.
            system_prompt: The system turn of every conversation that has none; empty for no such turn.
        """
        train, validation, test, base = take_in(
            recipe,
            data_uri=data_uri,
            base_model_uri=base_model_uri,
            store_uri=store_uri,
            prompt_template=prompt_template,
            completion_template=completion_template,
            system_prompt=system_prompt,
        )

        train_teacher = finetune_on_nodes if recipe.finetune.num_nodes > 1 else finetune
        teacher = train_teacher(train=train, validation=validation, base=base, **recipe.finetune.parameters())
        teacher.set_display_name("finetune-teacher")
        teacher_model = teacher.outputs["model"]
        responses = generate(recipe.generate_responses, recipe.placement, prompts=train, teacher=teacher_model)
        train_student = distill_on_nodes if recipe.distill.num_nodes > 1 else distill
        student = train_student(
            responses=responses,
            validation=validation,
            teacher=teacher_model,
            student=teacher_model,
            **recipe.distill.parameters(),
        )
        student_model = student.outputs["model"]

        deliver(
            recipe,
            teacher=measure_full_precision(recipe, "teacher", model=teacher_model, test=test),
            student=measure_full_precision(recipe, "student", model=student_model, test=test),
            model=student_model,
            test=test,
            store_uri=store_uri,
            channel=channel,
        )
        place_tasks(recipe.placement)

    return pipeline
