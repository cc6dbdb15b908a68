"""A graph in fewer bytes computes the same, and keeps the names that others read."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from export.compact import compact


def constant(name: str, value: np.ndarray) -> onnx.NodeProto:
    return helper.make_node(
        "Constant", [], [name], name=f"/make/{name}", value=numpy_helper.from_array(value)
    )


def model() -> onnx.ModelProto:
    """`y = (x + a) * w + b - c`, a = b in value and c of another type's bytes; and `v0`, a weight."""
    same, other = np.array([1.0, 2.0], np.float32), np.array([3.0, 4.0], np.float32)
    nodes = [
        constant("module.with.a.long.name.a", same),
        helper.make_node("Add", ["x", "module.with.a.long.name.a"], ["module.with.a.long.name.sum"], "/add"),
        helper.make_node("Mul", ["module.with.a.long.name.sum", "v0"], ["scaled"], "/mul"),
        constant("b", same),
        helper.make_node("Add", ["scaled", "b"], ["moved"], "/again"),
        constant("c", other),
        helper.make_node("Sub", ["moved", "c"], ["y"], "/sub"),
        constant("kept", same),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("y", "kept")],
        [numpy_helper.from_array(np.array([0.5, -2.0], np.float32), "v0")],
        value_info=[helper.make_tensor_value_info("scaled", TensorProto.FLOAT, [2])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def test_a_compact_graph_computes_the_same() -> None:
    x = np.array([5.0, -7.0], np.float32)
    whole = model()
    truth = ReferenceEvaluator(whole).run(None, {"x": x})
    before, names = len(whole.SerializeToString()), [node.name for node in whole.graph.node]
    compact(whole.graph)
    onnx.checker.check_model(whole, full_check=True)
    for value, expected in zip(ReferenceEvaluator(whole).run(None, {"x": x}), truth, strict=True):
        np.testing.assert_array_equal(value, expected)
    assert len(whole.SerializeToString()) < before
    assert [node.name for node in whole.graph.node] == [n for n in names if n != "/make/b"]  # the same as a
    outputs = [name for node in whole.graph.node for name in node.output]
    assert outputs[-1] == "kept" and "y" in outputs  # an output keeps its name and its own constant
    assert "v0" not in outputs and len(set(outputs)) == len(outputs)  # the weight's name is taken


def test_once_is_enough() -> None:
    whole = model()
    compact(whole.graph)
    once = whole.SerializeToString(deterministic=True)
    compact(whole.graph)
    assert whole.SerializeToString(deterministic=True) == once
