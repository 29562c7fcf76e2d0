"""Loading and saving Hugging Face models with torch."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from slmops import models
from slmops.errors import DiskFullError, ModelError


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory, with a chat template and a padding token.

    Raises:
        ModelError: it has no chat template.
    """
    with quiet_libraries():
        tokenizer = AutoTokenizer.from_pretrained(path)
    if not tokenizer.chat_template:
        raise models.no_chat_template(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(path: Path, *, dtype: torch.dtype, device: torch.device, **options: Any) -> PreTrainedModel:
    """A causal language model in evaluation mode.

    Raises:
        ModelError: its architecture is unknown to the installed transformers, or its weights do not fit its config.
    """
    config = models.read_config(path)
    try:
        with quiet_libraries():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, local_files_only=True, output_loading_info=True, **options
            )
    except (ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"{path} cannot be loaded as a causal language model (model_type {config.get('model_type')!r}): "
            f"{str(error).splitlines()[0]}"
        ) from error
    model: PreTrainedModel = loaded[0]
    loading: dict[str, Any] = loaded[1]
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(f"{path} has no weights for {missing[0]} and {len(missing) - 1} more; save the model again")
    if "quantization_config" not in options:
        model.to(device)  # type: ignore[arg-type]  # its own signature hides torch's
    model.eval()
    return model


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write weights, config, tokenizer and chat template, readable by every user of a container.

    Raises:
        DiskFullError: the device is full.
    """
    try:
        with quiet_libraries():
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
    except Exception as error:  # safetensors reports a full disk with an exception of its own
        if "os error 28" in str(error) or getattr(error, "errno", None) == errno.ENOSPC:
            raise DiskFullError(f"no space left while writing {directory}; free some space and run it again") from error
        raise
    for file in directory.iterdir():
        file.chmod(0o644)


def num_parameters(model: torch.nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hold back transformers' own progress bars and warnings: ours say what matters."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def stored_dtype(path: Path) -> torch.dtype:
    """The type that a model directory keeps its weights in, as its config says."""
    config = models.read_config(path)
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """`model` with its weights in `dtype`, in place."""
    torch.nn.Module.to(model, dtype)
    return model
