"""A bundle's ONNX file as ONNX Runtime's CUDA provider runs it fastest: NHWC, fused operators, fp16.

What the provider has fused kernels for is written with them: attention, group norm with SiLU and the
sum before it, layer norm with its residual, convolutions on channels-last data.  Its own optimizer
library finds few of them in the multiview UNet, whose attention it does not know, so the graph is
written anew here, from the outputs back to the inputs.  Sizes are fixed, so that CUDA graphs can be.
Needs no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from export.data_file import Array, Constants, DataFile
from export.fused_block import BLOCK_MARK, MultiviewBlock, Sum
from export.graph_writer import MICROSOFT, GraphWriter
from export.typed_graph import IR_VERSION, OPSET, folded, sine_embeddings, tidied

TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
VIEWS_ONLY = frozenset(("Mul", "Reshape", "Transpose", "Unsqueeze"))
"""What leaves a value the same but for its shape or a constant factor."""


@dataclass(frozen=True)
class GroupNorm:
    """A group norm found in a graph, and whether a SiLU follows."""

    source: str
    gamma: Array
    beta: Array
    groups: int
    epsilon: float
    silu: bool = False


def fused_graph(
    source: Path, sizes: Mapping[str, int], data: DataFile | None = None, deterministic: bool = False
) -> onnx.ModelProto:
    """The network of an ONNX file in fp16 with ONNX Runtime's fused operators; inputs and outputs float32.

    Args:
        source: file of a bundle, fp32, its weights stored as fp32 or int8.
        sizes: all free dimensions, by name.
        data: takes large weights; a file that has its weights beside it needs one.
        deterministic: see `Fuser`.

    Raises:
        ValueError: ONNX Runtime refuses the graph.
    """
    model = folded(source, sizes, keep_int8=False, room=data.room if data else None)
    return in_half(Fuser(model, data, deterministic).model())


def in_half(model: onnx.ModelProto, keep_io: bool = True) -> onnx.ModelProto:
    """The fused graph in fp16, its inputs and outputs too unless `keep_io`.

    Fused norms and attention compute their sums in fp32 by themselves.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    half = convert_float_to_float16(
        model, keep_io_types=keep_io, op_block_list=[], disable_shape_infer=True,
        node_block_list=sine_embeddings(model),
    )  # fmt: skip
    return tidied(half)


