"""What all variants of one model are built from, read once and only if one needs it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from slmops import cpus, hardware, models, torch_models
from slmops.errors import ConfigError, ModelError
from slmops.quantize.calibration import Calibration, read_calibration
from slmops.quantize.config import QuantizeConfig
from slmops.quantize.drift import Drift, Reference, drift_of_variant, rows_to_compare
from slmops.training.batches import Row, collate
from slmops.training.head import SparseHead


def read_model_config(model: Path) -> PreTrainedConfig:
    """What transformers makes of config.json, which need not state what is usual for an architecture.

    Raises:
        ModelError: transformers does not know the architecture.
    """
    try:
        with torch_models.quiet_libraries():
            config: PreTrainedConfig = AutoConfig.from_pretrained(model, local_files_only=True)
    except (ValueError, KeyError) as error:
        stated = models.read_config(model)
        raise ModelError(
            f"the installed transformers does not know the architecture {stated['architectures'][0]} (model_type "
            f"{stated.get('model_type')!r}) of {model}; use a model of another family, such as Llama, Qwen, Phi, Gemma "
            "or SmolLM"
        ) from error
    return config.get_text_config()


class Job:
    """One model, its calibration rows, and a directory for what is not finished."""

    def __init__(self, config: QuantizeConfig, model: Path, data: Path | None, work: Path) -> None:
        self.config, self.model, self.data, self.work = config, model, data, work
        self.num_threads = cpus.count()

    @cached_property
    def model_config(self) -> PreTrainedConfig:
        return read_model_config(self.model)

    @cached_property
    def model_type(self) -> str:
        return str(self.model_config.model_type)

    @cached_property
    def tied(self) -> bool:
        """Whether embedding and head are one matrix."""
        return bool(self.model_config.tie_word_embeddings)

    @cached_property
    def widths(self) -> set[int]:
        """Lengths of the rows that are cut into blocks, as far as the architecture has names for them."""
        config: Any = self.model_config
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim")
        hidden, intermediate, num_heads, head_dim = (getattr(config, name, None) for name in names)
        attention = num_heads * head_dim if num_heads and head_dim else hidden
        return {width for width in (hidden, intermediate, attention) if isinstance(width, int)}

    def divides(self, block_size: int) -> bool:
        """Whether every width is a number of whole blocks."""
        return not any(width % block_size for width in self.widths)

    @cached_property
    def calibration(self) -> Calibration:
        """
        Raises:
            ConfigError: none was given.
            DataError: its rows are too few.
        """
        if not self.data:
            raise ConfigError("no calibration rows were given; give chat records of the task as `calibration`")
        config = self.config
        return read_calibration(self.data, self.model, config.calibration_rows, config.calibration_max_length)

    @cached_property
    def reference_rows(self) -> list[Row]:
        """The rows on which drift is measured."""
        return rows_to_compare(self.calibration.held_out)

    @cached_property
    def reference(self) -> Reference:
        """What the model in full precision says of them."""
        device = hardware.pick_device()
        head = SparseHead(torch_models.load_model(self.model, dtype=torch.float32, device=device))
        with torch.no_grad():
            logits = [head.logits(collate([row], 0, device)).cpu() for row in self.reference_rows]
        return Reference(self.reference_rows, torch.cat(logits).log_softmax(-1))

    def drift(self, directory: Path) -> Drift:
        """Drift of a variant as it is shipped."""
        return drift_of_variant(directory, self.reference, self.num_threads)

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """A path below `work` for what is needed only in the body."""
        path = self.work / f"{name}.scratch"
        shutil.rmtree(path, ignore_errors=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
