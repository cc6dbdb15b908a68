"""Engines for ONNX Runtime's CUDA provider: fused fp16 graphs, each held against the bundle's network."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from export.data_file import DataFile, least_entries, load_graph
from export.example_inputs import example_inputs
from export.fused_graph import fused_graph
from export.plain_graph import plain_graph
from export.step_graph import PLAN_ROWS, context_graph, guidance_graph, step_graph, time_graph
from export.typed_graph import cpu_session, relative_error, rounded_session
from uc3d_rt.contract import Manifest
from uc3d_rt.sampler import guided

FloatArray = NDArray[np.float32]


def data_file(source: Path, path: Path) -> DataFile | None:
    """Where large weights of what is made of a network go: none if the network itself holds all of its."""
    least = least_entries(load_graph(source))
    return None if least is None else DataFile(path, least)


def build_part(
    part: str, source: Path, manifest: Manifest, batch: int, data: DataFile | None = None, check: bool = True,
    deterministic: bool = False,
) -> tuple[onnx.ModelProto, float | None]:  # fmt: skip
    """One engine's graph and its relative error.

    Args:
        part: a network of the bundle, or one of `UNET_PARTS`.
        source: the network's ONNX file.
        manifest: of the bundle.
        batch: how many the network takes a call.
        data: of `data_file`.
        check: measure the error, which runs the whole network in fp32 on the CPU.
        deterministic: see `export.fused_graph.Fuser`.

    Returns:
        The graph, and the largest relative 2-norm error of its outputs against the network in fp32,
        every fp16 value rounded; None without `check`.

    Raises:
        ValueError: ONNX Runtime refuses the network.
    """
    shape = manifest.shape
    if part == "unet_time":
        model = time_graph(source, shape, data)
        return model, _rounding(model, _times(manifest)) if check else None
    if part == "unet_context":
        model = context_graph(source, shape, data)
        tokens = example_inputs(shape, "unet", 2, 1, manifest.schedule.train_steps)["tokens"]
        return model, _rounding(model, {"tokens": tokens}) if check else None
    if part == "unet_guidance":
        model = guidance_graph(shape, manifest.sampling.guidance_rescale)
        return model, _guidance_error(model, manifest) if check else None
    if part.startswith("unet_step_"):
        rescale = manifest.sampling.guidance_rescale
        model = step_graph(source, shape, batch, rescale, data, deterministic)
        return model, step_error(model, source, manifest, batch) if check else None
    sizes = {"batch": batch, "samples": batch * shape.views}
    model = fused_graph(source, sizes, data, deterministic)
    inputs = example_inputs(shape, part, batch, 1, manifest.schedule.train_steps)
    return model, relative_error(source, plain_graph(model), [inputs]) if check else None


def step_error(model: onnx.ModelProto, source: Path, manifest: Manifest, batch: int) -> float:
    """Relative error of a step against the bundle's UNet and the same sum in NumPy."""
    shape = manifest.shape
    times = _times(manifest)
    inputs = example_inputs(shape, "unet", batch, 1, manifest.schedule.train_steps)
    z = inputs["sample"][: shape.views]
    row = 3
    inputs |= {
        "sample": np.concatenate([z] * batch),
        "timestep": np.full(batch, times["timestep"][row]),
        "focal": np.full(batch, times["focal"][row]),
    }
    keep, add, scale = 0.7, -0.8, 2.5
    predictions = cpu_session(source).run(None, inputs)[0].reshape(batch, *z.shape)
    change = predictions[0]
    if batch == 2:
        change = guided(predictions[0], predictions[1], scale, manifest.sampling.guidance_rescale)
    expected = keep * z + add * change
    plan = np.zeros((PLAN_ROWS, 1 + batch), np.float32)
    plan[row] = [keep, add] if batch == 1 else [keep, add * scale, add * (1.0 - scale)]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as files:
        parts = []
        for kind in (context_graph, time_graph):
            data = data_file(source, Path(folder) / kind.__name__)
            parts.append(kind(source, shape, None if data is None else files.enter_context(data)))
        context, time = parts
        names = [output.name for output in context.graph.output]
        given = dict(zip(names, cpu_session(context).run(names, {"tokens": inputs["tokens"]}), strict=True))
        given["time_table"] = cpu_session(time).run(None, times)[0]
    given |= {
        "z": z, "step": np.array([row]), "plan": plan, "image_latent": inputs["image_latent"]
    }  # fmt: skip
    for value in model.graph.input:
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16:
            given[value.name] = given[value.name].astype(np.float16).astype(np.float32)
    found = rounded_session(plain_graph(model)).run(["z_next"], given)[0]
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _guidance_error(model: onnx.ModelProto, manifest: Manifest) -> float:
    """Relative error of guidance and DDIM against NumPy."""
    sample = example_inputs(manifest.shape, "unet", 3, 1)["sample"]
    z, conditional, unconditional = np.split(sample, 3)
    keep, add, scale, row = 0.7, -0.8, 2.5, 3
    plan = np.zeros((PLAN_ROWS, 3), np.float32)
    plan[row] = [keep, add * scale, add * (1.0 - scale)]
    given = {
        "z": z, "step": np.array([row]), "plan": plan, "conditional": conditional,
        "unconditional": unconditional,
    }  # fmt: skip
    found = cpu_session(model).run(["z_next"], given)[0]
    expected = keep * z + add * guided(conditional, unconditional, scale, manifest.sampling.guidance_rescale)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _times(manifest: Manifest) -> dict[str, FloatArray]:
    timesteps = np.linspace(0, manifest.schedule.train_steps - 1, PLAN_ROWS).round().astype(np.float32)
    return {"timestep": timesteps, "focal": np.full(PLAN_ROWS, 1.4, np.float32)}


def _rounding(model: onnx.ModelProto, inputs: dict[str, FloatArray]) -> float:
    """Relative error of fp16 outputs against what they were rounded from."""
    exact = onnx.ModelProto()
    exact.CopyFrom(model)
    made = {name: node for node in exact.graph.node for name in node.output}
    for output in exact.graph.output:
        made[output.name].attribute[0].i = onnx.TensorProto.FLOAT
        output.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    pairs = zip(cpu_session(model).run(None, inputs), cpu_session(exact).run(None, inputs), strict=True)
    return float(np.max([np.linalg.norm(found - true) / np.linalg.norm(true) for found, true in pairs]))
