"""Devices that count the bytes which are taken of them: one around another, and one that has no memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.device import Buffer, Captured, Device, Launch, Scalar


class CountingDevice:
    """A `Device` that passes everything on to another, and counts.

    What it does not count itself is the other's own (`__getattr__`), so `counted` gives it its type.
    """

    def __init__(self, device: Device, before_less: Callable[[], None] | None = None) -> None:
        """Begin at zero.

        Args:
            device: that does the work.
            before_less: called before memory is given back, whenever more is held than at any call before.
        """
        self._device = device
        self._before_less = before_less
        self.held = 0  # bytes of arrays
        self.most = 0
        self._told = 0

    def __getattr__(self, name: str) -> Any:
        """The other device's."""
        return getattr(self._device, name)

    def empty(self, shape: Sequence[int], dtype: type[np.generic]) -> Buffer:
        """See `Device`."""
        buffer = self._device.empty(shape, dtype)
        self.held += _nbytes(buffer)
        self.most = max(self.most, self.held)
        return buffer

    def free(self, buffers: Sequence[Buffer]) -> None:
        """See `Device`."""
        if self._before_less is not None and self.held > self._told:
            self._told = self.held
            self._before_less()
        self.held -= sum(_nbytes(buffer) for buffer in buffers)
        self._device.free(buffers)


@dataclass(frozen=True, eq=False)
class NoBuffer:
    """Shape and dtype of memory that is not there."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class NoDevice:
    """A `Device` that computes nothing; arrays that come back from it are all ones, or of one count."""

    def __init__(self, count: int = 1) -> None:
        """Whole numbers that come back are this one."""
        self._count = count

    def empty(self, shape: Sequence[int], dtype: type[np.generic]) -> Buffer:
        """See `Device`."""
        return NoBuffer(tuple(shape), np.dtype(dtype))

    def clear(self, buffer: Buffer) -> None:
        """See `Device`."""

    def upload(self, array: NDArray[Any], buffer: Buffer) -> None:
        """See `Device`."""

    def download(self, buffer: Buffer) -> NDArray[Any]:
        """See `Device`."""
        value = self._count if buffer.dtype == np.int32 else 1
        return np.broadcast_to(np.full((), value, buffer.dtype), buffer.shape)

    def free(self, buffers: Sequence[Buffer]) -> None:
        """See `Device`."""

    def launch(self, kernel: str, threads: int, *arguments: Buffer | Scalar | None) -> None:
        """See `Device`."""

    def repeat(self, launches: Sequence[Launch], times: int) -> None:
        """See `Device`."""

    def capture(self, work: Callable[[], None]) -> Captured:
        """See `Device`."""
        return work

    def replay(self, captured: Captured) -> None:
        """See `Device`."""

    def forget(self, captured: Sequence[Captured]) -> None:
        """See `Device`."""

    def wait(self) -> None:
        """See `Device`."""


def _nbytes(buffer: Buffer) -> int:
    return math.prod(buffer.shape) * buffer.dtype.itemsize
