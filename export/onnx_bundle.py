"""A checkpoint as a bundle: five ONNX files, their measured parity with torch, and the manifest."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from export import data_file
from export.compact import compact
from export.data_file import DataFile, data_path, store
from export.folders import replace_folder
from export.networks import example_tensors, load_networks
from export.typed_graph import cpu_session
from export.weights import store_weights_int8
from train.checkpoint import load_state
from train.presets import Preset
from uc3d_rt.contract import (
    MANIFEST_NAME,
    NETWORK_NAMES,
    Manifest,
    NetworkFile,
    SamplingDefaults,
    WeightsFile,
    network_specs,
    save_manifest,
    sha256_of,
)

OPSET = 18
PARITY_LIMIT = 1e-3
"""Largest `|onnx - torch| / |torch|` (2-norms) of an exported fp32 network."""


class ParityError(RuntimeError):
    """An exported network does not compute what the torch network computes."""


def export_bundle(
    checkpoint: Path,
    bundle: Path,
    *,
    int8_weights: bool = True,
    sampling: SamplingDefaults | None = None,
    training: dict[str, Any] | None = None,
) -> Manifest:
    """Export a checkpoint; the bundle appears at its place only when all of it is right.

    Raises:
        ParityError: a network's fp32 export differs from torch by more than `PARITY_LIMIT`.
        ValueError: `bundle` is a folder of other things, which replacing it would delete.
        FileNotFoundError, CheckpointError: the checkpoint is missing or damaged.
    """
    bundle = bundle.resolve()
    if bundle.exists() and not (bundle / MANIFEST_NAME).is_file() and any(bundle.iterdir()):
        raise ValueError(f"{bundle} is no bundle and not empty; give a new folder, it would be replaced")
    preset, networks = load_networks(checkpoint)
    work = bundle.with_name(f".{bundle.name}.{os.getpid()}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        files, parity = {}, {}
        for name in NETWORK_NAMES:
            target = work / f"{name}.onnx"
            export_network(preset, name, networks[name], target)
            error = parity_error(preset, name, networks[name], target)
            if not error <= PARITY_LIMIT:
                raise ParityError(f"{name}.onnx differs from torch by {error:.2e} (limit {PARITY_LIMIT:g})")
            parity[name] = {"fp32_relative_error": error}
            if int8_weights:
                stored = work / f"{name}.int8.onnx"
                store_weights_int8(target, stored)
                stored.replace(target)
                parity[name]["int8_weights_relative_error"] = parity_error(
                    preset, name, networks[name], target
                )
            files[name] = network_file(target)
        _remove_unread(work, files)
        manifest = Manifest(
            profile=preset.name,
            shape=preset.shape,
            schedule=preset.schedule,
            sampling=sampling or preset.sampling,
            networks=files,
            training=(training or {}) | _training_record(checkpoint),
            parity=parity,
        )
        save_manifest(manifest, work)
        replace_folder(bundle, work)
        return manifest
    finally:
        shutil.rmtree(work, ignore_errors=True)


def network_file(path: Path) -> NetworkFile:
    """The record of a network's file, and of the weights beside it."""
    beside, weights = data_path(path), None
    if beside is not None:
        weights = WeightsFile(beside.name, sha256_of(beside), beside.stat().st_size)
    return NetworkFile(path.name, sha256_of(path), path.stat().st_size, weights)


def _remove_unread(folder: Path, files: Mapping[str, NetworkFile]) -> None:
    """Remove weights in fp32 that were stored as int8 since."""
    read = {file.weights.file for file in files.values() if file.weights is not None}
    for path in folder.glob("weights-*.bin"):
        if path.name not in read:
            path.unlink()


