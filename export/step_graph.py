"""A whole DDIM step with guidance as one graph, and what need not be computed in every step as two others.

Of a UNet whose views share one picture, some things do not depend on the noise: what time and focal
length become in every residual block, and the keys and values of the image tokens.  Cut out, they are
computed once a sample; what is left takes z_t and gives z_{t-1}, so that nothing leaves the device
between steps:

    time     (timestep, focal)           -> time_table   one row a step
    context  (tokens)                    -> context_0 …  keys and values of each block
    step     (z, step, plan, time_table, context_…, image_latent) -> (z_next, step_next)

    guidance (z, step, plan, conditional, unconditional) -> (z_next, step_next)

The last puts together two predictions of a step without guidance: half the memory, for low-memory mode.
A row of `plan` holds `keep` and the weight of each prediction: z_next = keep z + sum_b weight_b v_b, which
is guidance and DDIM in one (`uc3d_rt.sampler.step_weights`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from export.data_file import Constants, DataFile, moved
from export.fused_graph import Fuser, in_half, origin
from export.graph_writer import GraphWriter
from export.typed_graph import IR_VERSION, OPSET, folded
from uc3d_rt.contract import ModelShape

PLAN_ROWS = 64
"""Steps whose plan is on the device at once; sizes are fixed, so that a CUDA graph is captured once."""


@dataclass(frozen=True)
class Cuts:
    """Values of the UNet's graph that do not depend on the noise."""

    time: tuple[str, ...]  # (views + 1, channels) a step
    context: tuple[str, ...]  # (batch, tokens, width)


def step_graph(
    source: Path, shape: ModelShape, batch: int, rescale: float = 0.0, data: DataFile | None = None,
    deterministic: bool = False,
) -> onnx.ModelProto:  # fmt: skip
    """The step in fp16 with ONNX Runtime's fused operators; z and its update stay float32.

    Args:
        source: the UNet's ONNX file.
        shape: of the bundle.
        batch: 1 = no guidance; 2 = guidance, the second sees no picture.
        rescale: of guidance, see `uc3d_rt.sampler.guided`.
        data: takes large weights; a file that has its weights beside it needs one.
        deterministic: see `Fuser`.

    Raises:
        ValueError: ONNX Runtime refuses the file, or it is no multiview UNet.
    """
    model = _folded(source, shape, batch, data)
    cuts = find_cuts(model)
    sizes = _value_sizes(model)
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    names = {name: f"time_{index}" for index, name in enumerate(cuts.time)}
    names |= {name: f"context_{index}" for index, name in enumerate(cuts.context)}
    for node in cut.graph.node:
        for position, name in enumerate(node.output):
            if name in names:
                node.output[position] = f"{name}_unused"
        for position, name in enumerate(node.input):
            if name in names:
                node.input[position] = names[name]
    for name, given in names.items():
        cut.graph.input.append(helper.make_tensor_value_info(given, TensorProto.FLOAT, sizes[name]))
    body = in_half(Fuser(cut, data, deterministic).model(), keep_io=False)
    return _with_update(body, cuts, sizes, shape, batch, rescale if batch == 2 else 0.0)


def _with_update(
    body: onnx.ModelProto,
    cuts: Cuts,
    sizes: dict[str, tuple[int, ...]],
    shape: ModelShape,
    batch: int,
    rescale: float,
) -> onnx.ModelProto:
    """The fp16 body of a step between what it is given and what it does to z, in fp32."""
    widths = [sizes[name][1] for name in cuts.time]
    before, after = GraphWriter("before_"), GraphWriter("after_")

    row = before.node("Gather", "plan", "step", axis=0)
    keep, weights = before.node_of("Split", 2, row, before.sizes(1, batch), axis=1)
    time = before.node("Gather", "time_table", "step", axis=0)
    time = before.node("Concat", *[before.reshape(time, -1, sum(widths))] * batch, axis=0)
    times = [f"time_{index}" for index in range(len(widths))]
    before.node_of("Split", times, time, before.sizes(*widths), axis=1)
    half = before.node("Cast", "z", to=TensorProto.FLOAT16)
    before.node("Concat", *[half] * batch, output="sample", axis=0)

    predictions = after.node("Cast", "prediction", to=TensorProto.FLOAT)
    _summed(after, after.reshape(predictions, batch, -1), keep, weights, shape, batch, rescale)

    given = {value.name: value for value in body.graph.input}
    table = [PLAN_ROWS, shape.views + 1, sum(widths)]
    inputs = [
        *_update_inputs(shape, batch),
        helper.make_tensor_value_info("time_table", TensorProto.FLOAT16, table),
        given["image_latent"],
        *(given[f"context_{index}"] for index in range(len(cuts.context))),
    ]
    weights_of_all = [*body.graph.initializer, *before.weights.values(), *after.weights.values()]
    nodes = [*before.nodes, *body.graph.node, *after.nodes]
    graph = helper.make_graph(nodes, "unet_step", inputs, _update_outputs(shape), weights_of_all)
    return helper.make_model(graph, opset_imports=body.opset_import, ir_version=body.ir_version)


