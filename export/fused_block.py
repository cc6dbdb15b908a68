"""A transformer block of the multiview UNet, found in an exported graph and written with fused operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx

from export.data_file import Array
from export.graph_writer import MICROSOFT

if TYPE_CHECKING:
    from export.fused_graph import Fuser

SPLIT_GELU_WIDTHS = (2560, 5120, 10240)
"""All that ONNX Runtime's BiasSplitGelu kernel was compiled for."""

OWN_PRODUCTS_WIDTH = 640
"""From this many channels on, queries, keys and values are products of their own: smaller ones cost less
than copying the parts of a common one apart."""

BLOCK_MARK = "/norm_row/LayerNormalization"
"""How the name of a node ends that every multiview block has, and nothing else."""

_ATTENTIONS = ("", "attn_row/", "attn2/")
_PARTS = (
    "Add", "Softmax", "attn2/Softmax",
    *(f"{at}to_{what}/MatMul" for at in _ATTENTIONS for what in "qkv"),
    *(f"{at}to_out.0/{kind}" for at in _ATTENTIONS for kind in ("MatMul", "Add")),
    *(f"{norm}/LayerNormalization" for norm in ("norm1", "norm_row", "norm2", "norm3")),
    *(f"ff/net.{part}/{kind}" for part in ("0/proj", "2") for kind in ("MatMul", "Add")),
)  # fmt: skip


@dataclass(frozen=True)
class Sum:
    """A value, and a bias (channels,) that whoever reads it still has to add."""

    value: str
    bias: Array | None = None


