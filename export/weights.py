"""Weights stored as per-channel int8 with DequantizeLinear: a quarter of the bytes, fp32 arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.data_file import DataFile, array_of, data_path, is_apart, least_entries, load_graph, store

MIN_ENTRIES = 4096
"""Smaller tensors (biases, norms) stay float32."""


def quantize_channels(weight: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 with one scale a channel: `weight ≈ q * scale`, q in [-127, 127].

    The scale of each channel is the one of a few clipped candidates with the least squared error.
    """
    moved = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    peak = np.maximum(np.abs(moved).max(axis=1), 1e-12)
    best_error = np.full(len(moved), np.inf)
    best_scale = peak / 127.0
    for clip in (1.0, 0.95, 0.9, 0.85, 0.8):
        scale = peak * clip / 127.0
        rounded = np.clip(np.round(moved / scale[:, None]), -127, 127) * scale[:, None]
        error = ((rounded - moved) ** 2).sum(axis=1)
        better = error < best_error
        best_error, best_scale = np.where(better, error, best_error), np.where(better, scale, best_scale)
    shape = [1] * weight.ndim
    shape[axis] = -1
    scale = best_scale.astype(np.float32)
    q = np.clip(np.round(weight / scale.reshape(shape)), -127, 127).astype(np.int8)
    return q, scale


def store_weights_int8(source: Path, target: Path) -> tuple[int, int]:
    """Rewrite an ONNX file with its large float32 weights as int8 and DequantizeLinear.

    Returns:
        `(quantized, kept)`: how many weight tensors became int8, and how many stayed as they were.
    """
    model = load_graph(source)
    with DataFile(target.with_suffix(".weights"), least_entries(model)) as data:
        counts = _store_int8(model, data if data_path(source) else None)
        store(model, target, data)
    onnx.checker.check_model(str(target))
    return counts


def _store_int8(model: onnx.ModelProto, data: DataFile | None) -> tuple[int, int]:
    """The same in place; large weights go to a data file if there is one."""
    graph = model.graph

    def initializer(array: NDArray[Any], name: str) -> onnx.TensorProto:
        large = data is not None and data.takes(array)
        return data.add(name, array) if data is not None and large else numpy_helper.from_array(array, name)

    read_shared_weights_directly(graph)
    uses: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in graph.node:
        for position, name in enumerate(node.input):
            uses.setdefault(name, []).append((node, position))
    kept, new_nodes, quantized = [], [], 0
    for tensor in graph.initializer:
        axis = _channel_axis(tensor, uses.get(tensor.name, []))
        if axis is None:
            kept.append(initializer(array_of(tensor), tensor.name) if is_apart(tensor) else tensor)
            continue
        q, scale = quantize_channels(np.asarray(array_of(tensor)), axis)
        kept += [
            initializer(q, f"{tensor.name}_int8"),
            numpy_helper.from_array(scale, f"{tensor.name}_scale"),
        ]
        new_nodes.append(
            helper.make_node(
                "DequantizeLinear",
                [f"{tensor.name}_int8", f"{tensor.name}_scale"],
                [tensor.name],
                name=f"{tensor.name}_dequantize",
                axis=axis,
            )  # fmt: skip
        )
        quantized += 1
    nodes = [*new_nodes, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)
    return quantized, len(kept) - 2 * quantized


def read_shared_weights_directly(graph: onnx.GraphProto) -> None:
    """Drop the Identity nodes through which the exporter hands a weight to its second reader."""
    weights = {tensor.name for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    source: dict[str, str] = {}
    nodes = []
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = source.get(name, name)
        if node.op_type == "Identity" and node.input[0] in weights and node.output[0] not in outputs:
            source[node.output[0]] = node.input[0]
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _channel_axis(tensor: onnx.TensorProto, uses: list[tuple[onnx.NodeProto, int]]) -> int | None:
    """The output-channel axis of a convolution or matrix weight; None for anything else."""
    if tensor.data_type != TensorProto.FLOAT or int(np.prod(tensor.dims)) < MIN_ENTRIES or not uses:
        return None
    kinds = {(node.op_type, position) for node, position in uses}
    if kinds == {("Conv", 1)}:
        return 0
    if kinds == {("MatMul", 1)} and len(tensor.dims) == 2:
        return 1
    if kinds == {("Gemm", 1)}:
        transposed = {
            attribute.i for node, _ in uses for attribute in node.attribute if attribute.name == "transB"
        }
        return 0 if transposed == {1} else 1
    return None
