"""The interface between the pipeline and whatever runs a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.contract import Manifest, NetworkSpec, TensorSpec
from uc3d_rt.errors import UsageError
from uc3d_rt.ladder import OFF, LowMemory, Rung
from uc3d_rt.sampler import Step, run_steps

FloatArray = NDArray[np.float32]

DEVICES: tuple[str, ...] = ("cpu", "cuda")


@dataclass(frozen=True)
class Place:
    """A device: the CPU, or one of the GPUs."""

    kind: str  # of `DEVICES`
    ordinal: int = 0  # of the GPU, as CUDA counts them

    @classmethod
    def named(cls, name: str) -> Place:
        """The device of a name: "cpu", "cuda" (the first GPU) or "cuda:1".

        Raises:
            UsageError: it is none.
        """
        kind, colon, number = name.partition(":")
        if kind not in DEVICES or (colon and (kind == "cpu" or not number.isdecimal())):
            raise UsageError(
                f"unknown device {name!r}; choose cpu, cuda, or cuda:N for the GPU of that number"
            )
        return cls(kind, int(number or 0))

    def __str__(self) -> str:
        return self.kind if self.ordinal == 0 else f"{self.kind}:{self.ordinal}"


class Resource(Protocol):
    """Owns memory until closed, so use it with `with`."""

    def close(self) -> None:
        """Free the memory; nothing else works any more."""
        ...

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


class Network(Resource, Protocol):
    """One loaded network."""

    batch: int | None = None
    """How many a call takes, where that is fixed: of what the first input holds."""

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


class Sampler(Resource, Protocol):
    """The UNet and all steps of one object, wherever they run."""

    def __call__(
        self,
        tokens: FloatArray,
        image_latent: FloatArray,
        focal: float,
        z_T: FloatArray,
        plan: Sequence[Step],
        *,
        guidance: float,
        guidance_rescale: float = 0.0,
        on_step: Callable[[int, int], None] | None = None,
    ) -> FloatArray:
        """`z_0` (views, channels, h, w) of `z_T`.

        Args:
            tokens: of the picture (1, tokens, dim).
            image_latent: E(y) (1, c, h, w).
            focal: `f~`; 0 = orthographic, -1 = unknown.
            z_T: start noise (views, channels, h, w).
            plan: of `ddim_steps`.
            guidance: scale that the plan was made for.
            guidance_rescale: see `uc3d_rt.sampler.guided`.
            on_step: told `(done, steps)` after each step.

        Raises:
            BackendError: the device failed, for example for want of memory.
        """
        ...


class NetworkSampler(Sampler):
    """Steps on the host around a UNet that is called once a step, or for one object at a time."""

    def __init__(self, network: Network, one_at_a_time: bool = False) -> None:
        self._network = network
        self._one_at_a_time = one_at_a_time

    def __call__(
        self,
        tokens: FloatArray,
        image_latent: FloatArray,
        focal: float,
        z_T: FloatArray,
        plan: Sequence[Step],
        *,
        guidance: float,
        guidance_rescale: float = 0.0,
        on_step: Callable[[int, int], None] | None = None,
    ) -> FloatArray:
        """Run all steps; see `Sampler`."""
        views = len(z_T)
        # The unconditional half sees no picture: tokens and E(y) zeroed together.
        both_tokens = np.concatenate([tokens, np.zeros_like(tokens)])
        both_latents = np.concatenate([image_latent, np.zeros_like(image_latent)])

        def predict(z_t: FloatArray, t: float, objects: slice) -> FloatArray:
            batch = objects.stop - objects.start
            return self._network(
                sample=np.concatenate([z_t] * batch),
                timestep=np.full(batch, t, np.float32),
                tokens=both_tokens[objects],
                image_latent=both_latents[objects],
                focal=np.full(batch, focal, np.float32),
            )["prediction"]

        def denoise(z_t: FloatArray, t: float, guided: bool) -> tuple[FloatArray, FloatArray | None]:
            if guided and self._one_at_a_time:
                return predict(z_t, t, slice(0, 1)), predict(z_t, t, slice(1, 2))
            prediction = predict(z_t, t, slice(0, 2 if guided else 1))
            return prediction[:views], prediction[views:] if guided else None

        return run_steps(denoise, z_T, plan, guidance, guidance_rescale, on_step)

    def close(self) -> None:
        """Free the network."""
        self._network.close()


class Backend(Protocol):
    """Opens the networks of a bundle on one device."""

    low_memory: Rung = OFF
    """What is done to need less memory."""

    def open(self, bundle: Path, manifest: Manifest, name: str) -> Network:
        """Verify and load one network.

        Raises:
            BundleError: its file is missing or altered, or breaks the tensor contract.
            BackendError: it cannot be loaded on the device.
        """
        ...

    def open_sampler(self, bundle: Path, manifest: Manifest) -> Sampler:
        """Verify and load what the steps need; raises as `open`."""
        return NetworkSampler(self.open(bundle, manifest, "unet"), self.low_memory.one_object)


def backend_for(device: str, threads: int | None = None, low_memory: LowMemory = False) -> Backend:
    """The backend that runs a bundle's own files on a device; never another device than the one asked for.

    Args:
        device: a name of `Place`.
        threads: CPU threads a network may use; None leaves the choice to the engine.
        low_memory: a rung of `uc3d_rt.ladder.LADDER`.

    Raises:
        UsageError: unknown device or rung, or `threads` below 1.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}")
    place = Place.named(device)
    from uc3d_rt.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(str(place), threads, low_memory)


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
