"""A whole DDIM step with guidance as one graph, and what need not be computed in every step as two others.

Of a UNet whose views share one picture, three things do not depend on the noise: what time and focal
length become in every residual block, and the keys and values of the image tokens.  Cut out, they are
computed once a sample; what is left takes z_t and gives z_{t-1}, so that nothing leaves the device
between steps:

    time     (timestep, focal)           -> time_table   one row a step
    context  (tokens)                    -> context_0 …  keys and values of each block
    step     (z, step, plan, time_table, context_…, image_latent) -> (z_next, step_next)

A row of `plan` holds `keep` and the weight of each prediction: z_next = keep z + sum_b weight_b v_b, which
is guidance and DDIM in one (`uc3d_rt.sampler.step_weights`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.fused_graph import VIEWS_ONLY, Fuser, in_half
from export.typed_graph import folded
from uc3d_rt.contract import ModelShape


PLAN_ROWS = 64
"""Steps whose plan is on the device at once; sizes are fixed, so that a CUDA graph is captured once."""


@dataclass(frozen=True)
class Cuts:
    """Values of the UNet's graph that do not depend on the noise."""

    time: tuple[str, ...]  # (views + 1, channels) a step
    context: tuple[str, ...]  # (batch, tokens, width)


def step_graph(source: Path, shape: ModelShape, batch: int, rescale: float = 0.0) -> onnx.ModelProto:
    """The step in fp16 with ONNX Runtime's fused operators; z and its update stay float32.

    Args:
        source: the UNet's ONNX file.
        shape: of the bundle.
        batch: 1 = no guidance; 2 = guidance, the second sees no picture.
        rescale: of guidance, see `uc3d_rt.sampler.guided`.

    Raises:
        ValueError: ONNX Runtime refuses the file, or it is no multiview UNet.
    """
    model = folded(source, _sizes(shape, batch), keep_int8=False)
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
    body = in_half(Fuser(cut).model(), keep_io=False)
    return _with_update(body, cuts, sizes, shape, batch, rescale if batch == 2 else 0.0)


def _with_update(
    model: onnx.ModelProto,
    cuts: Cuts,
    sizes: dict[str, tuple[int, ...]],
    shape: ModelShape,
    batch: int,
    rescale: float,
) -> onnx.ModelProto:
    """The fp16 body of a step between what it is given and what it does to z, in fp32."""
    graph, latent = model.graph, (shape.views, 2 * shape.latent_channels, shape.latent_px, shape.latent_px)
    widths = [sizes[name][1] for name in cuts.time]
    constants: list[onnx.TensorProto] = []

    def constant(name: str, values: object, kind: type) -> str:
        constants.append(numpy_helper.from_array(np.array(values, kind), name))
        return name

    before = [
        helper.make_node("Gather", ["plan", "step"], ["row"], "plan row", axis=0),
        helper.make_node(
            "Split", ["row", constant("row_parts", [1, batch], np.int64)], ["keep", "weights"], "plan parts", axis=1
        ),
        helper.make_node("Gather", ["time_table", "step"], ["time_row"], "time row", axis=0),
        helper.make_node(
            "Reshape", ["time_row", constant("time_shape", [-1, sum(widths)], np.int64)], ["time_one"], "time one"
        ),
        helper.make_node("Concat", ["time_one"] * batch, ["time_all"], "time all", axis=0),
        helper.make_node(
            "Split", ["time_all", constant("time_widths", widths, np.int64)],
            [f"time_{index}" for index in range(len(widths))], "time parts", axis=1,
        ),
        helper.make_node("Cast", ["z"], ["z_half"], "z half", to=TensorProto.FLOAT16),
        helper.make_node("Concat", ["z_half"] * batch, ["sample"], "sample", axis=0),
    ]  # fmt: skip
    after = [
        helper.make_node("Cast", ["prediction"], ["prediction_full"], "prediction full", to=TensorProto.FLOAT),
        helper.make_node(
            "Reshape", ["prediction_full", constant("flat", [batch, -1], np.int64)], ["predictions"], "predictions"
        ),
        helper.make_node("MatMul", ["weights", "predictions"], ["change"], "update change"),
        helper.make_node("Reshape", ["change", constant("latents", latent, np.int64)], ["change_z"], "update shape"),
        helper.make_node("Mul", ["z", "keep"], ["kept"], "update kept"),
    ]
    change = "change_z"
    if rescale > 0.0:
        # |add| std(conditional) / std(change), a view each; the weights sum to add.
        constant("per_view", [batch, shape.views, -1], np.int64)
        constant("each_view", [shape.views, -1], np.int64)
        constant("inner", [1], np.int64)
        constant("first", [0], np.int64)
        ratio = [
            ("Reshape", ["predictions", "per_view"], {}),
            ("Gather", [0, "first"], {"axis": 0}),
            ("Reshape", [1, "each_view"], {}),
            ("ReduceMean", [2, "inner"], {}),
            ("Sub", [2, 3], {}),
            ("ReduceL2", [4, "inner"], {}),
            ("ReduceSum", ["weights"], {}),
            ("Abs", [6], {}),
            ("Mul", [5, 7], {}),
            ("Reshape", ["change", "each_view"], {}),
            ("ReduceMean", [9, "inner"], {}),
            ("Sub", [9, 10], {}),
            ("ReduceL2", [11, "inner"], {}),
            ("Max", [12, constant("smallest", 1e-8, np.float32)], {}),
            ("Div", [8, 13], {}),
            ("Mul", [14, constant("rescale", rescale, np.float32)], {}),
            ("Add", [15, constant("unscaled", 1.0 - rescale, np.float32)], {}),
            ("Mul", [9, 16], {}),
            ("Reshape", [17, "latents"], {}),
        ]  # fmt: skip
        for index, (kind, inputs, attributes) in enumerate(ratio):
            names_in = [f"ratio_{entry}" if isinstance(entry, int) else entry for entry in inputs]
            after.append(helper.make_node(kind, names_in, [f"ratio_{index}"], f"ratio {index}", **attributes))
        change = f"ratio_{len(ratio) - 1}"
    after += [
        helper.make_node("Add", ["kept", change], ["z_next"], "update"),
        helper.make_node("Add", ["step", constant("one", [1], np.int64)], ["step_next"], "next step"),
    ]
    kept = [value for value in graph.input if value.name == "image_latent" or value.name.startswith("context_")]
    inputs = [
        helper.make_tensor_value_info("z", TensorProto.FLOAT, latent),
        helper.make_tensor_value_info("step", TensorProto.INT64, [1]),
        helper.make_tensor_value_info("plan", TensorProto.FLOAT, [PLAN_ROWS, 1 + batch]),
        helper.make_tensor_value_info("time_table", TensorProto.FLOAT16, [PLAN_ROWS, shape.views + 1, sum(widths)]),
        *kept,
    ]
    outputs = [
        helper.make_tensor_value_info("z_next", TensorProto.FLOAT, latent),
        helper.make_tensor_value_info("step_next", TensorProto.INT64, [1]),
    ]
    whole = helper.make_graph(
        [*before, *graph.node, *after], "unet_step", inputs, outputs, [*graph.initializer, *constants]
    )
    return helper.make_model(whole, opset_imports=model.opset_import, ir_version=model.ir_version)


