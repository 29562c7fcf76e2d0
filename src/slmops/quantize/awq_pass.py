"""Activation-aware scaling as a pass of Olive's: its own needs the package autoawq, which is no longer kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from olive.data.config import DataConfig
from olive.hardware.accelerator import AcceleratorSpec
from olive.model import HfModelHandler
from olive.passes import Pass
from olive.passes.olive_pass import PassConfigParam
from olive.passes.pass_config import BasePassConfig
from olive.passes.pytorch.train_utils import get_calibration_dataset

from slmops import hardware, torch_models
from slmops.quantize import awq


class ActivationAwareScale(Pass):  # type: ignore[misc]  # Olive has no types
    """Hugging Face directory → another of the same function, whose weights bear rounding better."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return {
            "bits": PassConfigParam(type_=int, default_value=4, description="bits of the weights after rounding"),
            "group_size": PassConfigParam(type_=int, required=True, description="weights that share a scale"),
            "data_config": PassConfigParam(type_=DataConfig | dict, required=True, description="calibration rows"),
        }

    def _run_for_config(
        self, model: HfModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> HfModelHandler:
        settings: Any = config
        source, output = Path(model.model_path), Path(output_model_path)
        device = hardware.pick_device()
        loaded = torch_models.load_model(source, dtype=torch.float32, device=device)
        batches = [row["input_ids"].to(device) for row in get_calibration_dataset(model, settings.data_config)]
        awq.scale(loaded, batches, settings.bits, settings.group_size)
        torch_models.save_model(loaded, torch_models.load_tokenizer(source), output)
        return HfModelHandler(output_model_path)