def guidance_graph(shape: ModelShape, rescale: float = 0.0) -> onnx.ModelProto:
    """What a step with guidance does with two predictions that were made one after the other, in fp32.

    `(z, step, plan, conditional, unconditional) -> (z_next, step_next)`, plan as of a step with guidance.
    """
    writer = GraphWriter("guidance_")
    row = writer.node("Gather", "plan", "step", axis=0)
    keep, weights = writer.node_of("Split", 2, row, writer.sizes(1, 2), axis=1)
    halves = [writer.reshape(name, 1, -1) for name in ("conditional", "unconditional")]
    _summed(writer, writer.node("Concat", *halves, axis=0), keep, weights, shape, 2, rescale)
    latent = _latent(shape)
    inputs = _update_inputs(shape, 2) + [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, latent)
        for name in ("conditional", "unconditional")
    ]
    graph = helper.make_graph(
        writer.nodes, "unet_guidance", inputs, _update_outputs(shape), list(writer.weights.values())
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def _latent(shape: ModelShape) -> tuple[int, int, int, int]:
    return shape.views, 2 * shape.latent_channels, shape.latent_px, shape.latent_px


def _update_inputs(shape: ModelShape, batch: int) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info("z", TensorProto.FLOAT, _latent(shape)),
        helper.make_tensor_value_info("step", TensorProto.INT64, [1]),
        helper.make_tensor_value_info("plan", TensorProto.FLOAT, [PLAN_ROWS, 1 + batch]),
    ]


def _update_outputs(shape: ModelShape) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info("z_next", TensorProto.FLOAT, _latent(shape)),
        helper.make_tensor_value_info("step_next", TensorProto.INT64, [1]),
    ]


def _summed(
    after: GraphWriter, predictions: str, keep: str, weights: str, shape: ModelShape, batch: int,
    rescale: float,
) -> None:  # fmt: skip
    """Write `z_next = keep z + sum_b weight_b prediction_b`, rescaled, and `step_next`.

    Args:
        after: writer of the nodes.
        predictions: (batch, all the rest).
        keep: (1, 1).
        weights: (1, batch).
        shape: of the bundle.
        batch: predictions.
        rescale: of guidance.
    """
    change = after.reshape(after.node("MatMul", weights, predictions), shape.views, -1)
    if rescale > 0.0:
        # |add| std(conditional) / std(change), a view each; the weights sum to add.
        conditional = after.node(
            "Gather", after.reshape(predictions, batch, shape.views, -1), after.constant(0, np.int64), axis=0
        )
        add = after.node("Abs", after.node("ReduceSum", weights))
        smallest = after.constant(1e-8, np.float32)
        spread = after.node("Max", _spread(after, change), smallest)
        ratio = after.node("Div", after.node("Mul", _spread(after, conditional), add), spread)
        ratio = after.node("Mul", ratio, after.constant(rescale, np.float32))
        ratio = after.node("Add", ratio, after.constant(1.0 - rescale, np.float32))
        change = after.node("Mul", change, ratio)
    kept = after.node("Mul", "z", keep)
    after.node("Add", kept, after.reshape(change, *_latent(shape)), output="z_next")
    after.node("Add", "step", after.sizes(1), output="step_next")


