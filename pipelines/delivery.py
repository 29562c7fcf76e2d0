"""The end of every pipeline that ships to the edge: quantize, measure, judge, publish."""

from typing import NamedTuple

from kfp.dsl import PipelineTask
from slmops_components.deployment.publish.component import publish
from slmops_components.evaluation.benchmark.component import benchmark
from slmops_components.evaluation.evaluate.component import evaluate
from slmops_components.evaluation.gate.component import gate
from slmops_components.optimization.quantize.component import quantize
from slmops_pipelines.recipes.sections import EdgeRecipe

from slmops.models import FULL_PRECISION


class Measured(NamedTuple):
    """The two tasks that say how good and how fast a model is."""

    evaluation: PipelineTask
    benchmark: PipelineTask


def measure(recipe: EdgeRecipe, who: str, *, model, variant: str, test) -> Measured:
    """Evaluate and benchmark one model."""
    evaluation = evaluate(model=model, test=test, variant=variant, **recipe.evaluate.parameters())
    evaluation.set_display_name(f"evaluate-{who}")
    figures = benchmark(model=model, prompts=test, variant=variant, **recipe.benchmark.parameters())
    figures.set_display_name(f"benchmark-{who}")
    return Measured(evaluation, figures)


def measure_full_precision(recipe: EdgeRecipe, who: str, *, model, test) -> Measured:
    """`measure` a Hugging Face directory."""
    return measure(recipe, who, model=model, variant=FULL_PRECISION, test=test)


def deliver(
    recipe: EdgeRecipe,
    *,
    teacher: Measured,
    student: Measured,
    model,
    test,
    store_uri,
    channel,
    after: PipelineTask | None = None,
) -> None:
    """Quantize the student `model`, judge the candidate beside `teacher` and `student`, and publish what passes.

    `publish` refuses any verdict but `pass`, which fails the pipeline; `gate` succeeds, so that its report shows.
    What is to be seen in any case comes before `publish`: `after`.
    """
    quantized = quantize(model=model, **recipe.quantize.parameters())
    variants = quantized.outputs["quantized"]
    candidate = measure(recipe, "candidate", model=variants, variant=recipe.quantize.variants[0], test=test)
    judged = gate(
        teacher_evaluation=teacher.evaluation.outputs["evaluation"],
        teacher_benchmark=teacher.benchmark.outputs["benchmark"],
        student_evaluation=student.evaluation.outputs["evaluation"],
        student_benchmark=student.benchmark.outputs["benchmark"],
        candidate_evaluation=candidate.evaluation.outputs["evaluation"],
        candidate_benchmark=candidate.benchmark.outputs["benchmark"],
        **recipe.gate.parameters(),
    )
    published = publish(variants=variants, verdict=judged.outputs["verdict"], store_uri=store_uri, channel=channel)
    if after:
        published.after(after)
