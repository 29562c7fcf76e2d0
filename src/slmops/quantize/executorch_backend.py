"""Variants for ExecuTorch: a Hugging Face model as one program for its XNNPACK delegate, which runs on any CPU.

The program is transformers' own model with two things in place of what it has: a key-value cache of fixed size that is
written in place, and ExecuTorch's attention over it, which reads only what is filled. `forward(ids, start, scored)`
takes [1, tokens] new ids, [1] the position of the first of them and [scored] indices among them, and returns
[1, scored, vocabulary] logits: a prompt needs those of its last token only, and the head is a fifth of a small model.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import AttentionInterface

from slmops import artifacts, models, torch_models
from slmops.errors import ModelError, explain_full_disk
from slmops.inference.conversation import Conversation
from slmops.inference.executorch_files import PROGRAM, SETTINGS, ExecuTorchSettings, Precision
from slmops.progress import heartbeat
from slmops.training.batches import encode

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SmolLM3ForCausalLM",
)
"""Those whose attention is softmax(q k) v with nothing added, and which were exported, run and compared."""

ATTENTION = "slmops_executorch"
"""Name under which transformers finds `_attend`. It makes no mask for attention that it does not know."""

MAX_TOKENS_PER_CALL = 128
MAX_SCORED_PER_CALL = 32
"""The program keeps room for this many positions' logits: 6 MB with 49,152 tokens, 19 MB with 152,000."""

MIN_CONTEXT = 16

DATA_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary embeddings that change with the length of the text, which a program cannot."""

SAMPLE = [{"role": "user", "content": "Switch on the lamp (0.5 °C)\n  now"}]
"""What both tokenizers encode before a variant counts."""


def build(model: Path, directory: Path, *, precision: Precision, context_length: int, block_size: int = 32) -> None:
    """Export `model` to `directory`: program, tokenizer, chat template, and `executorch_config.json`, written last.

    Takes about eight seconds of one core for each layer, and memory for four to five times the weights in float32.

    Args:
        model: a Hugging Face directory.
        directory: where to; made if it is absent.
        precision: of the weights; see `slmops.inference.executorch_files.Precision`.
        context_length: tokens that the key-value cache has room for, which it takes from the start.
        block_size: weights that share a scale in `int4`: a multiple of 32.

    Raises:
        ModelError: ExecuTorch is not installed, or the model cannot be exported in this form.
        DiskFullError: the device is full.
    """
    if importlib.util.find_spec("executorch") is None:
        raise ModelError("ExecuTorch is not installed; run: pip install 'slmops[executorch]'")
    architecture = _check_architecture(model)
    AttentionInterface.register(ATTENTION, _attend)
    cpu = torch.device("cpu")
    with _quiet():  # transformers imports torchao where it finds it
        loaded = torch_models.load_model(model, dtype=torch.float32, device=cpu, attn_implementation=ATTENTION)
        tokenizer = torch_models.load_tokenizer(model)
    end_tokens = _end_tokens(loaded, tokenizer)
    _check_sizes(model, loaded, tokenizer, end_tokens, context_length, block_size if precision == "int4" else 1)
    directory.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(tokenizer, directory)
    with _quiet(), heartbeat(f"exporting {model.name} to ExecuTorch", lambda: precision):
        _quantize(loaded, precision, block_size)
        step = DecodeStep(loaded, context_length)
        program = _lower(_trace(step, context_length))
    with explain_full_disk(directory):
        with open(directory / PROGRAM, "wb") as file:
            program.write_to_file(file)
        settings = ExecuTorchSettings(
            program_size_bytes=(directory / PROGRAM).stat().st_size,
            program_sha256=artifacts.file_digest(directory / PROGRAM),
            executorch_version=importlib.metadata.version("executorch"),
            architecture=architecture,
            precision=precision,
            block_size=block_size if precision == "int4" else None,
            context_length=context_length,
            max_tokens_per_call=min(MAX_TOKENS_PER_CALL, context_length),
            max_scored_per_call=min(MAX_SCORED_PER_CALL, context_length),
            vocabulary_size=loaded.config.vocab_size,
            end_token_ids=end_tokens,
        )
        artifacts.write_json(directory / SETTINGS, settings.model_dump(mode="json"))


class DecodeStep(nn.Module):
    """What the program does in one call; its buffers keep the keys and values of all calls before."""

    def __init__(self, model: PreTrainedModel, context_length: int) -> None:
        super().__init__()
        self.trunk, self.head = model.base_model, model.get_output_embeddings()
        config: Any = model.config
        self.context_length, self.num_layers = context_length, config.num_hidden_layers
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (1, context_length, config.num_key_value_heads, head_dim)
        for layer in range(self.num_layers):
            self.register_buffer(f"keys_{layer}", torch.zeros(shape), persistent=False)
            self.register_buffer(f"values_{layer}", torch.zeros(shape), persistent=False)

    def forward(self, ids: torch.Tensor, start: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
        """[1, S, V] logits behind the `scored` [S] ones of `ids` [1, T], which begin at the position `start` [1]."""
        first: Any = start.item()
        num_ids = ids.shape[1]
        torch._check(first >= 0)
        torch._check(first < self.context_length)
        torch._check(first + num_ids <= self.context_length)
        cache = Cache(
            [
                CacheInPlace(self.get_buffer(f"keys_{layer}"), self.get_buffer(f"values_{layer}"), first)
                for layer in range(self.num_layers)
            ]
        )
        positions = (torch.arange(num_ids) + start).unsqueeze(0)
        output = self.trunk(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, first_position=first
        )
        logits: torch.Tensor = self.head(output.last_hidden_state.index_select(1, scored))
        return logits


class CacheInPlace(CacheLayerMixin):
    """Keys and values [1, context, heads, width] of one layer, of which those before `first` are filled."""

    is_compileable = True
    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, first: Any) -> None:
        super().__init__()
        self.keys, self.values, self.first = keys, values, first
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the buffers are there."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        torch.ops.llama.update_cache(key_states.transpose(1, 2).contiguous(), self.keys, self.first)
        torch.ops.llama.update_cache(value_states.transpose(1, 2).contiguous(), self.values, self.first)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[1], 0

    def get_seq_length(self) -> int:
        filled: int = self.first
        return filled

    def get_max_length(self) -> int:
        return self.keys.shape[1]


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    first_position: int,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of `query` [1, heads, T, width] at `first_position` on a cache [1, context, heads, width]."""
    wide = query.transpose(1, 2).contiguous()
    return torch.ops.llama.custom_sdpa(wide, key, value, first_position, None, 0.0, True, scaling), None


