"""Distill a student in this process, or in several that torchrun starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slmops.distill.config import DistillConfig
from slmops.training.command import EPILOG, execute


def distill(
    config: Annotated[Path, typer.Option(help="Settings as a JSON object; those left out have their defaults.")],
    responses: Annotated[Path, typer.Option(help="The teacher's answers: a folder that generate_responses wrote.")],
    validation: Annotated[Path, typer.Option(help="Chat records to measure the loss on.")],
    teacher: Annotated[Path, typer.Option(help="The model that gave the answers: a Hugging Face directory.")],
    student: Annotated[Path, typer.Option(help="The model to start from: a Hugging Face directory.")],
    model: Annotated[Path, typer.Option(help="Where the trained student goes; it appears whole or not at all.")],
    second_teacher: Annotated[Path | None, typer.Option(help="Another teacher, for teacher_logits=online.")] = None,
    third_teacher: Annotated[Path | None, typer.Option(help="A third one.")] = None,
) -> None:
    """Train a student on a teacher's responses."""
    from slmops.distill import run

    paths = {"responses": responses, "validation": validation, "teacher": teacher, "student": student, "model": model}
    others = {"second_teacher": second_teacher, "third_teacher": third_teacher}
    paths |= {name: path for name, path in others.items() if path}
    execute(
        run.STEP,
        DistillConfig,
        config,
        lead=lambda settings: run.run(settings, **paths),
        take_part=lambda settings: run.take_part(settings, **paths),
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(epilog=EPILOG.replace("STEP", "distill"))(distill)
    app(prog_name="python -m slmops.distill")
