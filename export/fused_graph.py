"""A bundle's ONNX file as ONNX Runtime's CUDA provider runs it fastest: NHWC, fused operators, fp16.

What the provider has fused kernels for is written with them: attention, group norm with SiLU and the
sum before it, layer norm with its residual, convolutions on channels-last data.  Its own optimizer
library makes few of them from the multiview UNet, whose attention it does not know, so the graph is
written anew here, from the outputs back to the inputs.  Sizes are fixed, so that CUDA graphs can be.
Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from export.typed_graph import IR_VERSION, OPSET, folded, sine_embeddings, tidied

MICROSOFT = "com.microsoft"
TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
VIEWS_ONLY = frozenset(("Mul", "Reshape", "Transpose", "Unsqueeze"))
SPLIT_GELU_WIDTHS = (2560, 5120, 10240)
"""All that ONNX Runtime's BiasSplitGelu kernel was compiled for."""

Array = NDArray[Any]


@dataclass(frozen=True)
class GroupNorm:
    """A group norm found in a graph, and the SiLU after it."""

    source: str
    gamma: Array
    beta: Array
    groups: int
    epsilon: float
    silu: bool


@dataclass(frozen=True)
class Sum:
    """A value as the sum that a fused norm takes: without a bias that is added later (channels,)."""

    value: str
    bias: Array | None = None


def fused_graph(source: Path, sizes: Mapping[str, int]) -> onnx.ModelProto:
    """The network of an ONNX file in fp16 with ONNX Runtime's fused operators; inputs and outputs float32.

    Args:
        source: file of a bundle, fp32, its weights stored as fp32 or int8.
        sizes: all free dimensions, by name.

    Raises:
        ValueError: ONNX Runtime refuses the graph.
    """
    return in_half(Fuser(folded(source, sizes, keep_int8=False)).model())


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


