"""Where the kernels of `neus/cuda/` run: memory and launches, as the fit sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

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
