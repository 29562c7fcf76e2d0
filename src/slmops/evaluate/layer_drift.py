"""Where in a variant its drift comes from.

The full-precision model goes on from what the variant, as it is shipped, hands from one layer to the next. How far its
predictions then are from its own is the drift up to there: that of stored weights, however they were rounded, and of
activations that the runtime rounds. Not of each layer alone: what GPTQ rounds makes up for what came before it, and
outside of its variant it would look worse than it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import PreTrainedModel

from slmops.errors import ModelError
from slmops.evaluate.drift import EncodedRow
from slmops.progress import log, track
from slmops.release.format import GENAI_CONFIG
from slmops.shaping.layers import layers_of
from slmops.training.batches import Row, collate
from slmops.training.head import SparseHead
from slmops.variants import ModelFiles

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
MAX_TOKENS = 8192
"""In one pass of the reference: 300 MB for 9,000 channels."""
RESIDUAL = 3
"""Of the outputs of a norm that adds: the sum, which is what goes from layer to layer."""


class _NotShownError(Exception):
    """A variant that does not show what its layers hand on, and why."""


def measure(
    files: ModelFiles, reference: PreTrainedModel, rows: Sequence[EncodedRow], num_threads: int
) -> dict[str, Any]:
    """Drift up to each part of a variant, in the order in which they work.

    Args:
        files: a variant for ONNX Runtime.
        reference: the model in full precision that it was made from.
        rows: as both encode them; drift is measured at the tokens of their answers.
        num_threads: of the variant's runtime.

    Returns:
        `parts`, the embedding, each layer and the head, with KL(reference ‖ reference that goes on from there) in nats
        a token; the head's is the drift of the whole. `largest_step`, the part that adds most. Or, as `not_run`, why
        there is none.
    """
    if not rows:
        return {"not_run": "no row could be compared"}
    try:
        variant = _Layers(files, num_threads)
        layers = layers_of(reference)
    except (_NotShownError, ModelError) as error:
        return {"not_run": str(error)}
    if variant.num_layers != len(layers):
        return {"not_run": f"the variant has {variant.num_layers} layers, and its reference {len(layers)}"}
    head = SparseHead(reference)
    total, num_positions = np.zeros(len(layers) + 2), 0
    for ids, num_prompt in track(rows, "evaluate drift by layer", len(rows)):
        row = Row(0, ids, list(range(num_prompt, len(ids))))
        *streams, logits = (torch.from_numpy(found) for found in variant.run(ids))
        with torch.inference_mode():
            wanted = head.logits(collate([row], 0, reference.device)).double().log_softmax(-1)
            at_once = max(1, MAX_TOKENS // len(ids))
            for start in range(0, len(streams), at_once):
                numbers = range(start, min(start + at_once, len(streams)))
                for number, hidden in zip(numbers, _going_on(head, layers, streams, numbers, row), strict=True):
                    total[number] += _divergence(wanted, head.finish(head.head(hidden).float()))
            own = logits[0, [target - 1 for target in row.targets]]
            total[-1] += _divergence(wanted, own.to(wanted.device))
        num_positions += len(row.targets)
    if not all(map(math.isfinite, total)):
        return {"not_run": "what the model or its reference predicts is no number; quantize it otherwise"}
    names = ["embedding", *(f"layer {number}" for number in range(len(layers))), "head"]
    kl = (total / num_positions).tolist()
    steps = np.diff(kl, prepend=0.0)
    largest = {"part": names[steps.argmax()], "kl": float(steps.max())}
    log.info(
        "drift by layer on %d rows: KL %.4f, %.4f of it with %s", len(rows), kl[-1], largest["kl"], largest["part"]
    )
    return {
        "num_rows": len(rows),
        "num_positions": num_positions,
        "largest_step": largest,
        "parts": [{"part": name, "kl_mean": value} for name, value in zip(names, kl, strict=True)],
    }


class _Layers:
    """A variant for ONNX Runtime that shows what its layers hand on."""

    def __init__(self, files: ModelFiles, num_threads: int) -> None:
        provider = PROVIDERS.get(files.execution_provider, files.execution_provider)
        if provider not in ort.get_available_providers():
            raise _NotShownError(f"the installed onnxruntime has no {provider}")
        decoder = json.loads((files.directory / GENAI_CONFIG).read_text())["model"]["decoder"]
        if decoder.get("pipeline") or "sliding_window" in decoder:
            raise _NotShownError("its decoder is a pipeline, or attends to a window")
        self.num_layers, self._head_size = int(decoder["num_hidden_layers"]), int(decoder["head_size"])
        model = onnx.load(str(files.directory / decoder["filename"]), load_external_data=False)
        self._outputs = [*_streams(model.graph, self.num_layers), "logits"]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self._outputs[:-1])
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(files.directory.resolve())
        )
        self._session = ort.InferenceSession(model.SerializeToString(), options, providers=[provider])
        if unknown := {entry.type for entry in self._session.get_inputs()} - {"tensor(int64)", *FLOATS}:
            raise _NotShownError(f"its keys and values are kept as {', '.join(sorted(unknown))}")

    def run(self, ids: Sequence[int]) -> list[NDArray[np.float32]]:
        """What goes into each layer and comes out of the last, [1, tokens, hidden]; then [1, tokens, vocabulary]."""
        tokens = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids))[None],
        }
        inputs = {
            entry.name: tokens[entry.name] if entry.name in tokens else self._no_past(entry)
            for entry in self._session.get_inputs()
        }
        return [np.asarray(found, np.float32) for found in self._session.run(self._outputs, inputs)]

    def _no_past(self, entry: Any) -> NDArray[Any]:
        return np.zeros((1, entry.shape[1], 0, self._head_size), FLOATS[entry.type])


def _streams(graph: onnx.GraphProto, num_layers: int) -> list[str]:
    """The tensors before each layer and behind the last, found by the norm that reads them.

    Raises:
        _NotShownError: the layers do not begin with a norm that onnxruntime-genai's builder gives this name.
    """
    norms = {name: node for node in graph.node for name in node.input if name.endswith("layernorm.weight")}
    names = [f"model.layers.{number}.input_layernorm.weight" for number in range(num_layers)]
    names.append(f"model.layers.{num_layers}.final_norm_layernorm.weight")
    if missing := [name for name in names if name not in norms]:
        raise _NotShownError(f"its layers are not built as is known here: there is no {missing[0]}")
    return [_stream_before(norms[name]) for name in names]


def _stream_before(norm: onnx.NodeProto) -> str:
    if not norm.op_type.startswith("Skip"):
        return str(norm.input[0])
    norm.output.extend([""] * (RESIDUAL + 1 - len(norm.output)))
    norm.output[RESIDUAL] = norm.output[RESIDUAL] or f"{norm.name}/residual"
    return str(norm.output[RESIDUAL])


def _going_on(
    head: SparseHead, layers: torch.nn.ModuleList, streams: Sequence[torch.Tensor], numbers: Sequence[int], row: Row
) -> torch.Tensor:
    """[numbers, targets, d] of what the model makes of those of `streams`, each from its layer on.

    In one pass: a layer takes the stream before it into the batch, behind the row that the model itself reads.
    """

    def before(stream: torch.Tensor) -> Callable[..., tuple[torch.Tensor, ...]]:
        return lambda _, given: (torch.cat([given[0], stream.to(given[0])]), *given[1:])

    def behind(stream: torch.Tensor) -> Callable[..., torch.Tensor]:
        return lambda _, __, found: torch.cat([found, stream.to(found)])

    hooks = [
        layers[number].register_forward_pre_hook(before(streams[number]))
        if number < len(layers)
        else layers[-1].register_forward_hook(behind(streams[number]))
        for number in numbers
    ]
    try:
        found = head.decode(collate([row], 0, head.head.weight.device)).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    hidden: torch.Tensor = found[1:, [target - 1 for target in row.targets]]
    return hidden


def _divergence(wanted: torch.Tensor, logits: torch.Tensor) -> float:
    """KL summed over positions in nats, of log-probabilities and logits, [positions, vocabulary] each."""
    size = min(wanted.shape[1], logits.shape[1])  # rows of padding behind the vocabulary are no tokens
    found = logits[:, :size].double().log_softmax(-1)
    return F.kl_div(found, wanted[:, :size], log_target=True, reduction="sum").item()
