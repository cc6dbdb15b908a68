"""Weights stored as int8: which, with what error, and that the graph still runs."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.weights import MIN_ENTRIES, quantize_channels, store_weights_int8


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One of every kind; channels differ a hundredfold in size."""

    def spread(shape: tuple[int, ...], axis: int) -> np.ndarray:
        size = np.logspace(-1, 1, shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
        return (rng.normal(size=shape) * size).astype(np.float32)

    return {
        "conv": spread((64, 8, 3, 3), 0),
        "gemm_transposed": spread((96, 1024), 0),
        "gemm": spread((96, 64), 1),
        "matmul": spread((64, 80), 1),
        "small": rng.normal(size=(80, 4)).astype(np.float32),
        "bias": rng.normal(size=64).astype(np.float32),
        "table": rng.normal(size=(80, 64)).astype(np.float32),
        "shared": rng.normal(size=(64, 64)).astype(np.float32),
    }


AXES = {"conv": 0, "gemm_transposed": 0, "gemm": 1, "matmul": 1}


@pytest.fixture
def graph(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A network over all of them; `table` is gathered, `shared` is used in two ways."""
    node = helper.make_node
    nodes = [
        node("Conv", ["image", "conv", "bias"], ["a"], pads=[1, 1, 1, 1]),
        node("Flatten", ["image"], ["flat"]),
        node("Slice", ["flat", "zero", "width", "one"], ["row"]),
        node("Gemm", ["row", "gemm_transposed"], ["c"], transB=1),
        node("Gemm", ["c", "gemm"], ["d"]),
        node("MatMul", ["d", "matmul"], ["e"]),
        node("MatMul", ["e", "small"], ["f"]),
        node("MatMul", ["shared", "shared"], ["h"]),
        node("Gather", ["table", "index"], ["i"]),
    ]
    made = weights(rng)
    constants = made | {
        "zero": np.array([0]),
        "width": np.array([1024]),
        "one": np.array([1]),
        "index": np.array([3]),
    }
    graph = helper.make_graph(
        nodes,
        "all",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 8, 16, 16])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in {
                "a": ["batch", 64, 16, 16],
                "f": ["batch", 4],
                "h": [64, 64],
                "i": [1, 64],
            }.items()
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    path = tmp_path / "all.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(("shape", "axis"), [((16, 8, 3, 3), 0), ((32, 16), 1), ((32, 16), 0)])
def test_each_channel_has_its_scale(rng: np.random.Generator, shape: tuple[int, ...], axis: int) -> None:
    weight = rng.uniform(-1, 1, shape).astype(np.float32)
    weight *= np.logspace(-3, 3, shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    q, scale = quantize_channels(weight.astype(np.float32), axis)
    assert q.dtype == np.int8 and q.shape == shape and scale.shape == (shape[axis],)
    for channel in range(shape[axis]):
        true = weight.take(channel, axis)
        error = np.abs(q.take(channel, axis) * scale[channel] - true)
        inside = np.abs(true) <= 127 * scale[channel]
        # Half a step, where nothing was clipped; and clipping never takes more than a fifth.
        assert error[inside].max() <= 0.5001 * scale[channel]
        assert error.max() <= 0.21 * np.abs(true).max()
        assert scale[channel] <= np.abs(true).max() / 127 * 1.0001


def test_uniform_weights_are_not_clipped() -> None:
    weight = np.linspace(-1, 1, 255, dtype=np.float32)[None].repeat(2, axis=0)
    q, scale = quantize_channels(weight, 0)
    np.testing.assert_allclose(scale, 1 / 127, rtol=1e-6)
    np.testing.assert_allclose(q * scale[:, None], weight, atol=1e-6)


def test_an_outlier_is_clipped_when_that_is_better(rng: np.random.Generator) -> None:
    weight = rng.uniform(-1, 1, (1, 20_000)).astype(np.float32)
    weight[0, 0] = 1.2
    q, scale = quantize_channels(weight, 0)
    assert scale[0] < 1.19 / 127
    plain = np.round(weight * 127 / 1.2) * 1.2 / 127
    assert ((q * scale - weight) ** 2).sum() < ((plain - weight) ** 2).sum()


def test_a_channel_of_zeros_stays_zero() -> None:
    q, scale = quantize_channels(np.zeros((3, 4), np.float32), 0)
    assert not q.any() and np.isfinite(scale).all()


def test_store(graph: Path, tmp_path: Path) -> None:
    target = tmp_path / "int8.onnx"
    quantized, kept = store_weights_int8(graph, target)
    before, after = onnx.load(graph), onnx.load(target)
    onnx.checker.check_model(after, full_check=True)
    assert quantized == len(AXES) and kept == len(before.graph.initializer) - len(AXES)
    dequantize = {node.output[0]: node for node in after.graph.node if node.op_type == "DequantizeLinear"}
    assert {name: node.attribute[0].i for name, node in dequantize.items()} == AXES
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    for tensor in before.graph.initializer:
        if tensor.name in AXES:
            assert tensor.name not in stored and stored[f"{tensor.name}_int8"].dtype == np.int8
            assert tuple(stored[f"{tensor.name}_int8"].shape) == tuple(tensor.dims)
        else:  # small, no weight of a product, or used in two ways
            assert np.array_equal(stored[tensor.name], numpy_helper.to_array(tensor))
    assert stored["small"].size < MIN_ENTRIES <= stored["shared"].size


def test_stored_graph_runs_alike_with_free_batch(graph: Path, tmp_path: Path) -> None:
    target = tmp_path / "int8.onnx"
    store_weights_int8(graph, target)
    rng = np.random.default_rng(1)
    for batch in (1, 3):
        feed = {"image": rng.normal(size=(batch, 8, 16, 16)).astype(np.float32)}
        truth, found = (
            onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["a", "f"], feed)
            for path in (graph, target)
        )
        for a, b in zip(truth, found, strict=True):
            error = np.linalg.norm(b - a) / np.linalg.norm(a)
            assert 1e-5 < error < 0.03  # something was rounded, and not much


def test_a_file_of_large_weights_shrinks_to_a_quarter(tmp_path: Path, rng: np.random.Generator) -> None:
    weight = rng.normal(size=(512, 512)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 512])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 512])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "a.onnx")
    assert store_weights_int8(tmp_path / "a.onnx", tmp_path / "b.onnx") == (1, 0)
    sizes = [(tmp_path / name).stat().st_size for name in ("a.onnx", "b.onnx")]
    assert sizes[0] / sizes[1] == pytest.approx(4.0, rel=0.05)


def test_a_weight_that_two_layers_share_is_stored_once(tmp_path: Path, rng: np.random.Generator) -> None:
    weight = rng.normal(size=(80, 80)).astype(np.float32)
    nodes = [
        helper.make_node("Identity", ["w"], ["w_again"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("MatMul", ["y", "w_again"], ["z"]),
        helper.make_node("Identity", ["z"], ["out"]),  # of no weight: stays
    ]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 80]) for name in ("x", "out")]
    initializers = [numpy_helper.from_array(weight, "w")]
    made = helper.make_graph(nodes, "shared", infos[:1], infos[1:], initializers)
    source, target = tmp_path / "shared.onnx", tmp_path / "int8.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), source)
    assert store_weights_int8(source, target) == (1, 0)
    assert [node.op_type for node in onnx.load(target).graph.node].count("Identity") == 1
    x = rng.normal(size=(3, 80)).astype(np.float32)
    found = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    truth = x @ weight @ weight
    assert np.abs(found - truth).max() < 0.02 * np.abs(truth).max()
