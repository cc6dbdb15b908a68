"""The interface between the pipeline and whatever runs a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.contract import Manifest, NetworkSpec, TensorSpec
from uc3d_rt.errors import UsageError

FloatArray = NDArray[np.float32]

DEVICES: tuple[str, ...] = ("cpu", "cuda")


class Network(Protocol):
    """One loaded network; owns its memory until closed, so use it with `with`."""

    def __call__(self, **inputs: FloatArray) -> dict[str, FloatArray]:
        """Run once.

        Args:
            inputs: every input of the contract, by name.

        Returns:
            Every output of the contract, by name.

        Raises:
            ValueError: an input is missing, unknown, or of another dtype or shape.
            BackendError: the device failed, for example for want of memory.
        """
        ...

    def close(self) -> None:
        """Free the memory; the network cannot be called any more."""
        ...

    def __enter__(self) -> Self:
        """Give the network itself."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        ...


class Backend(Protocol):
    """Opens the networks of a bundle on one device."""

    def open(self, bundle: Path, manifest: Manifest, name: str) -> Network:
        """Verify and load one network.

        Raises:
            BundleError: its file is missing or altered, or breaks the tensor contract.
            BackendError: it cannot be loaded on the device.
        """
        ...


def backend_for(device: str, threads: int | None = None) -> Backend:
    """The backend that serves a device; never another device than the one asked for.

    Args:
        device: one of `DEVICES`.
        threads: CPU threads a network may use; None leaves the choice to the engine.

    Raises:
        UsageError: unknown device, or `threads` below 1.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}")
    if device in DEVICES:
        from uc3d_rt.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(device, threads)
    raise UsageError(f"unknown device {device!r}; choose one of {', '.join(DEVICES)}")


def check_inputs(spec: NetworkSpec, inputs: Mapping[str, FloatArray], views: int) -> None:
    """Hold inputs against the contract; free dimensions must agree with one another.

    Raises:
        ValueError: naming the tensor, what it is and what it should be.
    """
    expected = {tensor.name for tensor in spec.inputs}
    if set(inputs) != expected:
        raise ValueError(f"{spec.name} takes {sorted(expected)}, got {sorted(inputs)}")
    free: dict[str, int] = {}
    for tensor in spec.inputs:
        value = inputs[tensor.name]
        if str(value.dtype) != tensor.dtype or not _fits(tensor, value.shape, free):
            raise ValueError(
                f"{spec.name}.{tensor.name} must be {tensor.dtype} {tensor.shape}"
                f"{f' with {free}' if free else ''}, got {value.dtype} {value.shape}"
            )
    if "samples" in free and free["samples"] != free.get("batch", 0) * views:
        raise ValueError(f"{spec.name}: samples must be batch * {views}, got {free}")


def _fits(tensor: TensorSpec, shape: tuple[int, ...], free: dict[str, int]) -> bool:
    if len(shape) != len(tensor.shape):
        return False
    for want, got in zip(tensor.shape, shape, strict=True):
        if got != (free.setdefault(want, got) if isinstance(want, str) else want):
            return False
    return True
