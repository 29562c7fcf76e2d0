"""`python -m slmops.finetune` and `python -m slmops.distill`: a training step as a command, alone or under torchrun."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from slmops.config import Config
from slmops.errors import ConfigError, explain_os_errors
from slmops.progress import log
from slmops.step import TRANSIENT_RETRIES, step
from slmops.training import ranks

C = TypeVar("C", bound=Config)

EPILOG = (
    "In one process: `python -m slmops.STEP ...`. In two on this machine: `torchrun --nproc-per-node=2 -m slmops.STEP "
    "...`; the rows of each optimizer step are split between them, and the result is the same. On several machines, "
    "torchrun also takes --nnodes, --node-rank, --master-addr and --master-port, and all paths lie on a volume that "
    "all machines see. Unfinished work is kept beside the model, or in $SLMOPS_WORK_DIR: the same command goes on from "
    "there. Exit code 2: the message says what to change; 75: trying again may help."
)


def execute(
    name: str, config_type: type[C], config: Path, lead: Callable[[C], object], take_part: Callable[[C], None]
) -> None:
    """Run the step in this process: `lead` in the first of the processes that torchrun started, `take_part` in others.

    Only the first one logs; an error is shown by each that has it.
    """
    if ranks.size() > 1:
        os.environ.pop(TRANSIENT_RETRIES, None)  # one of several cannot start again on its own; torchrun ends them all
    with step(name):
        if ranks.rank() > 0:
            log.setLevel(logging.WARNING)
        settings = read_config(config_type, config)
        with ranks.joined():
            (lead if ranks.rank() == 0 else take_part)(settings)


def read_config(config_type: type[C], path: Path) -> C:
    """The settings in a JSON file.

    Raises:
        ConfigError: the file holds no JSON object, or settings that do not fit.
    """
    with explain_os_errors(path):
        text = path.read_text()
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ConfigError(f'{path} is not JSON ({error}); give a file such as {{}} or {{"num_epochs": 2}}') from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold a JSON object of settings, got {type(settings).__name__}")
    return config_type.create(settings)
