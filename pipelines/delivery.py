"""The end of every pipeline that ships to the edge: quantize, measure, judge beside what runs there, publish."""

from typing import NamedTuple

import slmops_images as images
from kfp import dsl
from kfp.dsl import PipelineTask
from slmops_components.deployment.fetch_champion.component import fetch_champion
from slmops_components.deployment.publish.component import publish
from slmops_components.evaluation.benchmark.component import benchmark
from slmops_components.evaluation.evaluate.component import evaluate
from slmops_components.evaluation.gate.component import gate
from slmops_components.optimization.quantize.component import quantize
from slmops_components.training.prune.component import prune
from slmops_pipelines.intake import Intake
from slmops_pipelines.recipes.sections import EdgeRecipe

from slmops.fetch_champion.config import CHAMPION
from slmops.models import FULL_PRECISION


class Measured(NamedTuple):
    """The two tasks that say how good and how fast a model is."""

    evaluation: PipelineTask
    benchmark: PipelineTask


def measure_full_precision(recipe: EdgeRecipe, who: str, *, model, data: Intake) -> Measured:
    """Evaluate and benchmark a Hugging Face directory."""
    evaluation = evaluate(model=model, **data.judging, variant=FULL_PRECISION, **recipe.evaluate.parameters())
    evaluation.set_display_name(f"evaluate-{who}")
    figures = benchmark(model=model, prompts=data.test, variant=FULL_PRECISION, **recipe.benchmark.parameters())
    figures.set_display_name(f"benchmark-{who}")
    return Measured(evaluation, figures)


def deliver(
    recipe: EdgeRecipe,
    *,
    teacher: Measured,
    student: Measured,
    model,
    data: Intake,
    store_uri,
    channel,
    after: PipelineTask | None = None,
) -> None:
    """Prune and quantize the student `model`, judge each variant on each device class, and publish what passes.

    `publish` refuses any verdict but `pass`, which fails the pipeline; `gate` succeeds, so that its report shows.
    What is to be seen in any case comes before `publish`: `after`.
    """
    classes, names = recipe.devices.chosen, list(recipe.quantize.variants)
    if recipe.prune.cuts:
        model = prune(model=model, calibration=data.train, **recipe.prune.parameters()).outputs["pruned"]
    quantized = quantize(model=model, calibration=data.train, device_classes=classes, **recipe.quantize.parameters())
    variants = quantized.outputs["quantized"]
    at_once = recipe.placement.max_measured_at_once
    with dsl.ParallelFor(items=names, parallelism=at_once, name="variants") as variant:
        evaluation = evaluate(
            model=variants, **data.judging, reference=model, variant=variant, **recipe.evaluate.parameters()
        )
        evaluation.set_display_name("evaluate")
    with dsl.ParallelFor(items=recipe.devices.on(names), parallelism=at_once, name="devices") as item:
        figures = benchmark(
            model=variants,
            prompts=data.test,
            variant=item.variant,
            device_class=item.device_class,
            device_classes=classes,
            pool=item.pool,
            store_uri=store_uri if recipe.devices.pools else "",
            edge_image=images.EDGE if recipe.devices.pools else "",
            **recipe.benchmark.parameters(),
        )
        figures.set_display_name("benchmark")
    champion = _evaluate_champion(recipe, data, quantized, store_uri=store_uri, channel=channel)
    judged = gate(
        teacher_evaluation=teacher.evaluation.outputs["evaluation"],
        teacher_benchmark=teacher.benchmark.outputs["benchmark"],
        student_evaluation=student.evaluation.outputs["evaluation"],
        student_benchmark=student.benchmark.outputs["benchmark"],
        candidate_evaluations=dsl.Collected(evaluation.outputs["evaluation"]),
        candidate_benchmarks=dsl.Collected(figures.outputs["benchmark"]),
        champion_evaluation=champion.outputs["evaluation"],
        device_classes=classes,
        **recipe.gate.parameters(),
    )
    published = publish(variants=variants, verdict=judged.outputs["verdict"], store_uri=store_uri, channel=channel)
    if after:
        published.after(after)


def _evaluate_champion(
    recipe: EdgeRecipe, data: Intake, quantized: PipelineTask, *, store_uri, channel
) -> PipelineTask:
    """What the channel's nodes run now, by the same rows. It is looked up late, because a channel moves."""
    fetched = fetch_champion(store_uri=store_uri, channel=channel).after(quantized)
    model = fetched.outputs["champion"]
    evaluation = evaluate(model=model, **data.judging, variant=CHAMPION, **recipe.evaluate.parameters())
    return evaluation.set_display_name("evaluate-champion")
