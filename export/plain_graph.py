"""ONNX Runtime's fused operators written with standard ones, so that a CPU can check a fused graph.

The kernels sum in fp32 whatever they are given; so does what stands here in their place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from export.fused_graph import TO_NCHW, TO_NHWC
from export.graph_writer import MICROSOFT, GraphWriter

Attributes = dict[str, Any]


def plain_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a fused graph, fp32 or fp16, that any ONNX runtime runs."""
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    writer = _Writer(plain)
    for node in plain.graph.node:
        if node.domain == MICROSOFT:
            writer.write(node)
        else:
            writer.nodes.append(node)
    del plain.graph.node[:]
    plain.graph.node.extend(writer.nodes)
    plain.graph.initializer.extend(writer.weights.values())
    kept = [opset for opset in plain.opset_import if opset.domain != MICROSOFT]
    del plain.opset_import[:]
    plain.opset_import.extend(kept)
    return plain


class _Writer(GraphWriter):
    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__("plain_")
        weights = model.graph.initializer
        self._kind = TensorProto.FLOAT
        if any(tensor.data_type == TensorProto.FLOAT16 for tensor in weights):
            self._kind = TensorProto.FLOAT16

    def write(self, node: onnx.NodeProto) -> None:
        """The node's outputs, computed in fp32 from its inputs."""
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        inputs = [self.node("Cast", name, to=TensorProto.FLOAT) if name else "" for name in node.input]
        made = _WRITERS[node.op_type](self, attributes, *inputs)
        for name, value in zip(node.output, made, strict=False):
            if name:
                self.node("Cast", value, output=name, to=self._kind)


def _nhwc_conv(w: _Writer, attributes: Attributes, x: str, weight: str, *bias: str) -> list[str]:
    image, kernel = (w.node("Transpose", value, perm=TO_NCHW) for value in (x, weight))
    return [w.node("Transpose", w.node("Conv", image, kernel, *bias, **attributes), perm=TO_NHWC)]


def _group_norm(w: _Writer, attributes: Attributes, x: str, gamma: str, beta: str) -> list[str]:
    groups = attributes["groups"]
    image = w.node("Transpose", x, perm=TO_NCHW)
    grouped = w.node("Reshape", image, w.sizes(0, groups, -1))
    ones, zeros = w.constant(np.ones(groups, np.float32)), w.constant(np.zeros(groups, np.float32))
    normed = w.node("InstanceNormalization", grouped, ones, zeros, epsilon=attributes["epsilon"])
    back = w.node("Transpose", w.node("Reshape", normed, w.node("Shape", image)), perm=TO_NHWC)
    out = w.node("Add", w.node("Mul", back, gamma), beta)
    return [w.node("Mul", out, w.node("Sigmoid", out)) if attributes["activation"] else out]


def _skip_group_norm(
    w: _Writer, attributes: Attributes, x: str, gamma: str, beta: str, skip: str, *bias: str
) -> list[str]:
    # The skip is (n, h, w, c), or (n, c) for all pixels alike: (n, ., c) fits both.
    rows, columns = w.node("Shape", skip, start=0, end=1), w.node("Shape", skip, start=-1)
    spread = w.node("Reshape", skip, w.node("Concat", rows, w.sizes(-1), columns, axis=0))
    flat = w.node("Reshape", x, w.node("Concat", rows, w.sizes(-1), columns, axis=0))
    total = w.node("Reshape", w.node("Add", flat, spread), w.node("Shape", x))
    for entry in bias:
        total = w.node("Add", total, entry)
    return [*_group_norm(w, attributes, total, gamma, beta), total]


def _skip_layer_norm(
    w: _Writer, attributes: Attributes, x: str, skip: str, gamma: str, beta: str, *bias: str
) -> list[str]:
    total = w.node("Add", x, skip)
    for entry in bias:
        total = w.node("Add", total, entry)
    normed = w.node("LayerNormalization", total, gamma, beta, axis=-1, epsilon=attributes["epsilon"])
    return [normed, "", "", total]


def _attention(w: _Writer, attributes: Attributes, q: str, k: str, v: str) -> list[str]:
    heads = attributes["num_heads"]

    def apart(value: str, perm: tuple[int, ...]) -> str:
        return w.node("Transpose", w.node("Reshape", value, w.sizes(0, 0, heads, -1)), perm=perm)

    query, key, value = apart(q, (0, 2, 1, 3)), apart(k, (0, 2, 3, 1)), apart(v, (0, 2, 1, 3))
    width = w.node("Cast", w.node("Shape", query, start=3), to=TensorProto.FLOAT)
    scores = w.node("Div", w.node("MatMul", query, key), w.node("Sqrt", width))
    mixed = w.node("MatMul", w.node("Softmax", scores, axis=-1), value)
    together = w.node("Transpose", mixed, perm=(0, 2, 1, 3))
    return [w.node("Reshape", together, w.sizes(0, 0, -1))]


def _gelu(w: _Writer, x: str) -> str:
    erf = w.node("Erf", w.node("Mul", x, w.constant(0.5**0.5, np.float32)))
    return w.node(
        "Mul", w.node("Mul", x, w.constant(0.5, np.float32)), w.node("Add", erf, w.constant(1.0, np.float32))
    )


def _bias_gelu(w: _Writer, attributes: Attributes, x: str, bias: str) -> list[str]:
    return [_gelu(w, w.node("Add", x, bias))]


def _bias_split_gelu(w: _Writer, attributes: Attributes, x: str, bias: str) -> list[str]:
    hidden, gate = w.node_of("Split", 2, w.node("Add", x, bias), axis=-1, num_outputs=2)
    return [w.node("Mul", hidden, _gelu(w, gate))]


def _quick_gelu(w: _Writer, attributes: Attributes, x: str) -> list[str]:
    return [
        w.node("Mul", x, w.node("Sigmoid", w.node("Mul", x, w.constant(attributes["alpha"], np.float32))))
    ]


_WRITERS = {
    "BiasGelu": _bias_gelu,
    "BiasSplitGelu": _bias_split_gelu,
    "GroupNorm": _group_norm,
    "MultiHeadAttention": _attention,
    "NhwcConv": _nhwc_conv,
    "QuickGelu": _quick_gelu,
    "SkipGroupNorm": _skip_group_norm,
    "SkipLayerNormalization": _skip_layer_norm,
}
