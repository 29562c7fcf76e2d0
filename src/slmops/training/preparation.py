"""What is done to a model for the time that it is trained: faster layers, less memory."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from transformers import PreTrainedModel

from slmops.errors import ConfigError, ModelError
from slmops.progress import log
from slmops.training.attention import trainable_attention
from slmops.training.batches import Row, collate
from slmops.training.config import TrainingConfig

PROBE = (Row(0, [5, 6, 7, 8, 9, 10, 11], [6]), Row(1, [12, 6, 13, 8], [3]), Row(2, [5, 14, 15, 16, 17], [4]))
"""Rows by which is tried whether packed rows are kept apart."""


@contextmanager
def prepared(model: PreTrainedModel, compute_dtype: torch.dtype, config: TrainingConfig) -> Iterator[None]:
    """Train inside; afterwards the model is as it was, but for its weights.

    Raises:
        ConfigError: the model cannot be packed, or there is nothing to compile with.
        ModelError: its activations cannot be computed again.
    """
    with ExitStack() as stack:
        _use_liger(model)
        stack.enter_context(trainable_attention(model, compute_dtype))
        stack.enter_context(_sparse_where_tied(model))
        if config.packing:
            _check_packs(model)
        if config.activation_checkpointing:
            stack.enter_context(_activations_again(model))
        if config.torch_compile:
            stack.enter_context(_compiled(model))
        yield


@contextmanager
def _sparse_where_tied(model: PreTrainedModel) -> Iterator[None]:
    """On a CPU, let an embedding that is the head, too, add its few rows to the head's gradient.

    Else it makes a gradient as large as itself, nearly all zeros, and adds that: twice a small model's vocabulary in
    memory, and four passes over it in each step.
    """
    embedding = model.get_input_embeddings()
    tied = getattr(model.get_output_embeddings(), "weight", None) is embedding.weight and embedding.weight.requires_grad
    if model.device.type != "cpu" or not tied or not isinstance(embedding, torch.nn.Embedding):
        yield
        return
    embedding.sparse = True
    try:
        yield
    finally:
        embedding.sparse = False


def _use_liger(model: PreTrainedModel) -> None:
    """On a GPU, put Liger's kernels into the layers where they are installed (Hsu et al. 2024, arXiv:2410.10989).

    Its fused losses are left out: they are this package's own, with any divergence.
    """
    if model.device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # its only way for a model that is loaded
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN:
        _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
        log.info("layers run on Liger's kernels")


@torch.no_grad()
def _check_packs(model: PreTrainedModel) -> None:
    """
    Raises:
        ConfigError: packed rows see each other, as in an architecture with a recurrent state.
    """
    model.eval()
    together = collate(PROBE, 0, model.device, packed=True)
    found = model.base_model(input_ids=together.input_ids, position_ids=together.position_ids, use_cache=False)
    start = 0
    for row in PROBE:
        end = start + len(row.input_ids)
        alone = model.base_model(input_ids=together.input_ids[:, start:end], use_cache=False).last_hidden_state
        packed = found.last_hidden_state[:, start:end]
        if not torch.allclose(packed.float(), alone.float(), rtol=5e-2, atol=5e-2):
            raise ConfigError(
                f"{type(model).__name__} does not keep packed rows apart; set packing=false, which pads them"
            )
        start = end


@contextmanager
def _activations_again(model: PreTrainedModel) -> Iterator[None]:
    try:
        model.activation_checkpointing_enable()
    except ValueError as error:
        raise ModelError(f"{error}; set activation_checkpointing=false") from error
    if not any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters()):
        model.enable_input_require_grads()  # a frozen embedding would hand layers an input without a gradient
    try:
        yield
    finally:
        model.activation_checkpointing_disable()


@contextmanager
def _compiled(model: PreTrainedModel) -> Iterator[None]:
    """Compile each decoder layer, once for all of them, for batches of any size."""
    if model.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        raise ConfigError(
            "torch_compile=true on a CPU needs a C++ compiler, and there is none; install g++, or set it to false"
        )
    layers = [
        module for module in model.base_model.modules() if type(module).__name__ in (model._no_split_modules or ())
    ]
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
