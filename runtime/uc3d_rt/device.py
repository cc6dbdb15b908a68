"""Where the kernels of `cuda/` run: memory and launches, as the fit sees them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.errors import BackendError

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


Launch = tuple[str, int, Sequence[Buffer | Scalar | None]]
"""Kernel, threads and arguments, as of `Device.launch`."""

Captured = Any
"""What `Device.capture` has kept; each device has its own kind."""


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

    def wait(self) -> None:
        """Until all work is done.

        Raises:
            BackendError: it failed.
        """
        ...

    def launch(self, kernel: str, threads: int, *arguments: Buffer | Scalar | None) -> None:
        """Run a kernel with at least that many threads, or as many as make sense.

        Args:
            kernel: its name in `cuda/`.
            threads: of which each takes one element, or several.
            arguments: of exactly the kernel's types; None is a null pointer.

        Raises:
            BackendError: the device refused.
        """
        ...

    def repeat(self, launches: Sequence[Launch], times: int) -> None:
        """Run kernels one after the other, all of them that many times: less work than as many `launch`.

        Raises:
            BackendError: the device refused.
        """
        ...

    def capture(self, work: Callable[[], None]) -> Captured:
        """Keep what `work` launches and clears, which does not run, to run it often with `replay`.

        Args:
            work: takes and frees no memory, and neither uploads nor downloads.

        Raises:
            BackendError: the device refused.
        """
        ...

    def replay(self, captured: Captured) -> None:
        """Run what was captured, with the memory and the numbers of then.

        Raises:
            BackendError: the device refused.
        """
        ...

    def forget(self, captured: Sequence[Captured]) -> None:
        """Give back what the device holds for captures that are not needed any more."""
        ...


class Scope:
    """A `Device` that frees all memory and captures that were taken through it at the end of a `with`."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._taken: dict[int, Buffer] = {}
        self._captured: dict[int, Captured] = {}
        self.launch, self.repeat, self.replay = device.launch, device.repeat, device.replay
        self.wait = device.wait
        self.clear, self.upload, self.download = device.clear, device.upload, device.download

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Free what is left; where an error is on its way, a device that fails to do so too is let be."""
        with contextlib.suppress(*([] if kind is None else [BackendError])):
            self.forget(list(self._captured.values()))
            self.free(list(self._taken.values()))

    def empty(self, shape: Sequence[int], dtype: type[np.generic]) -> Buffer:
        """See `Device`."""
        buffer = self._device.empty(shape, dtype)
        self._taken[id(buffer)] = buffer
        return buffer

    def free(self, buffers: Sequence[Buffer]) -> None:
        """See `Device`."""
        for buffer in buffers:
            del self._taken[id(buffer)]
        self._device.free(buffers)

    def capture(self, work: Callable[[], None]) -> Captured:
        """See `Device`."""
        captured = self._device.capture(work)
        self._captured[id(captured)] = captured
        return captured

    def forget(self, captured: Sequence[Captured]) -> None:
        """See `Device`."""
        for one in captured:
            del self._captured[id(one)]
        self._device.forget(captured)


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