def _check_architecture(model: Path) -> str:
    architecture: str = models.read_config(model)["architectures"][0]
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"ExecuTorch variants of the architecture {architecture} of {model} are not known to be right; they are "
            f"for {', '.join(ARCHITECTURES)}"
        )
    return architecture


def _check_sizes(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    end_tokens: Sequence[int],
    context_length: int,
    block_size: int,
) -> None:
    """
    Raises:
        ModelError: with all that keeps the model from being exported so.
    """
    config: Any = model.config
    problems = []
    if not MIN_CONTEXT <= context_length <= config.max_position_embeddings:
        problems.append(
            f"context_length must be from {MIN_CONTEXT} to the model's {config.max_position_embeddings:,}, got "
            f"{context_length:,}"
        )
    window = _sliding_window(config)
    if window and window < context_length:
        problems.append(f"layers attend to the last {window:,} tokens only: give a context_length of at most that")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in DATA_DEPENDENT_ROPE:
        problems.append(f"its rotary embedding {rope!r} changes with the length of the text")
    if block_size % 32 and block_size != 1:
        problems.append(f"block_size must be a multiple of 32 for ExecuTorch, got {block_size}")
    widths = {module.weight.shape[1] for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)}
    if unfit := sorted(width for width in widths if width % block_size):
        problems.append(f"blocks of {block_size} weights do not divide its widths {', '.join(map(str, unfit))}")
    if len(tokenizer) > config.vocab_size:
        problems.append(f"its tokenizer has {len(tokenizer):,} tokens, and its embedding {config.vocab_size:,}")
    if not end_tokens or end_tokens[-1] >= config.vocab_size:
        problems.append(
            f"what ends an answer must be tokens of the embedding: set eos_token_id, which is {list(end_tokens)}"
        )
    if problems:
        raise ModelError(f"{path} cannot be exported to ExecuTorch: " + "; ".join(problems))


