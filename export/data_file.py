"""Large weights in a file beside their graph: read one at a time, appended one after the other.

A message of protobuf ends at 2 GB.  So a graph is always read without the weights that stand beside it:
they are named by absolute path until the graph is written, and only who needs one reads it.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from uc3d_rt.contract import WeightsFile

Array = NDArray[Any]

LARGE_BYTES = 512 << 20
"""A network whose weights take more in fp32 is exported with a data file."""

APART_ENTRIES = 1 << 18
"""Tensors of as many entries stand in it; what is smaller stays in the graph, where constants are folded."""

PAGE_BYTES = 4096  # weights begin on pages, so that a file can be mapped into memory


def load_graph(path: Path) -> onnx.ModelProto:
    """The graph of a file; weights beside it stay there, named by their absolute path.

    Raises:
        ValueError: it is no ONNX file.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ValueError(f"{path} is no ONNX file ({error}); fetch or export the bundle again") from error
    for tensor in model.graph.initializer:
        if is_apart(tensor):
            _set_location(tensor, str(path.parent.resolve() / location(tensor)["location"]))
    return model


def graph_bytes(model: onnx.ModelProto, weights: str) -> bytes:
    """A graph as it is written, its weights standing beside it in the one file of a name."""
    written = onnx.ModelProto()
    written.CopyFrom(model)
    for tensor in written.graph.initializer:
        if is_apart(tensor):
            _set_location(tensor, weights)
    return bytes(written.SerializeToString(deterministic=True))