class Fuser:
    """Writes a graph anew, from its outputs to its inputs, each value once."""

    def __init__(self, model: onnx.ModelProto) -> None:
        """Take a graph of fixed sizes, constants folded, with the names torch gave its nodes."""
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        self.source = inferred.graph
        self.constants = {t.name: numpy_helper.to_array(t) for t in self.source.initializer}
        self.maker = {name: node for node in self.source.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.source.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        values = (*self.source.value_info, *self.source.input, *self.source.output)
        self.shapes = {
            value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in values
        }
        self.shapes |= {name: array.shape for name, array in self.constants.items()}
        self.inputs = {value.name for value in self.source.input}
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Array] = {}
        self.same: dict[bytes, str] = {}
        self.done: dict[str, str] = {}  # values in their own layout
        self.done_nhwc: dict[str, str] = {}
        self.blocks = self._find_blocks()

    def model(self) -> onnx.ModelProto:
        """The whole graph."""
        outputs = []
        for value in self.source.output:
            made = self.value(value.name)
            outputs.append(self.node("Identity", [made], name=value.name))
        graph = helper.make_graph(
            self.nodes, self.source.name, list(self.source.input), list(self.source.output),
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)

    # Writing

    def node(self, kind: str, inputs: list[str], domain: str = "", name: str = "", **attributes: Any) -> str:
        """Append a node of one output; gives the output's name."""
        output = name or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], f"n{len(self.nodes)}", domain=domain, **attributes))
        return output

    def constant(self, array: Array, use: str = "") -> str:
        """An initializer; the same array is stored once for each use, as one may stay fp32 and another not."""
        array = np.ascontiguousarray(array)
        key = b"|".join((use.encode(), array.dtype.str.encode(), str(array.shape).encode(), array.tobytes()))
        if key not in self.same:
            self.same[key] = f"c{len(self.weights)}"
            self.weights[self.same[key]] = array
        return self.same[key]

    def reshape(self, value: str, *shape: int) -> str:
        """Another view of the same values."""
        return self.node("Reshape", [value, self.constant(np.array(shape, np.int64))])

    def transpose(self, value: str, perm: tuple[int, ...]) -> str:
        """Axes in another order."""
        return self.node("Transpose", [value], perm=perm)

    # Values

    def value(self, name: str) -> str:
        """A value of the source graph, in its own layout."""
        if not name or name in self.inputs:
            return name
        if name not in self.done:
            self.done[name] = self._made(name)
        return self.done[name]

    def _made(self, name: str) -> str:
        if name in self.constants:
            return self.constant(self.constants[name])
        node = self.maker[name]
        if len(self.shapes.get(name, ())) == 4 and self._is_image(name):
            return self.transpose(self.nhwc(name), TO_NCHW)
        if node.op_type == "Transpose" and self._perm(node) == TO_NHWC:
            return self.nhwc(node.input[0])
        block = self.blocks.get(name)
        if block is not None:
            made = block.written(self)
            return self.reshape(self.biased(made), *self.shapes[name])
        if node.op_type == "Mul" and (inner := self._silu(node)) is not None:
            return self.node("QuickGelu", [self.value(inner)], MICROSOFT, alpha=1.0)
        return self._copied(node, name)

    def _copied(self, node: onnx.NodeProto, name: str) -> str:
        inputs = [self.value(entry) for entry in node.input]
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        del copy.input[:], copy.output[:]
        copy.input.extend(inputs)
        outputs = [f"v{len(self.nodes)}_{index}" for index in range(len(node.output))]
        copy.output.extend(outputs)
        copy.name = f"n{len(self.nodes)}"
        self.nodes.append(copy)
        self.done.update(zip(node.output, outputs, strict=True))
        return self.done[name]

    def _is_image(self, name: str) -> bool:
        """Whether a 4-D value is better made channels-last."""
        node = self.maker.get(name)
        if node is None:
            return False
        if node.op_type == "Conv" or self._group_norm(name) is not None:
            return True
        if node.op_type == "Mul":
            inner = self._silu(node)
            return inner is not None and self._is_image(inner)
        if node.op_type in ("Add", "Concat", "Resize"):
            return all(len(self.shapes[entry]) == 4 and self._is_image(entry) for entry in self._data(node))
        return node.op_type == "Transpose" and self._perm(node) == TO_NCHW

    def _data(self, node: onnx.NodeProto) -> list[str]:
        return [node.input[0]] if node.op_type == "Resize" else list(node.input)

    def nhwc(self, name: str) -> str:
        """A 4-D value of the source graph, channels last."""
        if name not in self.done_nhwc:
            self.done_nhwc[name] = self._made_nhwc(name)
        return self.done_nhwc[name]

    def _made_nhwc(self, name: str) -> str:
        node = self.maker.get(name)
        norm = None if node is None else self._group_norm(name)
        if norm is not None:
            return self._normed(norm)
        if node is None or not self._is_image(name):
            return self.transpose(self.value(name), TO_NHWC)
        if node.op_type == "Conv":
            return self._conv(node, with_bias=True)
        if node.op_type == "Transpose":
            return self.biased(self.sum(name))
        if node.op_type == "Concat":
            return self.node("Concat", [self.nhwc(entry) for entry in node.input], axis=3)
        if node.op_type == "Resize":
            scales = self.constants[node.input[2]][[0, 2, 3, 1]]
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            return self.node("Resize", [self.nhwc(node.input[0]), "", self.constant(scales)], **attributes)
        if node.op_type == "Add":
            for reader in self.readers.get(name, []):
                found = self._norm_from(reader)
                if found is not None and self._fusable(found):
                    self._normed(found)  # makes the sum too
                    return self.done_nhwc[name]
            first, second = (self.sum(entry) for entry in node.input)
            biases = [entry.bias for entry in (first, second) if entry.bias is not None]
            total = self.node("Add", [first.value, second.value])
            return self.biased(Sum(total, np.sum(biases, axis=0) if biases else None))
        inner = self._silu(node)
        assert inner is not None
        return self.node("QuickGelu", [self.nhwc(inner)], MICROSOFT, alpha=1.0)

    def sum(self, name: str) -> Sum:
        """A channels-last value whose bias, if it has one that nobody else needs, comes apart."""
        node = self.maker.get(name)
        if name not in self.done_nhwc and node is not None and len(self.readers[name]) == 1:
            if node.op_type == "Conv" and len(node.input) == 3:
                return Sum(self._conv(node, with_bias=False), self.constants[node.input[2]])
            if node.op_type == "Transpose" and self._perm(node) == TO_NCHW:
                inner = self.maker.get(node.input[0])
                if inner is not None and inner.op_type == "Reshape":
                    linear = self._linear(inner.input[0])
                    if linear is not None:
                        return Sum(self.reshape(linear.value, *self.shapes[node.input[0]]), linear.bias)
        if name not in self.done_nhwc and node is not None and node.op_type == "Transpose":
            self.done_nhwc[name] = self.value(node.input[0])
        return Sum(self.nhwc(name))

    def biased(self, value: Sum) -> str:
        """The value with its bias added."""
        if value.bias is None:
            return value.value
        return self.node("Add", [value.value, self.constant(value.bias)])

    # Convolutions and norms

    def _conv(self, node: onnx.NodeProto, *, with_bias: bool) -> str:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        attributes.pop("auto_pad", None)
        weight = self.constants[node.input[1]].transpose(0, 2, 3, 1)
        inputs = [self.nhwc(node.input[0]), self.constant(weight)]
        if with_bias and len(node.input) == 3:
            inputs.append(self.constant(self.constants[node.input[2]]))
        return self.node("NhwcConv", inputs, MICROSOFT, **attributes)

    def _group_norm(self, name: str) -> GroupNorm | None:
        """The group norm, and its SiLU, whose result `name` is."""
        node = self.maker.get(name)
        if node is None:
            return None
        if node.op_type == "Mul" and (inner := self._silu(node)) is not None:
            found = self._group_norm(inner)
            return None if found is None else GroupNorm(**{**vars(found), "silu": True})
        chain = self._chain(node, "Add", "Mul", "Reshape", "InstanceNormalization", "Reshape")
        if chain is None:
            return None
        add, mul, _, norm, reshape = chain
        gamma, beta = self._constant_of(mul), self._constant_of(add)
        if gamma is None or beta is None:
            return None
        groups = self.shapes[norm.input[0]][1]
        return GroupNorm(
            reshape.input[0], gamma.reshape(-1), beta.reshape(-1), groups, self._attribute(norm, "epsilon"), False
        )

    def _norm_from(self, node: onnx.NodeProto) -> GroupNorm | None:
        """The group norm that begins at a node."""
        if node.op_type != "Reshape":
            return None
        name = node.output[0]
        for kind in ("InstanceNormalization", "Reshape", "Mul", "Add"):
            following = self.readers.get(name, [])
            if len(following) != 1 or following[0].op_type != kind:
                return None
            name = following[0].output[0]
        after = self.readers.get(name, [])
        for reader in after:
            if reader.op_type == "Mul" and self._silu(reader) == name:
                return self._group_norm(reader.output[0])
        return self._group_norm(name)

    def _fusable(self, norm: GroupNorm) -> bool:
        """Whether the kernel, which reads channels in pairs, takes it."""
        return len(norm.gamma) // norm.groups % 2 == 0

    def _normed(self, norm: GroupNorm) -> str:
        if not self._fusable(norm):
            return self._normed_plainly(norm)
        key = f"{norm.source}|norm|{norm.silu}|{norm.epsilon}|{hash(norm.gamma.tobytes())}"
        if key in self.done_nhwc:
            return self.done_nhwc[key]
        affine = [self.constant(values.astype(np.float32), "group norm") for values in (norm.gamma, norm.beta)]
        attributes = {
            "groups": norm.groups, "epsilon": norm.epsilon, "activation": int(norm.silu), "channels_last": 1
        }  # fmt: skip
        node = self.maker.get(norm.source)
        if norm.source not in self.done_nhwc and node is not None and node.op_type == "Add":
            parts = self._skip(node)
            if parts is not None:
                value, skip, bias = parts
                inputs = [value, *affine, skip] + ([] if bias is None else [self.constant(bias)])
                outputs = [f"v{len(self.nodes)}", ""]
                if len(self.readers[norm.source]) > 1:
                    outputs[1] = f"v{len(self.nodes)}_sum"
                    self.done_nhwc[norm.source] = outputs[1]
                self.nodes.append(
                    helper.make_node(
                        "SkipGroupNorm", inputs, outputs if outputs[1] else outputs[:1], f"n{len(self.nodes)}",
                        domain=MICROSOFT, **attributes,
                    )  # fmt: skip
                )
                self.done_nhwc[key] = outputs[0]
                return outputs[0]
        made = self.node("GroupNorm", [self.nhwc(norm.source), *affine], MICROSOFT, **attributes)
        self.done_nhwc[key] = made
        return made

    def _skip(self, node: onnx.NodeProto) -> tuple[str, str, Array | None] | None:
        """The two summands of an Add and their biases' sum, as SkipGroupNorm takes them."""
        first, second = node.input
        for image, other in ((first, second), (second, first)):
            if len(self.shapes[image]) != 4 or not self._is_image(image):
                continue
            if self.shapes[other] == (*self.shapes[image][:2], 1, 1):
                value = self.sum(image)
                while other in self.maker and self.maker[other].op_type == "Unsqueeze":
                    other = self.maker[other].input[0]  # (n, c)
                return value.value, self.value(other), value.bias
            if self.shapes[other] == self.shapes[image] and self._is_image(other):
                value, skip = self.sum(image), self.sum(other)
                biases = [entry.bias for entry in (value, skip) if entry.bias is not None]
                return value.value, skip.value, np.sum(biases, axis=0) if biases else None
        return None

    def _normed_plainly(self, norm: GroupNorm) -> str:
        """Standard operators, channels last: for groups that the fused kernel does not take."""
        n, c, h, w = self.shapes[norm.source]
        grouped = self.reshape(self.transpose(self.nhwc(norm.source), TO_NCHW), n, norm.groups, -1)
        ones, zeros = np.ones(c * h * w // norm.groups, np.float32), np.zeros(c * h * w // norm.groups, np.float32)
        normed = self.node(
            "LayerNormalization", [grouped, self.constant(ones), self.constant(zeros)], axis=-1, epsilon=norm.epsilon
        )
        back = self.transpose(self.reshape(normed, n, c, h, w), TO_NHWC)
        scaled = self.node("Mul", [back, self.constant(norm.gamma)])
        shifted = self.node("Add", [scaled, self.constant(norm.beta)])
        return self.node("QuickGelu", [shifted], MICROSOFT, alpha=1.0) if norm.silu else shifted

    # Matching

    def _linear(self, name: str) -> Sum | None:
        """`Add(bias, MatMul(x, W))` with its bias apart; a block's pending bias goes through the weight."""
        node = self.maker.get(name)
        if node is None or node.op_type != "Add":
            return None
        for bias, product in ((0, 1), (1, 0)):
            made = self.maker.get(node.input[product])
            if node.input[bias] in self.constants and made is not None and made.op_type == "MatMul":
                shift, weight = self.constants[node.input[bias]], self.constants.get(made.input[1])
                if weight is None:
                    return None
                block = self.blocks.get(made.input[0])
                if block is not None and made.input[0] not in self.done:
                    inner = block.written(self)
                    if inner.bias is not None:
                        shift = shift + inner.bias @ weight
                    return Sum(self.node("MatMul", [inner.value, self.constant(weight)]), shift)
                return Sum(self.node("MatMul", [self.value(made.input[0]), self.constant(weight)]), shift)
        return None

    def _chain(self, node: onnx.NodeProto, *kinds: str) -> list[onnx.NodeProto] | None:
        """Nodes of these kinds, each the maker of the one before's only input that is no constant."""
        found: list[onnx.NodeProto] = []
        for kind in kinds:
            if node is None or node.op_type != kind:
                return None
            found.append(node)
            data = [entry for entry in node.input if entry not in self.constants]
            if len(data) != 1:
                return None
            node = self.maker.get(data[0])  # type: ignore[assignment]
        return found

    def origin(self, name: str) -> str:
        """The value that another is only a moved or scaled view of."""
        while name in self.maker and self.maker[name].op_type in VIEWS_ONLY:
            data = [entry for entry in self.maker[name].input if entry not in self.constants]
            if len(data) != 1:
                break
            name = data[0]
        return name

    def _silu(self, node: onnx.NodeProto) -> str | None:
        """x of `Mul(x, Sigmoid(x))`."""
        for inner, gate in ((0, 1), (1, 0)):
            made = self.maker.get(node.input[gate])
            if made is not None and made.op_type == "Sigmoid" and made.input[0] == node.input[inner]:
                return str(node.input[inner])
        return None

    def _constant_of(self, node: onnx.NodeProto) -> Array | None:
        return next((self.constants[entry] for entry in node.input if entry in self.constants), None)

    def _attribute(self, node: onnx.NodeProto, name: str) -> Any:
        return next(helper.get_attribute_value(a) for a in node.attribute if a.name == name)

    def _perm(self, node: onnx.NodeProto) -> tuple[int, ...]:
        return tuple(self._attribute(node, "perm"))

    # Transformer blocks

    def _find_blocks(self) -> dict[str, MultiviewBlock]:
        """Blocks of the multiview UNet, by the value that leaves each."""
        ends = "/norm_row/LayerNormalization"
        prefixes = [n.name[: -len(ends)] for n in self.source.node if n.name.endswith(ends)]
        found = {}
        for prefix in prefixes:
            block = MultiviewBlock.found(self, prefix)
            if block is not None:
                found[block.output] = block
        return found


@dataclass
class MultiviewBlock:
    """A transformer block of `train/multiview_unet.py`: self-, row-wise and cross-attention, feed-forward.

    Tokens are (b, (v + 1) n, c), the input picture's last.  Row-wise attention takes them in another
    order, which two gathers make.
    """

    prefix: str
    named: dict[str, onnx.NodeProto]
    source: str  # what enters, (b (v + 1), n, c)
    output: str
    image: tuple[str, str]  # keys and values of cross-attention, (b, tokens, c)
    made: Sum | None = None

    @classmethod
    def found(cls, fuser: Fuser, prefix: str) -> MultiviewBlock | None:
        """The block whose nodes' names begin with a prefix, if it has all its parts."""
        named = {n.name[len(prefix) + 1 :]: n for n in fuser.source.node if n.name.startswith(prefix + "/")}
        inside = {name for node in named.values() for name in node.output}
        if "Add" not in named or "Reshape" not in named:
            return None
        leaving = [
            name for name in inside
            if any(not reader.name.startswith(prefix + "/") for reader in fuser.readers.get(name, []))
        ]  # fmt: skip
        parts = [
            "Softmax", "attn2/Softmax",
            *(f"{at}to_{what}/MatMul" for at in ("", "attn_row/", "attn2/") for what in "qkv"),
            *(f"{at}to_out.0/{kind}" for at in ("", "attn_row/", "attn2/") for kind in ("MatMul", "Add")),
            *(f"{norm}/LayerNormalization" for norm in ("norm1", "norm_row", "norm2", "norm3")),
            *(f"ff/net.{part}/{kind}" for part in ("0/proj", "2") for kind in ("MatMul", "Add")),
        ]
        if len(leaving) != 1 or any(part not in named for part in parts):
            return None
        softmax = named["attn2/Softmax"]
        scores, weighted = fuser.maker[softmax.input[0]], fuser.readers[softmax.output[0]][0]
        image = (fuser.origin(scores.input[1]), fuser.origin(weighted.input[1]))
        return cls(prefix, named, str(named["Reshape"].input[0]), leaving[0], image)

    def written(self, f: Fuser) -> Sum:
        """Write the block once; its last bias is left to who reads it."""
        if self.made is None:
            self.made = self._written(f)
        return self.made

    def _weight(self, f: Fuser, part: str) -> Array:
        return f.constants[self.named[f"{part}/MatMul"].input[1]]

    def _bias(self, f: Fuser, part: str) -> Array:
        found = f._constant_of(self.named[f"{part}/Add"])
        assert found is not None
        return found

    def _norm(self, f: Fuser, part: str) -> tuple[list[str], float]:
        node = self.named[f"{part}/LayerNormalization"]
        affine = [f.constant(f.constants[name]) for name in node.input[1:3]]
        return affine, f._attribute(node, "epsilon")

    def _add_norm(self, f: Fuser, value: str, skip: str, part: str, bias: Array) -> tuple[str, str]:
        """`(LayerNorm(value + skip + bias), value + skip + bias)`."""
        affine, epsilon = self._norm(f, part)
        index = len(f.nodes)
        outputs = [f"v{index}", "", "", f"v{index}_sum"]
        f.nodes.append(
            helper.make_node(
                "SkipLayerNormalization", [value, skip, *affine, f.constant(bias)], outputs, f"n{index}",
                domain=MICROSOFT, epsilon=epsilon,
            )  # fmt: skip
        )
        return outputs[0], outputs[3]

    def _split(self, f: Fuser, value: str, parts: int) -> list[str]:
        index = len(f.nodes)
        outputs = [f"v{index}_{part}" for part in range(parts)]
        f.nodes.append(helper.make_node("Split", [value], outputs, f"n{index}", axis=-1, num_outputs=parts))
        return outputs

    def _attend(self, f: Fuser, q: str, k: str, v: str, heads: int) -> str:
        return f.node("MultiHeadAttention", [q, k, v], MICROSOFT, num_heads=heads)

    def _matmul(self, f: Fuser, value: str, *weights: Array) -> str:
        return f.node("MatMul", [value, f.constant(np.concatenate(weights, axis=1))])

    def _written(self, f: Fuser) -> Sum:
        b, views, n, c = f.shapes[self.named["Reshape"].output[0]]
        v, side = views - 1, round(n**0.5)
        heads = f.shapes[self.named["Softmax"].output[0]][1]
        tokens = np.arange(views * n).reshape(views, n)
        with_picture = np.concatenate([tokens, np.broadcast_to(tokens[v], (views, n))], axis=1).reshape(-1)
        rows = np.arange(v * n).reshape(v, side, side).transpose(1, 0, 2).reshape(-1)
        back = np.concatenate([np.argsort(rows), tokens[v]])

        place = f._constant_of(self.named["Add"])
        assert place is not None
        entering = f._linear(self.source) or self._entering(f)
        place = place.reshape(views * n, c) + (0 if entering.bias is None else entering.bias)
        h = f.node("Add", [f.reshape(entering.value, b, views * n, c), f.constant(place.astype(np.float32))])

        # Self-attention, the picture's tokens among the keys.
        affine, epsilon = self._norm(f, "norm1")
        normed = f.node("LayerNormalization", [h, *affine], axis=-1, epsilon=epsilon)
        q = f.reshape(self._matmul(f, normed, self._weight(f, "to_q")), b * views, n, c)
        kv = self._matmul(f, normed, self._weight(f, "to_k"), self._weight(f, "to_v"))
        kv = f.node("Gather", [kv, f.constant(with_picture.astype(np.int64))], axis=1)
        k, value = self._split(f, f.reshape(kv, b * views, 2 * n, 2 * c), 2)
        looked = self._matmul(f, self._attend(f, q, k, value, heads), self._weight(f, "to_out.0"))
        looked = f.reshape(looked, b, views * n, c)
        normed, h = self._add_norm(f, looked, h, "norm_row", self._bias(f, "to_out.0"))

        # Row-wise attention of the targets; the picture's tokens get minus the bias that all are given.
        rowwise = f.node("Gather", [normed, f.constant(rows.astype(np.int64))], axis=1)
        qkv = self._matmul(f, rowwise, *(self._weight(f, f"attn_row/to_{what}") for what in "qkv"))
        parts = self._split(f, f.reshape(qkv, b * side, v * side, 3 * c), 3)
        seen = self._matmul(f, self._attend(f, *parts, heads), self._weight(f, "attn_row/to_out.0"))
        bias = self._bias(f, "attn_row/to_out.0")
        nothing = f.constant(np.broadcast_to(-bias, (b, n, c)).astype(np.float32))
        seen = f.node("Concat", [f.reshape(seen, b, v * n, c), nothing], axis=1)
        seen = f.node("Gather", [seen, f.constant(back.astype(np.int64))], axis=1)
        normed, h = self._add_norm(f, seen, h, "norm2", bias)

        # Cross-attention to the image tokens.
        q = self._matmul(f, normed, self._weight(f, "attn2/to_q"))
        k, value = (f.value(name) for name in self.image)
        crossed = self._matmul(f, self._attend(f, q, k, value, heads), self._weight(f, "attn2/to_out.0"))
        normed, h = self._add_norm(f, crossed, h, "norm3", self._bias(f, "attn2/to_out.0"))

        # Feed-forward: hidden * gelu(gate).
        weight, bias = self._weight(f, "ff/net.0/proj"), self._bias(f, "ff/net.0/proj")
        inner = weight.shape[1] // 2
        if 2 * inner in SPLIT_GELU_WIDTHS:
            mixed = f.node("BiasSplitGelu", [self._matmul(f, normed, weight), f.constant(bias)], MICROSOFT)
        else:
            hidden = f.node("Add", [self._matmul(f, normed, weight[:, :inner]), f.constant(bias[:inner])])
            gate = self._matmul(f, normed, weight[:, inner:])
            gate = f.node("BiasGelu", [gate, f.constant(bias[inner:])], MICROSOFT)
            mixed = f.node("Mul", [hidden, gate])
        out = f.node("Add", [self._matmul(f, mixed, self._weight(f, "ff/net.2")), h])
        return Sum(out, self._bias(f, "ff/net.2"))

    def _entering(self, f: Fuser) -> Sum:
        before = f.blocks.get(self.source)
        return before.written(f) if before is not None else Sum(f.value(self.source))


def walk(model: onnx.ModelProto) -> Iterator[str]:
    """Operators of a graph with how many there are, most first."""
    from collections import Counter

    for kind, count in Counter(node.op_type for node in model.graph.node).most_common():
        yield f"{kind} {count}"
