"""fp16 graphs: what keeps fp32, that the rest is rounded, and that little is lost."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.example_inputs import example_inputs
from export.typed_graph import FP32_OPS, in_order, relative_error, typed_graph, with_rounding
from train.presets import TOY
from uc3d_rt.contract import NETWORK_NAMES, network_specs


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


@pytest.mark.parametrize("name", NETWORK_NAMES)
@pytest.mark.parametrize("weights", ["fp16", "int8"])
def test_graphs_are_strongly_typed(bundle: Path, name: str, weights: str) -> None:
    sizes = {"batch": 1} | ({"samples": 6} if name == "unet" else {})
    model = typed_graph(bundle / f"{name}.onnx", sizes, weights)
    types, kinds = types_of(model), {node.op_type for node in model.graph.node}
    for node in model.graph.node:
        if node.op_type in (*FP32_OPS, "Sin", "Cos"):
            assert types[node.input[0]] == types[node.output[0]] == TensorProto.FLOAT, node.name
        if node.op_type in ("Conv", "MatMul", "Gemm") and "Sin" not in node.name:
            assert types[node.output[0]] == TensorProto.FLOAT16, node.name
    assert ("DequantizeLinear" in kinds) == (weights == "int8")
    int8 = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT8]
    assert bool(int8) == (weights == "int8")
    # The contract's names and types, its free sizes fixed.
    spec = network_specs(TOY.shape)[name]
    for tensors, found in ((spec.inputs, model.graph.input), (spec.outputs, model.graph.output)):
        assert [value.name for value in found] == [tensor.name for tensor in tensors]
        for tensor, value in zip(tensors, found, strict=True):
            assert value.type.tensor_type.elem_type == TensorProto.FLOAT
            shape = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
            assert shape == tuple(sizes[s] if isinstance(s, str) else s for s in tensor.shape)


@pytest.mark.parametrize("name", NETWORK_NAMES)
def test_little_is_lost_and_not_nothing(bundle: Path, name: str) -> None:
    source = bundle / f"{name}.onnx"
    model = typed_graph(source, {}, "fp16")  # free sizes, as the UNet's engine has them
    inputs = [example_inputs(TOY.shape, name, batch, seed=batch) for batch in (1, 2)]
    assert 1e-5 < relative_error(source, model, inputs) < 1e-2


def test_the_same_file_gives_the_same_bytes(bundle: Path) -> None:
    first, second = (
        typed_graph(bundle / "unet.onnx", {"batch": 2, "samples": 12}).SerializeToString(deterministic=True)
        for _ in range(2)
    )
    assert first == second


def small_model(half: bool, scale: float) -> onnx.ModelProto:
    """y = sqrt(x * scale)."""
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    weight = np.array(scale, np.float16 if half else np.float32)
    nodes = [helper.make_node("Mul", ["x", "w"], ["m"]), helper.make_node("Sqrt", ["m"], ["r"])]
    ends = [helper.make_node("Cast", ["r"], ["y"], to=TensorProto.FLOAT)]
    starts = [helper.make_node("Cast", ["in"], ["x"], to=kind)]
    graph = helper.make_graph(
        [*starts, *nodes, *ends],
        "small",
        [helper.make_tensor_value_info("in", TensorProto.FLOAT, [3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def test_every_value_is_rounded_as_numpy_rounds() -> None:
    """ONNX Runtime's CPU alone would keep fp32 between the casts."""
    import onnxruntime

    x = np.array([1.2345678, 300.3, 0.001], np.float32)
    session = onnxruntime.InferenceSession(with_rounding(small_model(True, 3.3)).SerializeToString())
    expected = np.sqrt(x.astype(np.float16) * np.float16(3.3)).astype(np.float32)
    np.testing.assert_array_equal(session.run(None, {"in": x})[0], expected)


def test_an_overflow_is_no_small_error(tmp_path: Path) -> None:
    onnx.save(small_model(False, 1000.0), tmp_path / "small.onnx")
    given = [{"in": np.array([1.0, 2.0, 100.0], np.float32)}]  # 100 000 is above fp16's 65 504
    with np.errstate(invalid="ignore"):
        assert not relative_error(tmp_path / "small.onnx", small_model(True, 1000.0), given) < 1.0


def test_files_that_are_no_network(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"ONNX Runtime refuses .*bad.onnx"):
        typed_graph(tmp_path / "bad.onnx", {})


def test_scales_too_small_for_fp16(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.full((8, 8), 100, np.int8), "q")
    scale = numpy_helper.from_array(np.full(8, 1e-7, np.float32), "s")
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 8]) for name in "xy"]
    graph = helper.make_graph(nodes, "small", ends[:1], ends[1:], [weight, scale])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "small.onnx")
    with pytest.raises(ValueError, match="too small for fp16; build with --weights fp16"):
        typed_graph(tmp_path / "small.onnx", {}, "int8")
    assert typed_graph(tmp_path / "small.onnx", {}, "fp16").graph.node


def test_a_graph_of_an_older_opset(tmp_path: Path) -> None:
    model = small_model(False, 1.0)
    model.opset_import[0].version = 17
    onnx.save(model, tmp_path / "old.onnx")
    with pytest.raises(ValueError, match="is of opset 17; export the bundle again"):
        typed_graph(tmp_path / "old.onnx", {})


def test_nodes_stand_behind_what_they_read_and_else_as_they_were() -> None:
    def node(name: str, inputs: str) -> onnx.NodeProto:
        return helper.make_node("Add", inputs.split(), [name], name=name)

    given = [
        node("e", "d b"),
        node("a", "x x"),
        node("d", "c a"),
        node("b", "a x"),
        node("c", "x"),
        node("f", "x"),
    ]
    assert [one.name for one in in_order(given)] == ["c", "a", "d", "b", "e", "f"]
    ordered = [given[i] for i in (1, 4, 3, 5)]
    assert [one.name for one in in_order(ordered)] == ["a", "c", "b", "f"]