def export_network(preset: Preset, name: str, network: nn.Module, target: Path, device: str = "cpu") -> None:
    """Write one network as fp32 ONNX with the contract's names and free dimensions.

    A large one is traced without its weights, which are then written one at a time to a file beside it.

    Args:
        preset: what it was made from.
        name: of the network.
        network: the module, on a device, float32.
        target: file to write.
        device: where the module is; it is called once.
    """
    spec = network_specs(preset.shape)[name]
    large = sum(4 * tensor.numel() for tensor in network.parameters()) > data_file.LARGE_BYTES
    free = {
        tensor.name: {axis: size for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
        for tensor in (*spec.inputs, *spec.outputs)
    }
    with warnings.catch_warnings(), torch.no_grad():
        # The tracer warns of every size read in Python; the contract fixes those sizes.  And torch
        # announces the end of this exporter: the newer one refuses the UNet's free batch (2.13), and
        # its graphs are no smaller or faster once ONNX Runtime has optimised them.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            tuple(tensor.to(device) for tensor in example_tensors(preset, name, batch=2)),
            str(target),
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            dynamic_axes=free,
            opset_version=OPSET,
            dynamo=False,
            export_params=not large,
            do_constant_folding=not large,
        )
    model = onnx.load(target)
    for tensor, value in zip(spec.outputs, model.graph.output, strict=True):
        # The exporter gives names of its own to output sizes that it did not work out.
        for size, dim in zip(tensor.shape, value.type.tensor_type.shape.dim, strict=True):
            if isinstance(size, str):
                dim.dim_param = size
            else:
                dim.dim_value = size
    compact(model.graph)
    if large:
        with DataFile(target.with_suffix(".weights")) as data:
            _give_weights(model.graph, network, data)
            store(model, target, data)
        onnx.checker.check_model(str(target), full_check=True)
        return
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, target)


def _give_weights(graph: onnx.GraphProto, network: nn.Module, data: DataFile) -> None:
    """Turn inputs that are weights into weights, in the order of the axes in which they are read."""
    weights = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    inputs = [value for value in graph.input if value.name not in weights]
    given = [value.name for value in graph.input if value.name in weights]
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for entry in node.input:
            readers.setdefault(entry, []).append(node)
    renamed, dropped = {}, set()
    for name in given:
        array = weights[name].detach().cpu().numpy()
        orders = [
            tuple(node.attribute[0].ints) if node.op_type == "Transpose" else None for node in readers[name]
        ]
        if orders[0] is not None and len(set(orders)) == 1:
            array = array.transpose(orders[0])
            renamed |= {node.output[0]: name for node in readers[name]}
            dropped |= {node.name for node in readers[name]}
        if data.takes(array):
            graph.initializer.append(data.add(name, array))
        else:
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
    nodes = [node for node in graph.node if node.name not in dropped]
    for node in nodes:
        for position, entry in enumerate(node.input):
            node.input[position] = renamed.get(entry, entry)
    del graph.input[:], graph.node[:]
    graph.input.extend(inputs)
    graph.node.extend(nodes)


def run_onnx(session: Any, inputs: tuple[torch.Tensor, ...]) -> list[NDArray[np.float32]]:
    """Run a session on inputs in the order of the contract."""
    names = [value.name for value in session.get_inputs()]
    outputs: list[NDArray[np.float32]] = session.run(
        None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    )
    return outputs


@torch.no_grad()
def parity_error(preset: Preset, name: str, network: nn.Module, path: Path) -> float:
    """Largest relative 2-norm error over outputs and over batches of one and two.

    A value that is no number makes the whole error NaN.
    """
    session, errors = cpu_session(path), []
    for batch in (1, 2):
        inputs = example_tensors(preset, name, batch, seed=batch)
        expected = network(*inputs)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for value, truth in zip(run_onnx(session, inputs), expected, strict=True):
            errors.append(np.linalg.norm(value - truth.numpy()) / np.linalg.norm(truth.numpy()))
    return float(np.max(errors))


def _training_record(checkpoint: Path) -> dict[str, Any]:
    state = load_state(checkpoint)
    return {
        "steps": state["step"],
        **{key: state[key] for key in ("merged_steps", "merged_seeds") if key in state},
        "batch": state["batch"],
        "seed": state["seed"],
        "losses": state["config"]["train"]["losses"],
        "last_losses": state["history"][-1] if state["history"] else {},
    }
