"""An exported graph in fewer bytes: equal constants once, and short names for the values between nodes.

The exporter writes a constant anew wherever it is read, and names a value after the module that made it,
as it already names the node.  Of the edge profile's UNet that was a thirtieth of the file.
"""

from __future__ import annotations

import onnx


def compact(graph: onnx.GraphProto) -> None:
    """Rewrite a graph in place; weights, inputs, outputs and the names of nodes stay as they are."""
    _share_constants(graph)
    _shorten_names(graph)


def _share_constants(graph: onnx.GraphProto) -> None:
    """Of Constant nodes that hold the same, keep the first."""
    outputs = {value.name for value in graph.output}
    first: dict[bytes, str] = {}
    same: dict[str, str] = {}
    kept = []
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = same.get(name, name)
        if node.op_type == "Constant" and node.output[0] not in outputs:
            content = node.attribute[0].SerializeToString(deterministic=True)
            if content in first:
                same[node.output[0]] = first[content]
                continue
            first[content] = node.output[0]
        kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def _shorten_names(graph: onnx.GraphProto) -> None:
    given = {value.name for value in (*graph.input, *graph.output)}
    given |= {tensor.name for tensor in graph.initializer} | {""}
    short: dict[str, str] = {}
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = short.get(name, name)
        for position, name in enumerate(node.output):
            if name not in given:
                short[name] = next(n for n in (f"v{len(short)}", f"value_{len(short)}") if n not in given)
                node.output[position] = short[name]
    del graph.value_info[:]  # of values by their old names; nobody needs it
