"""The input that leaves logits out, in heads of several forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort  # type: ignore[import-untyped]
import pytest
from onnx import TensorProto, helper, numpy_helper

from slmops.inference.slots import LOGITS_FROM
from slmops.quantize.logits import let_logits_begin

WEIGHTS = np.arange(12, dtype=np.float32).reshape(3, 4)
CAP = [
    helper.make_node("Div", ["product", "cap"], ["divided"]),
    helper.make_node("Tanh", ["divided"], ["bent"]),
    helper.make_node("Mul", ["cap", "bent"], ["logits"]),
]


def write(directory: Path, nodes: list[onnx.NodeProto]) -> None:
    """hidden [1, tokens, 3], from an input, then `nodes`."""
    shape: list[str | int | None] = ["batch", "tokens", 3]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["hidden"]), *nodes],
        "head",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "wanted", 4])],
        [numpy_helper.from_array(WEIGHTS, "weights"), numpy_helper.from_array(np.array(30, np.float32), "cap")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), directory / "model.onnx"
    )


@pytest.mark.parametrize(
    "nodes",
    [
        [helper.make_node("MatMul", ["hidden", "weights"], ["logits"])],
        [helper.make_node("MatMul", ["hidden", "weights"], ["product"]), *CAP],
    ],
    ids=["plain", "capped"],
)
def test_the_last_logits_alone(nodes: list[onnx.NodeProto], tmp_path: Path) -> None:
    write(tmp_path, nodes)
    assert let_logits_begin(tmp_path)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(tmp_path / "model.onnx", options)
    x = np.random.default_rng(0).random((1, 5, 3), np.float32)
    (whole,) = session.run(["logits"], {"x": x})
    (last,) = session.run(["logits"], {"x": x, LOGITS_FROM: np.array([4], np.int64)})
    assert whole.shape == (1, 5, 4)
    np.testing.assert_array_equal(last, whole[:, 4:])


def test_a_head_that_is_not_known_is_left_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, [helper.make_node("Concat", ["hidden", "hidden"], ["logits"], axis=2)])
    before = (tmp_path / "model.onnx").read_bytes()
    assert not let_logits_begin(tmp_path)
    assert (tmp_path / "model.onnx").read_bytes() == before