def is_apart(tensor: onnx.TensorProto) -> bool:
    """Whether a weight stands in a data file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def location(tensor: onnx.TensorProto) -> dict[str, str]:
    """`location`, `offset` and `length` of a weight in a data file, as ONNX writes them."""
    return {entry.key: entry.value for entry in tensor.external_data}


def least_entries(model: onnx.ModelProto) -> int | None:
    """Entries of the smallest weight that stands in a data file; None if none does."""
    return min((int(np.prod(t.dims)) for t in model.graph.initializer if is_apart(t)), default=None)


def data_path(path: Path) -> Path | None:
    """The data file that an ONNX file refers to; None if it holds all of its weights, or is no ONNX file.

    Raises:
        ValueError: it refers to several.
    """
    try:
        model = load_graph(path)
    except ValueError:
        return None  # who opens it tells of it
    names = {location(t)["location"] for t in model.graph.initializer if is_apart(t)}
    if len(names) > 1:
        raise ValueError(f"{path} has its weights in {len(names)} files; export the bundle again")
    return Path(names.pop()) if names else None


def array_of(tensor: onnx.TensorProto) -> Array:
    """Values of a tensor; mapped from its file where it stands in one."""
    if not is_apart(tensor):
        return numpy_helper.to_array(tensor)
    where = location(tensor)
    kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    offset = int(where.get("offset", 0))
    return np.memmap(where["location"], kind, "r", offset, tuple(tensor.dims))


class Constants(Mapping[str, Array]):
    """Constants of a graph by name.

    Those in a data file are read, and made fp32 if they are stored as int8, each time they are asked for.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._decoded = {
            node.output[0]: node
            for node in graph.node
            if node.op_type == "DequantizeLinear" and all(name in self._tensors for name in node.input)
        }
        self._read = {name: array_of(t) for name, t in self._tensors.items() if not is_apart(t)}

    def __getitem__(self, name: str) -> Array:
        if name in self._read:
            return self._read[name]
        node = self._decoded.get(name)
        if node is None:
            return array_of(self._tensors[name])
        codes, scale = (self[entry] for entry in node.input)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        around = [1] * codes.ndim
        around[axis] = -1
        return np.asarray(codes, np.float32) * scale.reshape(around)

    def __iter__(self) -> Iterator[str]:
        yield from self._tensors
        yield from self._decoded

    def __len__(self) -> int:
        return len(self._tensors) + len(self._decoded)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors or name in self._decoded

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all, without reading them."""
        found = {name: tuple(tensor.dims) for name, tensor in self._tensors.items()}
        return found | {name: tuple(self._tensors[n.input[0]].dims) for name, n in self._decoded.items()}


class DataFile:
    """The data file of a graph that is being written, and room for what is made on the way.

    Use it with `with`: what was not kept is removed.
    """

    def __init__(self, path: Path, least: int | None = None) -> None:
        """Begin a file.

        Args:
            path: where it is written.
            least: entries of the smallest tensor that goes there; None takes `APART_ENTRIES`.
        """
        self.path = path.resolve()
        self.least = APART_ENTRIES if least is None else least
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._kept = False
        self._stream = path.open("wb")
        self._room = tempfile.TemporaryDirectory()
        self.room = Path(self._room.name)  # for files that last as long as this one

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._room.cleanup()
        if not self._kept:
            self.path.unlink(missing_ok=True)

    def takes(self, array: Array) -> bool:
        """Whether an array is large enough to stand here."""
        return array.size >= self.least

    def add(self, name: str, array: Array) -> onnx.TensorProto:
        """Append an array; gives the initializer that refers to it."""
        array = np.ascontiguousarray(array)
        self._write(bytes(-self._bytes % PAGE_BYTES))
        offset = self._bytes
        self._write(array.reshape(-1).view(np.uint8).data)
        self._stream.flush()
        tensor = onnx.TensorProto(
            name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            data_location=TensorProto.EXTERNAL,
        )  # fmt: skip
        for key, value in (("location", self.path), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def record(self) -> WeightsFile | None:
        """What the file is, all of it on the disk; None if nothing was added.

        The name to give it tells what it holds: the same weights have one file, and a graph reads no others.
        """
        if not self._bytes:
            return None
        os.fsync(self._stream.fileno())
        digest = self._digest.hexdigest()
        return WeightsFile(f"weights-{digest[:16]}.bin", digest, self._bytes)

    def keep(self) -> None:
        """Let the file stay after this object."""
        self._kept = True

    def _write(self, data: Any) -> None:
        self._stream.write(data)
        self._digest.update(data)
        self._bytes += len(data)


def store(model: onnx.ModelProto, path: Path, data: DataFile) -> None:
    """Write a graph, and the data file beside it under the name that tells what it holds."""
    record = data.record()
    if record is not None:
        data.keep()
        os.replace(data.path, path.parent / record.file)
    path.write_bytes(graph_bytes(model, record.file if record else ""))


def moved(model: onnx.ModelProto, data: DataFile) -> onnx.ModelProto:
    """A graph with all weights that it reads from data files in one of its own, as fp32 or as they were."""
    graph, constants = model.graph, Constants(model.graph)
    decoders = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    decoded = [name for name in constants if name in decoders]
    read = {name for node in graph.node if node.output[0] not in decoders for name in node.input}
    kept = [t for t in graph.initializer if t.name in read and not is_apart(t)]
    kept += [data.add(t.name, array_of(t)) for t in graph.initializer if t.name in read and is_apart(t)]
    kept += [data.add(name, constants[name]) for name in decoded if name in read]
    nodes = [node for node in graph.node if node.output[0] not in decoded]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)
    return model


@contextmanager
def openable(model: onnx.ModelProto) -> Iterator[bytes | str]:
    """A graph as ONNX Runtime opens it: its bytes, or a file for a moment beside its weights."""
    files = {location(t)["location"] for t in model.graph.initializer if is_apart(t)}
    if not files:
        yield model.SerializeToString()
        return
    (weights,) = (Path(name) for name in files)
    handle, name = tempfile.mkstemp(".onnx", ".check.", weights.parent)
    os.close(handle)
    try:
        Path(name).write_bytes(graph_bytes(model, weights.name))
        yield name
    finally:
        Path(name).unlink()


def _set_location(tensor: onnx.TensorProto, value: str) -> None:
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = value