class Fuser(GraphWriter):
    """Writes a graph anew, from its outputs to its inputs, each value once."""

    def __init__(
        self, model: onnx.ModelProto, data: DataFile | None = None, deterministic: bool = False
    ) -> None:
        """Take a graph of fixed sizes, constants folded, with the names torch gave its nodes.

        With a data file, what goes there is fp16 already: `in_half` must follow.  The group norm kernel of
        ONNX Runtime (1.31) adds fp32 sums in whatever order its blocks end, so that the same input gives
        other bits each time; `deterministic` does without it.
        """
        super().__init__("v", data)
        self.deterministic = deterministic
        self.source = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
        self.constants = Constants(self.source)
        self.maker = {name: node for node in self.source.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.source.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.shapes = self.constants.shapes()
        for value in (*self.source.value_info, *self.source.input, *self.source.output):
            self.shapes[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        self._inputs = {value.name for value in self.source.input}
        self._done: dict[str, str] = {}  # values in their own layout
        self._done_nhwc: dict[str, str] = {}
        self._done_norms: dict[tuple[str, bytes, bool], str] = {}
        self.blocks = self._find_blocks()

    def model(self) -> onnx.ModelProto:
        """The whole graph, fp32."""
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(limit + 20 * len(self.source.node))  # a value asks for those it is made of
        try:
            for value in self.source.output:
                self.node("Identity", self.value(value.name), output=value.name)
        finally:
            sys.setrecursionlimit(limit)
        graph = helper.make_graph(
            self.nodes, self.source.name, list(self.source.input), list(self.source.output),
            list(self.weights.values()),
        )  # fmt: skip
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)

    # Values

    def value(self, name: str) -> str:
        """A value of the source graph, in its own layout."""
        if not name or name in self._inputs:
            return name
        if name not in self._done:
            self._done[name] = self._made(name)
        return self._done[name]

    def _made(self, name: str) -> str:
        if name in self.constants:
            return self.constant(self.constants[name])
        node = self.maker[name]
        if len(self.shapes.get(name, ())) == 4 and self._is_image(name):
            return self.node("Transpose", self.nhwc(name), perm=TO_NCHW)
        if node.op_type == "Transpose" and self._perm(node) == TO_NHWC:
            return self.nhwc(node.input[0])
        block = self.blocks.get(name)
        if block is not None:
            return self.reshape(self._biased(block.written(self)), *self.shapes[name])
        inner = self._silu(node)
        if inner is not None:
            return self.node("QuickGelu", self.value(inner), domain=MICROSOFT, alpha=1.0)
        inputs = [self.value(entry) for entry in node.input]
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        outputs = self.node_of(node.op_type, len(node.output), *inputs, **attributes)
        self._done.update(zip(node.output, outputs, strict=True))
        return self._done[name]

    def nhwc(self, name: str) -> str:
        """A 4-D value of the source graph, channels last."""
        if name not in self._done_nhwc:
            self._done_nhwc[name] = self._made_nhwc(name)
        return self._done_nhwc[name]

    def _is_image(self, name: str) -> bool:
        """Whether a 4-D value is better made channels last."""
        node = self.maker.get(name)
        if node is None:
            return False
        if node.op_type == "Conv" or self._group_norm(name) is not None:
            return True
        if node.op_type == "Mul":
            inner = self._silu(node)
            return inner is not None and self._is_image(inner)
        if node.op_type in ("Add", "Concat", "Resize"):
            data = node.input[:1] if node.op_type == "Resize" else node.input
            return all(len(self.shapes[entry]) == 4 and self._is_image(entry) for entry in data)
        return node.op_type == "Transpose" and self._perm(node) == TO_NCHW

    def _made_nhwc(self, name: str) -> str:
        norm = self._group_norm(name)
        if norm is not None:
            return self._normed(norm)
        if not self._is_image(name):
            return self.node("Transpose", self.value(name), perm=TO_NHWC)
        node = self.maker[name]
        if node.op_type == "Conv":
            return self._conv(node, with_bias=True)
        if node.op_type == "Transpose":
            return self._biased(self._sum(name))
        if node.op_type == "Concat":
            return self.node("Concat", *(self.nhwc(entry) for entry in node.input), axis=3)
        if node.op_type == "Resize":
            scales = self.constant(self.constants[node.input[2]][list(TO_NHWC)])
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            return self.node("Resize", self.nhwc(node.input[0]), "", scales, **attributes)
        if node.op_type == "Add":
            return self._added(name, node)
        inner = self._silu(node)
        assert inner is not None
        return self.node("QuickGelu", self.nhwc(inner), domain=MICROSOFT, alpha=1.0)

    # Sums and their biases

    def _added(self, name: str, node: onnx.NodeProto) -> str:
        """A sum of images: made by the norm that reads it, if there is one."""
        for reader in self.readers.get(name, []):
            norm = self._norm_from(reader)
            if norm is not None and self._fusable(norm):
                self._normed(norm)
                return self._done_nhwc[name]
        first, second = (self._sum(entry) for entry in node.input)
        total = self.node("Add", first.value, second.value)
        return self._biased(Sum(total, _total(first.bias, second.bias)))

    def _sum(self, name: str) -> Sum:
        """A channels-last value; a bias that nobody else reads comes apart."""
        node = self.maker.get(name)
        if name not in self._done_nhwc and node is not None:
            alone = len(self.readers[name]) == 1
            if alone and node.op_type == "Conv" and len(node.input) == 3:
                return Sum(self._conv(node, with_bias=False), self.constants[node.input[2]])
            if node.op_type == "Transpose" and self._perm(node) == TO_NCHW:
                inner = self.maker.get(node.input[0])
                if alone and inner is not None and inner.op_type == "Reshape":
                    linear = self.linear(inner.input[0])
                    if linear is not None:
                        return Sum(self.reshape(linear.value, *self.shapes[node.input[0]]), linear.bias)
                self._done_nhwc[name] = self.value(node.input[0])
        return Sum(self.nhwc(name))

    def _biased(self, value: Sum) -> str:
        return value.value if value.bias is None else self.node("Add", value.value, self.constant(value.bias))

    def linear(self, name: str) -> Sum | None:
        """`Add(bias, MatMul(x, W))` with its bias apart; a block's own last bias goes through W."""
        node = self.maker.get(name)
        if node is None or node.op_type != "Add":
            return None
        shift = self.constant_of(node)
        product = next((self.maker[entry] for entry in node.input if entry in self.maker), None)
        if shift is None or product is None or product.op_type != "MatMul":
            return None
        weight = self.constants.get(product.input[1])
        if weight is None:
            return None
        block = self.blocks.get(product.input[0])
        if block is None or product.input[0] in self._done:
            return Sum(self.node("MatMul", self.value(product.input[0]), self.constant(weight)), shift)
        inner = block.written(self)
        through = None if inner.bias is None else inner.bias @ weight
        return Sum(self.node("MatMul", inner.value, self.constant(weight)), _total(shift, through))

    # Convolutions and group norms

    def _conv(self, node: onnx.NodeProto, *, with_bias: bool) -> str:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        attributes.pop("auto_pad", None)
        inputs = [self.nhwc(node.input[0]), self.constant(self.constants[node.input[1]].transpose(TO_NHWC))]
        if with_bias and len(node.input) == 3:
            inputs.append(self.constant(self.constants[node.input[2]]))
        return self.node("NhwcConv", *inputs, domain=MICROSOFT, **attributes)

    def _fusable(self, norm: GroupNorm) -> bool:
        """Whether the kernel, which reads channels in pairs, takes it, and may."""
        return len(norm.gamma) // norm.groups % 2 == 0 and not self.deterministic

    def _normed(self, norm: GroupNorm) -> str:
        key = (norm.source, norm.gamma.tobytes(), norm.silu)
        if key not in self._done_norms:
            fused = self._fusable(norm)
            self._done_norms[key] = self._normed_fused(norm) if fused else self._normed_plainly(norm)
        return self._done_norms[key]

    def _normed_fused(self, norm: GroupNorm) -> str:
        affine = [self.constant(array, np.float32, "group norm") for array in (norm.gamma, norm.beta)]
        attributes = {
            "groups": norm.groups, "epsilon": norm.epsilon, "activation": int(norm.silu), "channels_last": 1
        }  # fmt: skip
        node = self.maker.get(norm.source)
        summands = None
        if norm.source not in self._done_nhwc and node is not None and node.op_type == "Add":
            summands = self._summands(node)
        if summands is None:
            inputs = [self.nhwc(norm.source), *affine]
            return self.node("GroupNorm", *inputs, domain=MICROSOFT, **attributes)
        value, skip, bias = summands
        inputs = [value, *affine, skip] + ([] if bias is None else [self.constant(bias)])
        read_by_others = len(self.readers[norm.source]) > 1
        outputs = self.node_of(
            "SkipGroupNorm", 1 + read_by_others, *inputs, domain=MICROSOFT, **attributes
        )  # fmt: skip
        if read_by_others:
            self._done_nhwc[norm.source] = outputs[1]
        return outputs[0]

    def _summands(self, node: onnx.NodeProto) -> tuple[str, str, Array | None] | None:
        """An image, what is added to it, (n, h, w, c) or (n, c), and their biases' sum."""
        first, second = node.input
        for image, other in ((first, second), (second, first)):
            if len(self.shapes[image]) != 4 or not self._is_image(image):
                continue
            if self.shapes[other] == (*self.shapes[image][:2], 1, 1):
                value = self._sum(image)
                while other in self.maker and self.maker[other].op_type == "Unsqueeze":
                    other = self.maker[other].input[0]
                return value.value, self.value(other), value.bias
            if self.shapes[other] == self.shapes[image] and self._is_image(other):
                value, skip = self._sum(image), self._sum(other)
                return value.value, skip.value, _total(value.bias, skip.bias)
        return None

    def _normed_plainly(self, norm: GroupNorm) -> str:
        """With standard operators, where the fused kernel is not used."""
        n, c, h, w = self.shapes[norm.source]
        image = self.node("Transpose", self.nhwc(norm.source), perm=TO_NCHW)
        size = c // norm.groups * h * w
        ones, zeros = self.constant(np.ones(size, np.float32)), self.constant(np.zeros(size, np.float32))
        grouped = self.reshape(image, n, norm.groups, size)
        normed = self.node("LayerNormalization", grouped, ones, zeros, axis=-1, epsilon=norm.epsilon)
        back = self.node("Transpose", self.reshape(normed, n, c, h, w), perm=TO_NHWC)
        scaled = self.node("Mul", back, self.constant(norm.gamma))
        shifted = self.node("Add", scaled, self.constant(norm.beta))
        return self.node("QuickGelu", shifted, domain=MICROSOFT, alpha=1.0) if norm.silu else shifted

    # Matching

    def _group_norm(self, name: str) -> GroupNorm | None:
        """The group norm, and its SiLU, whose result `name` is: as the exporter writes it."""
        node = self.maker.get(name)
        if node is None:
            return None
        inner = self._silu(node)
        if inner is not None:
            found = self._group_norm(inner)
            return None if found is None else replace(found, silu=True)
        chain = self._chain(node, "Add", "Mul", "Reshape", "InstanceNormalization", "Reshape")
        if chain is None:
            return None
        add, mul, _, norm, reshape = chain
        gamma, beta = self.constant_of(mul), self.constant_of(add)
        if gamma is None or beta is None:
            return None
        groups, epsilon = self.shapes[norm.input[0]][1], self.attribute(norm, "epsilon")
        return GroupNorm(reshape.input[0], gamma.reshape(-1), beta.reshape(-1), groups, epsilon)

    def _norm_from(self, node: onnx.NodeProto) -> GroupNorm | None:
        """The group norm, and its SiLU, that begins at a node."""
        if node.op_type != "Reshape":
            return None
        name = node.output[0]
        for kind in ("InstanceNormalization", "Reshape", "Mul", "Add"):
            following = self.readers.get(name, [])
            if len(following) != 1 or following[0].op_type != kind:
                return None
            name = following[0].output[0]
        for reader in self.readers.get(name, []):
            if self._silu(reader) == name:
                return self._group_norm(reader.output[0])
        return self._group_norm(name)

    def _chain(self, start: onnx.NodeProto, *kinds: str) -> list[onnx.NodeProto] | None:
        """Nodes of these kinds, each the maker of the one before's only input that is no constant."""
        found: list[onnx.NodeProto] = []
        node: onnx.NodeProto | None = start
        for kind in kinds:
            if node is None or node.op_type != kind:
                return None
            found.append(node)
            data = [entry for entry in node.input if entry not in self.constants]
            if len(data) != 1:
                return None
            node = self.maker.get(data[0])
        return found

    def origin(self, name: str) -> str:
        """The value that another is only a moved or scaled view of."""
        return origin(name, self.maker, self.constants)

    def _silu(self, node: onnx.NodeProto) -> str | None:
        """x of `Mul(x, Sigmoid(x))`."""
        if node.op_type != "Mul":
            return None
        for inner, gate in ((0, 1), (1, 0)):
            made = self.maker.get(node.input[gate])
            if made is not None and made.op_type == "Sigmoid" and made.input[0] == node.input[inner]:
                return str(node.input[inner])
        return None

    def constant_of(self, node: onnx.NodeProto) -> Array | None:
        """The first of a node's inputs that is a constant."""
        return next((self.constants[entry] for entry in node.input if entry in self.constants), None)

    def attribute(self, node: onnx.NodeProto, name: str) -> Any:
        """A node's attribute that must be there."""
        return next(helper.get_attribute_value(a) for a in node.attribute if a.name == name)

    def _perm(self, node: onnx.NodeProto) -> tuple[int, ...]:
        return tuple(self.attribute(node, "perm"))

    def _find_blocks(self) -> dict[str, MultiviewBlock]:
        """Blocks of the multiview UNet, by the value that leaves each."""
        prefixes = [n.name[: -len(BLOCK_MARK)] for n in self.source.node if n.name.endswith(BLOCK_MARK)]
        found = (MultiviewBlock.found(self, prefix) for prefix in prefixes)
        return {block.output: block for block in found if block is not None}


def origin(name: str, maker: Mapping[str, onnx.NodeProto], constants: Container[str]) -> str:
    """The value that another is only a moved or scaled view of.

    Args:
        name: of a value.
        maker: the node that makes each value.
        constants: names of constants.
    """
    while name in maker and maker[name].op_type in VIEWS_ONLY:
        data = [entry for entry in maker[name].input if entry not in constants]
        if len(data) != 1:
            break
        name = data[0]
    return name


def _total(*biases: Array | None) -> Array | None:
    known = [bias for bias in biases if bias is not None]
    return np.sum(known, axis=0) if known else None
