"""A bundle back as a checkpoint, to train on from what ships.

Exporting folds weights: matrices are transposed, tables joined, names lost.  So the same networks are
exported once more with random weights, every one of which is then looked for in the new graphs; where it
stands there, the bundle's own graph holds the weight that was trained.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.data_file import Constants, load_graph
from export.networks import modules_of
from export.onnx_bundle import PARITY_LIMIT, export_network, parity_error
from export.weights import read_shared_weights_directly
from train.checkpoint import CheckpointError, build_vae, save_checkpoint
from train.model import MultiviewModel
from train.presets import PRESETS, Preset
from uc3d_rt.contract import NETWORK_NAMES, Manifest, load_manifest, verified_network_path

Array = NDArray[Any]

Reader = tuple[str, str, int]
"""A node's operator and name, and which of its inputs reads a constant."""


_MEND = "check out the code it was exported with"


class _Readers:
    """A graph's constants, and which node reads them where."""

    def __init__(self, path: Path) -> None:
        self.path = path
        graph = load_graph(path).graph
        read_shared_weights_directly(graph)
        self.constants = Constants(graph)
        self.entries = {
            (node.op_type, node.name, position): entry
            for node in graph.node
            if node.op_type != "DequantizeLinear"
            for position, entry in enumerate(node.input)
            if entry in self.constants
        }


@dataclass(frozen=True)
class _Place:
    """Where a weight stands in a graph."""

    reader: Reader
    first: int  # entry of the flat constant
    transposed: bool


def checkpoint_from_bundle(bundle: Path, folder: Path) -> Manifest:
    """Write the networks of a bundle as a checkpoint that `python -m train model --start-from` takes.

    Weights that the bundle stores as int8 stay rounded.  There is no optimiser state in a bundle, so
    nothing can be resumed from it.

    Args:
        bundle: folder with `manifest.json`.
        folder: of the checkpoint; must not exist.

    Raises:
        ValueError: `folder` exists.
        CheckpointError: the bundle is of no preset, or of other networks than this code exports.
        BundleError: the bundle is missing, incomplete or altered.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists; choose another --out, or remove it")
    manifest = load_manifest(bundle)
    paths = {name: verified_network_path(bundle, manifest, name) for name in NETWORK_NAMES}
    preset = PRESETS.get(manifest.profile)
    if preset is None or preset.shape != manifest.shape:
        raise CheckpointError(
            f"{bundle} is of profile {manifest.profile!r} with other sizes than this code has; "
            "check out the code it was exported with"
        )
    model, vae = MultiviewModel(preset), build_vae(preset)
    networks = modules_of(model, vae)
    random = torch.Generator().manual_seed(0)
    for module in (model, vae):
        for value in module.state_dict().values():
            value.normal_(generator=random)
    trained: dict[int, Array] = {}  # by address: both halves of the autoencoder hold all of it
    for name, network in networks.items():
        state = network.state_dict()
        for key, array in _weights(preset, name, network, paths[name]):
            trained[state[key].data_ptr()] = array
    for module in (model, vae):
        for key, value in module.state_dict().items():
            if value.data_ptr() not in trained:
                raise CheckpointError(f"no network of {bundle} holds the weight {key}; {_MEND}")
            value.copy_(torch.from_numpy(np.array(trained[value.data_ptr()])))
    for name, network in networks.items():
        error = parity_error(preset, name, network, paths[name])
        if not error <= PARITY_LIMIT:
            raise CheckpointError(
                f"{paths[name]} does not compute what its weights do in torch ({error:.1e} apart); {_MEND}"
            )
    weights = dict(model.state_dict())
    record = {"step": 0, "batch": 0, "seed": 0, "history": [], "bundle": dict(manifest.training)}
    save_checkpoint(folder, preset=preset, model=model, ema=weights, vae=vae, optimizers=(), state=record)
    return manifest


def _weights(preset: Preset, name: str, network: nn.Module, path: Path) -> Iterator[tuple[str, Array]]:
    """What the bundle's graph has in the place of each of a network's weights, which are random."""
    with tempfile.TemporaryDirectory() as work:
        fresh_path = Path(work) / path.name
        export_network(preset, name, network, fresh_path)
        fresh, bundled = _Readers(fresh_path), _Readers(path)
        whole = {fresh.constants[entry].tobytes(): reader for reader, entry in fresh.entries.items()}
        for key, value in network.state_dict().items():
            place = _place(value.numpy(), whole)
            if place is not None:
                yield key, _taken(bundled, place, tuple(value.shape))


def _place(weight: Array, whole: Mapping[bytes, Reader]) -> _Place | None:
    """Where a weight stands among the bytes of all constants; alone if it can be."""
    forms = {False: weight.tobytes()} | ({True: weight.T.tobytes()} if weight.ndim == 2 else {})
    for transposed, form in forms.items():
        if form in whole:
            return _Place(whole[form], 0, transposed)
    for content, reader in whole.items():
        for transposed, form in forms.items():
            at = content.find(form)
            if at >= 0:
                return _Place(reader, at // weight.itemsize, transposed)
    return None


def _taken(graph: _Readers, place: _Place, shape: tuple[int, ...]) -> Array:
    """The values that stand in a place.

    Raises:
        CheckpointError: the graph has no such place.
    """
    if place.reader not in graph.entries:
        raise CheckpointError(f"{graph.path} has no {place.reader[1]} of {place.reader[0]}; {_MEND}")
    flat = graph.constants[graph.entries[place.reader]].reshape(-1)
    part = flat[place.first : place.first + int(np.prod(shape))]
    if part.size != np.prod(shape):
        raise CheckpointError(f"{graph.path}: {place.reader[1]} reads a weight of another size; {_MEND}")
    return part.reshape(shape[::-1]).T if place.transposed else part.reshape(shape)
