"""Fine-tune a model in this process, or in several that torchrun starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slmops.finetune.config import FinetuneConfig
from slmops.training.command import EPILOG, execute


def finetune(
    config: Annotated[Path, typer.Option(help="Settings as a JSON object; those left out have their defaults.")],
    train: Annotated[Path, typer.Option(help="Chat records to train on: a folder that prepare_data wrote.")],
    validation: Annotated[Path, typer.Option(help="Chat records to measure the loss on.")],
    base: Annotated[Path, typer.Option(help="The model to start from: a Hugging Face directory.")],
    model: Annotated[Path, typer.Option(help="Where the fine-tuned model goes; it appears whole or not at all.")],
) -> None:
    """Fine-tune a model on chat records."""
    from slmops.finetune import run

    paths = {"train": train, "validation": validation, "base": base, "model": model}
    execute(
        run.STEP,
        FinetuneConfig,
        config,
        lead=lambda settings: run.run(settings, **paths),
        take_part=lambda settings: run.take_part(settings, **paths),
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(epilog=EPILOG.replace("STEP", "finetune"))(finetune)
    app(prog_name="python -m slmops.finetune")
