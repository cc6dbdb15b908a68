"""Where the kernels of `neus/cuda/` run: memory and launches, as the fit sees them."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

Scalar = np.int32 | np.uint32 | np.float32 | np.float64


class Buffer(Protocol):
    """Memory of a device, freed with it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """As of an array."""
        ...


class Device(Protocol):
    """Memory and kernels of one device; calls take effect in their order."""

    def empty(self, shape: Sequence[int], dtype: type[np.generic]) -> Buffer:
        """Memory of unknown content.

        Raises:
            BackendError: there is not enough.
        """
        ...

    def clear(self, buffer: Buffer) -> None:
        """Set every byte to zero."""
        ...

    def upload(self, array: NDArray[Any], buffer: Buffer) -> None:
        """Copy an array of the same shape and dtype to the device."""
        ...

    def download(self, buffer: Buffer) -> NDArray[Any]:
        """Copy to a new array, when all before is done."""
        ...

    def free(self, buffers: Sequence[Buffer]) -> None:
        """Give memory back when all before is done."""
        ...

    def launch(self, kernel: str, threads: int, *arguments: Buffer | Scalar | None) -> None:
        """Run a kernel with at least that many threads, or as many as make sense.

        Args:
            kernel: its name in `neus/cuda/`.
            threads: of which each takes one element, or several.
            arguments: of exactly the kernel's types; None is a null pointer.

        Raises:
            BackendError: the device refused.
        """
        ...


class Scope(Device):
    """A device whose memory is given back at the end of a `with` block, whatever ended it."""

    def __init__(self, device: Device) -> None:
        """Take memory from a device that outlives the scope."""
        self._device = device
        self._taken: dict[int, Buffer] = {}

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give back what was taken and not freed."""
        left, self._taken = list(self._taken.values()), {}
        if left:
            self._device.free(left)

    def empty(self, shape: Sequence[int], dtype: type[np.generic]) -> Buffer:
        """See `Device`."""
        buffer = self._device.empty(shape, dtype)
        self._taken[id(buffer)] = buffer
        return buffer

    def clear(self, buffer: Buffer) -> None:
        """See `Device`."""
        self._device.clear(buffer)

    def upload(self, array: NDArray[Any], buffer: Buffer) -> None:
        """See `Device`."""
        self._device.upload(array, buffer)

    def download(self, buffer: Buffer) -> NDArray[Any]:
        """See `Device`."""
        return self._device.download(buffer)

    def free(self, buffers: Sequence[Buffer]) -> None:
        """See `Device`."""
        for buffer in buffers:
            del self._taken[id(buffer)]
        self._device.free(buffers)

    def launch(self, kernel: str, threads: int, *arguments: Buffer | Scalar | None) -> None:
        """See `Device`."""
        self._device.launch(kernel, threads, *arguments)


def uploaded(device: Device, array: NDArray[Any]) -> Buffer:
    """A new buffer with the content of an array."""
    buffer = device.empty(array.shape, array.dtype.type)
    device.upload(np.ascontiguousarray(array), buffer)
    return buffer


def cleared(device: Device, shape: Sequence[int], dtype: type[np.generic]) -> Buffer:
    """A new buffer of zeros."""
    buffer = device.empty(shape, dtype)
    device.clear(buffer)
    return buffer