def _spread(writer: GraphWriter, value: str) -> str:
    """Root of the summed squares about each row's mean, (rows, 1)."""
    inner = writer.sizes(1)
    centred = writer.node("Sub", value, writer.node("ReduceMean", value, inner))
    return writer.node("ReduceL2", centred, inner)


def time_graph(source: Path, shape: ModelShape, data: DataFile | None = None) -> onnx.ModelProto:
    """`(timestep, focal) -> time_table` for `PLAN_ROWS` steps; fp32 inside, fp16 out."""
    one = _folded(source, shape, 1, data)
    cuts, sizes = find_cuts(one), _value_sizes(one)
    many = _folded(source, shape, PLAN_ROWS, data)
    part = _extracted(many, ["timestep", "focal"], cuts.time)
    table = (PLAN_ROWS, shape.views + 1, sum(sizes[name][1] for name in cuts.time))
    writer = GraphWriter("table_")
    rows = writer.reshape(writer.node("Concat", *cuts.time, axis=1), *table)
    writer.node("Cast", rows, output="time_table", to=TensorProto.FLOAT16)
    part.graph.node.extend(writer.nodes)
    part.graph.initializer.extend(writer.weights.values())
    del part.graph.output[:]
    part.graph.output.append(helper.make_tensor_value_info("time_table", TensorProto.FLOAT16, table))
    return part if data is None else moved(part, data)


def context_graph(source: Path, shape: ModelShape, data: DataFile | None = None) -> onnx.ModelProto:
    """`tokens -> context_0 …`, keys and values of every block's cross-attention; fp32 inside, fp16 out."""
    one = _folded(source, shape, 1, data)
    cuts, sizes = find_cuts(one), _value_sizes(one)
    part = _extracted(one, ["tokens"], cuts.context)
    # Products alone: nothing in it knows how many objects there are.
    part.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    del part.graph.output[:], part.graph.value_info[:]
    writer = GraphWriter("context_of_")
    for index, name in enumerate(cuts.context):
        given = writer.node("Cast", name, output=f"context_{index}", to=TensorProto.FLOAT16)
        sizes_out = ["batch", *sizes[name][1:]]
        part.graph.output.append(helper.make_tensor_value_info(given, TensorProto.FLOAT16, sizes_out))
    part.graph.node.extend(writer.nodes)
    return part if data is None else moved(part, data)


def find_cuts(model: onnx.ModelProto) -> Cuts:
    """Where a UNet's graph of fixed sizes can be cut, in the order of the graph."""
    graph = model.graph
    constants = Constants(graph)
    maker = {name: node for node in graph.node for name in node.output}
    noisy, timed = _reached(graph, "sample"), _reached(graph, "timestep")
    found: dict[str, None] = {}
    for node in graph.node:
        if not any(name in noisy for name in node.input):
            continue
        for name in node.input:
            if name in noisy:
                continue
            name = origin(name, maker, constants)
            made = maker.get(name)
            if made is not None and made.op_type in ("Gemm", "MatMul"):
                found[name] = None
    cuts = Cuts(tuple(n for n in found if n in timed), tuple(n for n in found if n not in timed))
    if not cuts.time or not cuts.context:
        raise ValueError(
            "nothing in it depends on time or on image tokens alone: no multiview UNet of this project"
        )
    return cuts


def _reached(graph: onnx.GraphProto, start: str) -> set[str]:
    """All values that depend on an input."""
    reached = {start}
    for node in graph.node:
        if any(name in reached for name in node.input):
            reached.update(node.output)
    return reached


def _extracted(model: onnx.ModelProto, inputs: list[str], outputs: tuple[str, ...]) -> onnx.ModelProto:
    """The part of a graph between values, without its shapes."""
    return onnx.utils.Extractor(onnx.shape_inference.infer_shapes(model)).extract_model(inputs, list(outputs))


def _folded(source: Path, shape: ModelShape, batch: int, data: DataFile | None) -> onnx.ModelProto:
    return folded(source, _sizes(shape, batch), keep_int8=False, room=data.room if data else None)


def _sizes(shape: ModelShape, batch: int) -> dict[str, int]:
    return {"batch": batch, "samples": batch * shape.views}


def _value_sizes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    values = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.value_info
    return {value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in values}