def time_graph(source: Path, shape: ModelShape) -> onnx.ModelProto:
    """`(timestep, focal) -> time_table` for `PLAN_ROWS` steps; fp32 inside, fp16 out."""
    one = folded(source, _sizes(shape, 1), keep_int8=False)
    cuts, sizes = find_cuts(one), _value_sizes(one)
    views, width = shape.views + 1, sum(sizes[name][1] for name in cuts.time)
    part = _extracted(folded(source, _sizes(shape, PLAN_ROWS), keep_int8=False), ["timestep", "focal"], cuts.time)
    table = numpy_helper.from_array(np.array([PLAN_ROWS, views, width], np.int64), "table_shape")
    part.graph.initializer.append(table)
    part.graph.node.extend(
        [
            helper.make_node("Concat", list(cuts.time), ["table_flat"], "table", axis=1),
            helper.make_node("Reshape", ["table_flat", "table_shape"], ["table_full"], "table rows"),
            helper.make_node("Cast", ["table_full"], ["time_table"], "table half", to=TensorProto.FLOAT16),
        ]
    )
    del part.graph.output[:]
    sizes_out = [PLAN_ROWS, views, width]
    part.graph.output.append(helper.make_tensor_value_info("time_table", TensorProto.FLOAT16, sizes_out))
    return part


def context_graph(source: Path, shape: ModelShape) -> onnx.ModelProto:
    """`tokens -> context_0 …`, keys and values of every block's cross-attention; fp32 inside, fp16 out."""
    one = folded(source, _sizes(shape, 1), keep_int8=False)
    cuts, sizes = find_cuts(one), _value_sizes(one)
    part = _extracted(one, ["tokens"], cuts.context)
    # Products alone: nothing in it knows how many objects there are.
    part.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    del part.graph.output[:], part.graph.value_info[:]
    for index, name in enumerate(cuts.context):
        given = f"context_{index}"
        part.graph.node.append(helper.make_node("Cast", [name], [given], f"half {index}", to=TensorProto.FLOAT16))
        part.graph.output.append(
            helper.make_tensor_value_info(given, TensorProto.FLOAT16, ["batch", *sizes[name][1:]])
        )
    return part


def find_cuts(model: onnx.ModelProto) -> Cuts:
    """Where a UNet's graph of fixed sizes can be cut, in the order of the graph."""
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}
    noisy, timed = _reached(graph, "sample"), _reached(graph, "timestep")
    found: dict[str, None] = {}
    for node in graph.node:
        if not any(name in noisy for name in node.input):
            continue
        for name in node.input:
            while name in maker and name not in noisy and maker[name].op_type in VIEWS_ONLY:
                data = [entry for entry in maker[name].input if entry not in constants]
                if len(data) != 1:
                    break
                name = data[0]
            made = maker.get(name)
            if made is not None and name not in noisy and made.op_type in ("Gemm", "MatMul"):
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


def _sizes(shape: ModelShape, batch: int) -> dict[str, int]:
    return {"batch": batch, "samples": batch * shape.views}


def _value_sizes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    return {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in graph.value_info
    }
