"""The middle of a pipeline that distills: a teacher is fine-tuned and answers, and a student learns from it."""

from typing import NamedTuple

from kfp.dsl import PipelineTask
from kfp.dsl.pipeline_channel import PipelineArtifactChannel
from slmops_components.data_processing.withhold_labels.component import withhold_labels
from slmops_components.evaluation.compare.component import compare
from slmops_components.evaluation.evaluate.component import evaluate
from slmops_components.training.distill.component import distill, distill_on_nodes
from slmops_components.training.finetune.component import finetune, finetune_on_nodes
from slmops_pipelines.delivery import Measured, measure_full_precision
from slmops_pipelines.generation import generate
from slmops_pipelines.intake import Intake
from slmops_pipelines.recipes.sections import DistillRecipe

from slmops.models import FULL_PRECISION


class Taught(NamedTuple):
    """A student, and how good and fast it and its teacher are."""

    model: PipelineArtifactChannel
    student: Measured
    teacher: Measured
    evidence: PipelineTask | None
    """The comparison with other students, if it is wanted."""


def teach(recipe: DistillRecipe, data: Intake, checkpoint: PipelineArtifactChannel | None = None) -> Taught:
    """Fine-tune the base model, let it answer, and distill a student that starts as `checkpoint`, or as the teacher."""
    labelled, prompts = data.train, data.train
    if recipe.labels.given == "few":
        rows = withhold_labels(rows=data.train, **recipe.withhold_labels.parameters())
        labelled, prompts = rows.outputs["labelled"], rows.outputs["prompts"]

    train_teacher = finetune_on_nodes if recipe.finetune.num_nodes > 1 else finetune
    finetuned = train_teacher(
        train=labelled, validation=data.validation, base=data.base, **recipe.finetune.parameters()
    )
    finetuned.set_display_name("finetune-teacher")
    teacher = finetuned.outputs["model"]
    start = checkpoint or teacher
    responses = generate(recipe.generate_responses, recipe.placement, prompts=prompts, teacher=teacher)
    inputs = {"validation": data.validation, "teacher": teacher, "student": start}
    train_student = distill_on_nodes if recipe.distill.num_nodes > 1 else distill
    student = train_student(responses=responses, **inputs, **recipe.distill.parameters())

    measured = measure_full_precision(recipe, "student", model=student.outputs["model"], data=data)
    of_teacher = measure_full_precision(recipe, "teacher", model=teacher, data=data)
    evidence = None
    if recipe.evidence.wanted:
        evidence = _prove(recipe, data, labelled, inputs, student.outputs["model"], measured, of_teacher)
    return Taught(student.outputs["model"], measured, of_teacher, evidence)


def _prove(
    recipe: DistillRecipe, data: Intake, labelled, inputs, model, student: Measured, teacher: Measured
) -> PipelineTask:
    """Set the student beside the same student without training, and trained on the labels alone."""
    others = {}
    for name, num_epochs in (("untrained", 0.0), ("labels_only", recipe.evidence.labels_only_epochs)):
        trained = distill(responses=labelled, **inputs, **recipe.without_teacher(num_epochs).parameters())
        trained.set_display_name(f"distill-{name.replace('_', '-')}")
        evaluation = evaluate(
            model=trained.outputs["model"], test=data.test, variant=FULL_PRECISION, **recipe.evaluate.parameters()
        )
        evaluation.set_display_name(f"evaluate-{name.replace('_', '-')}")
        others[name] = evaluation.outputs["evaluation"]
    return compare(
        teacher=teacher.evaluation.outputs["evaluation"],
        distilled=student.evaluation.outputs["evaluation"],
        **others,
        model=model,
        **recipe.compare.parameters(),
    )
