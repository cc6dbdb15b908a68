"""Nodes and constants of a graph that is being written, each with a name of its own."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.data_file import Array, DataFile

MICROSOFT = "com.microsoft"
"""Domain of the operators that ONNX Runtime adds to the standard ones."""


class GraphWriter:
    """Appends nodes in order; the same constant is stored once."""

    def __init__(self, prefix: str, data: DataFile | None = None) -> None:
        """Begin all names with a prefix; large constants go to a data file, in fp16."""
        self.prefix = prefix
        self.data = data
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {}
        self._same: dict[bytes, str] = {}

    def node(self, kind: str, *inputs: str, output: str = "", domain: str = "", **attributes: Any) -> str:
        """Append a node of one output; gives the output's name."""
        output = output or f"{self.prefix}{len(self.nodes)}"
        return self.node_of(kind, [output], *inputs, domain=domain, **attributes)[0]

    def node_of(
        self, kind: str, outputs: int | list[str], *inputs: str, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Append a node of several outputs, given by name or by their number; gives their names."""
        count = len(self.nodes)
        if isinstance(outputs, int):
            outputs = [f"{self.prefix}{count}_{index}" for index in range(outputs)]
        name = f"{self.prefix}node{count}"
        self.nodes.append(helper.make_node(kind, inputs, outputs, name, domain=domain, **attributes))
        return outputs

    def constant(self, values: Any, kind: type | None = None, use: str = "") -> str:
        """An initializer; stored once for each use, since one may stay fp32 and another not."""
        array = np.ascontiguousarray(values, kind).reshape(np.shape(values))
        apart = self.data is not None and array.dtype == np.float32 and self.data.takes(array)
        if apart:
            array = _halved(array)
        digest = hashlib.sha256(array.reshape(-1).view(np.uint8).data).digest()
        key = b"|".join((use.encode(), array.dtype.str.encode(), str(array.shape).encode(), digest))
        if key not in self._same:
            name = f"{self.prefix}constant{len(self._same)}"
            self._same[key] = name
            if apart:
                assert self.data is not None
                self.weights[name] = self.data.add(name, array)
            else:
                self.weights[name] = numpy_helper.from_array(array, name)
        return self._same[key]

    def sizes(self, *values: int) -> str:
        """A shape, permutation of axes or list of indices, as an int64 initializer."""
        return self.constant(values, np.int64)

    def reshape(self, value: str, *shape: int) -> str:
        """Another view of the same values."""
        return self.node("Reshape", value, self.sizes(*shape))


def _halved(array: Array) -> Array:
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError("it holds weights beyond what fp16 can say (65504)")
    return half
