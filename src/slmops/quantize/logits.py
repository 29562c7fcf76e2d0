"""A head that computes no more logits than are wanted.

A graph computes the logits of all tokens of a prompt, though an answer begins with those of the last one: a sixth of
the time to the first token of a small model with a large vocabulary, and 200 kB of memory a token. With an input more,
which is 0 where nobody gives it, the head leaves out all before a position; onnxruntime-genai does not give it.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from slmops.inference.slots import LOGITS_FROM

GRAPH = "model.onnx"
PRODUCTS = ("Gemm", "MatMul", "MatMulNBits")
BEHIND = ("Add", "Cast", "Div", "Mul", "Tanh")
"""What may come between the head's product and the logits: scales, a cap, a type."""


def let_logits_begin(directory: Path) -> bool:
    """Give the graph in `directory` the input, in place; False if its head is not one that is known here."""
    model = onnx.load(str(directory / GRAPH), load_external_data=False)
    graph = model.graph
    head = _head(graph)
    if head is None:
        return False
    hidden, wanted = head.input[0], f"{head.input[0]}/wanted"
    graph.input.append(helper.make_tensor_value_info(LOGITS_FROM, TensorProto.INT64, [1]))
    for name, value in ((LOGITS_FROM, 0), (f"{LOGITS_FROM}/end", (1 << 63) - 1), (f"{LOGITS_FROM}/axis", 1)):
        graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [1], [value]))
    inputs = [hidden, LOGITS_FROM, f"{LOGITS_FROM}/end", f"{LOGITS_FROM}/axis"]
    graph.node.insert(list(graph.node).index(head), helper.make_node("Slice", inputs, [wanted], "/lm_head/Slice"))
    head.input[0] = wanted
    onnx.save(model, str(directory / GRAPH))
    return True


def _head(graph: onnx.GraphProto) -> onnx.NodeProto | None:
    """The product that the logits come from, whose first input is [batch, tokens, hidden]."""
    makers = {output: node for node in graph.node for output in node.output}
    node = makers.get("logits")
    while node is not None and node.op_type in BEHIND:
        node = next((makers[name] for name in node.input if name in makers), None)
    return node if node is not None and node.op_type in PRODUCTS and node.input[0] in makers else None