class MultiviewBlock:
    """Self-, row-wise and cross-attention and feed-forward, as in `train/multiview_unet.py`.

    Tokens are (b, (v + 1) n, c), the input picture's last.  Row-wise attention takes them in another
    order, which a gather makes; a transpose, whose kernel copies far faster, takes them back.
    """

    def __init__(self, fuser: Fuser, prefix: str, named: dict[str, onnx.NodeProto], output: str) -> None:
        """Use `found`."""
        self.output = output
        given = next(entry for entry in named["Add"].input if entry not in fuser.constants)
        self.shape = fuser.shapes[given]  # (b, v + 1, n, c)
        # Of two blocks in a row ONNX Runtime makes one reshape, which is the first one's.
        reshape = fuser.maker.get(given)
        own = reshape is not None and reshape.op_type == "Reshape" and reshape.name.startswith(f"{prefix}/")
        self.source = str(reshape.input[0]) if reshape is not None and own else given
        softmax = named["attn2/Softmax"]
        scores, weighted = fuser.maker[softmax.input[0]], fuser.readers[softmax.output[0]][0]
        self.image = (fuser.origin(scores.input[1]), fuser.origin(weighted.input[1]))  # keys and values
        self._prefix, self._named = prefix, named
        self._made: Sum | None = None

    @classmethod
    def found(cls, fuser: Fuser, prefix: str) -> MultiviewBlock | None:
        """The block whose nodes' names begin with a prefix, if it has all its parts."""
        begin = prefix + "/"
        named = {n.name[len(begin) :]: n for n in fuser.source.node if n.name.startswith(begin)}
        leaving = [
            name
            for node in named.values()
            for name in node.output
            if any(not reader.name.startswith(begin) for reader in fuser.readers.get(name, []))
        ]
        if len(leaving) != 1 or any(part not in named for part in _PARTS):
            return None
        return cls(fuser, prefix, named, leaving[0])

    def written(self, f: Fuser) -> Sum:
        """Write the block once; its last bias is left to whoever reads it."""
        if self._made is None:
            self._made = self._written(f)
        return self._made

    def _written(self, f: Fuser) -> Sum:
        b, views, n, c = self.shape
        v, side = views - 1, round(n**0.5)
        heads = f.shapes[self._named["Softmax"].output[0]][1]
        tokens = np.arange(views * n).reshape(views, n)
        with_picture = np.concatenate([tokens, np.broadcast_to(tokens[v], (views, n))], axis=1).reshape(-1)
        rows = tokens[:v].T.reshape(-1)  # n, v: those of an image row in a row, its views side by side

        entering = self._entering(f)
        place = self._constant(f, "Add").reshape(views * n, c)
        if entering.bias is not None:
            place = place + entering.bias
        place = f.constant(place[None], np.float32)

        # Self-attention, the picture's tokens among the keys.
        normed, h = self._add_norm(f, f.reshape(entering.value, b, views * n, c), place, "norm1")
        q = f.reshape(self._matmul(f, normed, "to_q"), b * views, n, c)
        doubled = [
            f.node("Gather", product, f.sizes(*with_picture), axis=1)
            for product in self._products(f, normed, "to_k", "to_v")
        ]
        kv = self._parts(f, doubled, 2, b * views, 2 * n, c)
        looked = self._matmul(f, self._attend(f, heads, q, *kv), "to_out.0")
        bias = self._constant(f, "to_out.0/Add")
        normed, h = self._add_norm(f, f.reshape(looked, b, views * n, c), h, "norm_row", bias)

        # Row-wise attention of the targets; the picture's tokens get minus the bias that all are given.
        rowwise = f.node("Gather", normed, f.sizes(*rows), axis=1)
        products = self._products(f, rowwise, *(f"attn_row/to_{what}" for what in "qkv"))
        qkv = self._parts(f, products, 3, b * side, side * v, c)
        seen = self._matmul(f, self._attend(f, heads, *qkv), "attn_row/to_out.0")
        seen = f.node("Transpose", f.reshape(seen, b, n, v, c), perm=(0, 2, 1, 3))
        bias = self._constant(f, "attn_row/to_out.0/Add")
        if f.data is None:
            nothing = f.constant(np.broadcast_to(-bias, (b, n, c)), np.float32)
        else:  # the same weights for one object and for two; ONNX Runtime folds this as it loads
            one = f.constant(np.broadcast_to(-bias, (1, n, c)), np.float32)
            nothing = one if b == 1 else f.node("Concat", *[one] * b, axis=0)
        seen = f.node("Concat", f.reshape(seen, b, v * n, c), nothing, axis=1)
        normed, h = self._add_norm(f, seen, h, "norm2", bias)

        # Cross-attention to the image tokens.
        q = self._matmul(f, normed, "attn2/to_q")
        k, value = (f.value(name) for name in self.image)
        crossed = self._matmul(f, self._attend(f, heads, q, k, value), "attn2/to_out.0")
        normed, h = self._add_norm(f, crossed, h, "norm3", self._constant(f, "attn2/to_out.0/Add"))

        mixed = self._gated(f, normed)
        out = f.node("Add", self._matmul(f, mixed, "ff/net.2"), h)
        return Sum(out, self._constant(f, "ff/net.2/Add"))

    def _entering(self, f: Fuser) -> Sum:
        linear = f.linear(self.source)
        if linear is not None:
            return linear
        before = f.blocks.get(self.source)
        return before.written(f) if before is not None else Sum(f.value(self.source))

    def _gated(self, f: Fuser, normed: str) -> str:
        """`hidden * gelu(gate)`, hidden and gate being halves of one projection."""
        weight, bias = self._weight(f, "ff/net.0/proj"), self._constant(f, "ff/net.0/proj/Add")
        if weight.shape[1] in SPLIT_GELU_WIDTHS:
            both = f.node("MatMul", normed, f.constant(weight))
            return f.node("BiasSplitGelu", both, f.constant(bias), domain=MICROSOFT)
        half = weight.shape[1] // 2
        hidden = f.node("MatMul", normed, f.constant(weight[:, :half]))
        hidden = f.node("Add", hidden, f.constant(bias[:half]))
        gate = f.node("MatMul", normed, f.constant(weight[:, half:]))
        gate = f.node("BiasGelu", gate, f.constant(bias[half:]), domain=MICROSOFT)
        return f.node("Mul", hidden, gate)

    def _add_norm(
        self, f: Fuser, value: str, skip: str, norm: str, bias: Array | None = None
    ) -> tuple[str, str]:
        """`(LayerNorm(s), s)` of `s = value + skip + bias`."""
        gamma, beta, epsilon = self._norm(f, norm)
        inputs = [value, skip, gamma, beta] + ([] if bias is None else [f.constant(bias)])
        begin = f"{f.prefix}{len(f.nodes)}"
        outputs = [f"{begin}_normed", "", "", f"{begin}_sum"]
        f.node_of("SkipLayerNormalization", outputs, *inputs, domain=MICROSOFT, epsilon=epsilon)
        return outputs[0], outputs[3]

    def _matmul(self, f: Fuser, value: str, *linears: str) -> str:
        """A product with the weights of linear layers side by side."""
        weight = np.concatenate([self._weight(f, name) for name in linears], axis=1)
        return f.node("MatMul", value, f.constant(weight))

    def _products(self, f: Fuser, value: str, *linears: str) -> list[str]:
        """Products with the weights of linear layers: one each if they are wide, else one of all."""
        if self.shape[-1] < OWN_PRODUCTS_WIDTH:
            return [self._matmul(f, value, *linears)]
        return [self._matmul(f, value, linear) for linear in linears]

    def _parts(self, f: Fuser, products: list[str], count: int, *sizes: int) -> list[str]:
        """What each of `count` linear layers made, of these sizes."""
        if len(products) == count:
            return [f.reshape(product, *sizes) for product in products]
        *before, width = sizes
        both = f.reshape(products[0], *before, count * width)
        return f.node_of("Split", count, both, axis=-1, num_outputs=count)

    def _attend(self, f: Fuser, heads: int, *qkv: str) -> str:
        return f.node("MultiHeadAttention", *qkv, domain=MICROSOFT, num_heads=heads)

    def _weight(self, f: Fuser, part: str) -> Array:
        return f.constants[self._named[f"{part}/MatMul"].input[1]]

    def _constant(self, f: Fuser, part: str) -> Array:
        found = f.constant_of(self._named[part])
        if found is None:
            raise ValueError(f"{self._prefix}/{part} adds no constant")
        return found

    def _norm(self, f: Fuser, part: str) -> tuple[str, str, float]:
        node = self._named[f"{part}/LayerNormalization"]
        gamma, beta = (f.constant(f.constants[name]) for name in node.input[1:3])
        return gamma, beta, f.attribute(node, "epsilon")
