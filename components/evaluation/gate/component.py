"""KFP interface of gate."""

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
    candidate_evaluation: Input[Artifact],
    candidate_benchmark: Input[Artifact],
    verdict: Output[Artifact],
    report: Output[HTML],
    min_accuracy: float = 0.0,
    min_accuracy_kept: float = 0.92,
    min_latency_saved: float = 0.85,
    min_memory_saved: float = 0.9,
    min_size_saved: float = 0.75,
    min_rows: int = 100,
) -> None:
    """Judge a candidate beside its teacher and its full-precision student.

    Args:
        teacher_evaluation: The teacher's evaluation.
        teacher_benchmark: The teacher's benchmark.
        student_evaluation: The student's evaluation.
        student_benchmark: The student's benchmark.
        candidate_evaluation: The candidate's evaluation.
        candidate_benchmark: The candidate's benchmark.
        verdict: `pass`, `fail` or `not_run`, with every check.
        report: The verdict and its figures, for people.
    """
    from pathlib import Path

    from slmops.gate import config, run
    from slmops.step import step

    with step("gate"):
        sidecar = run.run(
            config.GateConfig.pick(locals()),
            teacher_evaluation=Path(teacher_evaluation.path),
            teacher_benchmark=Path(teacher_benchmark.path),
            student_evaluation=Path(student_evaluation.path),
            student_benchmark=Path(student_benchmark.path),
            candidate_evaluation=Path(candidate_evaluation.path),
            candidate_benchmark=Path(candidate_benchmark.path),
            verdict=Path(verdict.path),
            report=Path(report.path),
        )
        verdict.metadata.update(sidecar.metadata())