def _sliding_window(config: Any) -> int | None:
    """Tokens that some layer's attention is limited to; None if it is not."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and set(kinds) == {"full_attention"}:
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write the tokenizer, and see that it works the same without transformers.

    Raises:
        ModelError: it does not.
    """
    with explain_full_disk(directory):
        tokenizer.save_pretrained(directory)
        file = directory / "tokenizer.json"
        compact = json.dumps(json.loads(file.read_text(encoding="utf-8")), ensure_ascii=False, separators=(",", ":"))
        file.write_text(compact, encoding="utf-8")
    expected, found = (
        encode(tokenizer, SAMPLE, to_answer=True),
        Conversation(directory).encode_messages(SAMPLE, to_answer=True),
    )
    if found != expected:
        raise ModelError(
            "the chat template or tokenizer gives other tokens without transformers, so a device would ask another "
            f"question: {found[:16]} instead of {expected[:16]}; use a template that needs nothing but Jinja"
        )


def _quantize(model: PreTrainedModel, precision: Precision, block_size: int) -> None:
    """Round the weights of a model, in place. A head that is tied to the embedding becomes a matrix of its own.

    The delegate packs the head for its kernels, and the embedding is looked up, so that they cannot share memory.
    """
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    embedding.padding_idx = None  # means nothing here, and hides the lookup from the exporter, which fuses it
    if precision == "float32":
        return
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    dtype = getattr(torch, precision)
    grain = PerGroup(block_size) if precision == "int4" else PerAxis(0)
    algorithm = "hqq_scale_only"  # half-quadratic search for scales (Badri and Shaji 2023), without zero points
    looked_up = IntxWeightOnlyConfig(weight_dtype=dtype, granularity=grain, intx_choose_qparams_algorithm=algorithm)
    multiplied = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=dtype, weight_granularity=grain, intx_choose_qparams_algorithm=algorithm
    )
    quantize_(model, looked_up, lambda module, _: isinstance(module, nn.Embedding))
    quantize_(model, multiplied, lambda module, _: isinstance(module, nn.Linear))


def _trace(step: DecodeStep, context_length: int) -> torch.export.ExportedProgram:
    """The step as a graph for any number of ids and of scored positions."""
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 - registers the operators by being imported

    longest, most_scored = min(MAX_TOKENS_PER_CALL, context_length), min(MAX_SCORED_PER_CALL, context_length)
    num_ids = torch.export.Dim("num_ids", min=1, max=longest)
    num_scored = torch.export.Dim("num_scored", min=1, max=most_scored)
    example = (torch.zeros(1, longest, dtype=torch.long), torch.zeros(1, dtype=torch.long), torch.arange(most_scored))
    with torch.no_grad():
        return torch.export.export(
            step.eval(), example, dynamic_shapes=({1: num_ids}, None, {0: num_scored}), strict=False
        )


def _lower(traced: torch.export.ExportedProgram) -> Any:
    """An ExecuTorch program: what XNNPACK can do is its, the rest is ExecuTorch's own operators'."""
    import executorch.kernels.quantized  # noqa: F401 - registers embeddings of few bits by being imported
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(
        traced,
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    return edge.to_executorch(
        ExecutorchBackendConfig(extract_delegate_segments=True, do_quant_fusion_and_const_prop=True)
    )


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What ends an answer, in rising order, by the model's generation settings, its config and its tokenizer."""
    generation: Any = model.generation_config
    found: set[int] = set()
    for value in (generation and generation.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        found |= set(value if isinstance(value, list) else [value])
    return tuple(sorted(token for token in found if token is not None))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the exporter and torchao log and warn of, of which nothing is the user's to change."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with torch_models.quiet_libraries():
            yield
    finally:
        logging.disable(disabled)
