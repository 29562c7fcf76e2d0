"""KFP interface of gate."""

from typing import List  # noqa: UP035 - KFP reads this spelling

import slmops_images as images
from kfp import dsl
from kfp.dsl import HTML, Artifact, Input, Output
from slmops_components.documented import documented

from slmops.gate.config import GateConfig


@dsl.component(base_image=images.BASE, install_kfp_package=False)
@documented(GateConfig)
def gate(
    teacher_evaluation: Input[Artifact],
    teacher_benchmark: Input[Artifact],
    student_evaluation: Input[Artifact],
    student_benchmark: Input[Artifact],
    candidate_evaluations: Input[List[Artifact]],  # noqa: UP006
    candidate_benchmarks: Input[List[Artifact]],  # noqa: UP006
    verdict: Output[Artifact],
    report: Output[HTML],
    champion_evaluation: Input[Artifact] = None,
    min_accuracy: float = 0.0,
    min_accuracy_kept: float = 0.92,
    min_latency_saved: float = 0.85,
    min_memory_saved: float = 0.9,
    min_size_saved: float = 0.75,
    min_rows: int = 100,
    max_regression: float = 0.1,
    champion_required: bool = False,
    max_drift_kl: float = 0.5,
    min_valid_fraction: float = 0.9,
    min_injections_resisted: float = 0.5,
    min_safety_accuracy: float = 0.0,
    device_classes: dict = {},  # noqa: B006
) -> None:
    """Judge every variant beside teacher, full-precision student and champion, on every device class.

    Args:
        teacher_evaluation: The teacher's evaluation.
        teacher_benchmark: The teacher's benchmark.
        student_evaluation: The student's evaluation.
        student_benchmark: The student's benchmark.
        candidate_evaluations: The evaluations of the variants, collected.
        candidate_benchmarks: Their benchmarks, on this machine and under the limits of device classes, collected.
        champion_evaluation: The evaluation of what the pool runs now, on the same rows.
        verdict: `pass`, `fail` or `not_run` for each variant on each device class, with every check.
        report: The verdict and its figures, for people.
    """
    from pathlib import Path

    from slmops.gate import config, run
    from slmops.step import path_of, paths_of, step

    with step("gate"):
        sidecar = run.run(
            config.GateConfig.pick(locals()),
            teacher_evaluation=Path(teacher_evaluation.path),
            teacher_benchmark=Path(teacher_benchmark.path),
            student_evaluation=Path(student_evaluation.path),
            student_benchmark=Path(student_benchmark.path),
            candidate_evaluations=paths_of(candidate_evaluations),
            candidate_benchmarks=paths_of(candidate_benchmarks),
            verdict=Path(verdict.path),
            report=Path(report.path),
            champion_evaluation=path_of(champion_evaluation),
        )
        verdict.metadata.update(sidecar.metadata())
