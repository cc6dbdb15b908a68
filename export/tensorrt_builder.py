"""ONNX in, engine out: TensorRT 10, TensorRT 11 and TensorRT-RTX, all through Polygraphy.

The three differ in flags, names and in what they need (TensorRT-RTX builds ahead of time, with no GPU);
Polygraphy knows the differences.  One process builds with one of them: the choice is made at import.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from uc3d_rt.engines import LIBRARY_MODULES, known_targets
from uc3d_rt.errors import BackendError, UsageError


@dataclass(frozen=True)
class Library:
    """A library that builds engines."""

    suffix: str  # of its engine files
    mend: str  # how to install it


LIBRARIES = {
    "onnxruntime": Library(".onnx", "pip install onnxruntime"),
    "tensorrt": Library(".plan", "pip install tensorrt (NVIDIA's own package index)"),
    "tensorrt-rtx": Library(".rtx", "pip install 'uc3d-rt[engines]'"),
}

Profile = Mapping[str, tuple[int, ...]]
"""Shapes of all inputs, by name, that one optimisation profile is made for."""


def library(backend: str) -> ModuleType:
    """The module of a backend.

    Raises:
        BackendError: it is not installed, or does not load.
    """
    try:
        return importlib.import_module(LIBRARY_MODULES[backend])
    except ImportError as error:
        raise BackendError(f"{backend} does not load ({error}); {LIBRARIES[backend].mend}") from error


def check_targets(backend: str, targets: Sequence[str]) -> None:
    """Refuse what the library cannot build for.

    Raises:
        UsageError: naming what it can.
    """
    if not targets:
        return
    if backend == "onnxruntime":
        raise UsageError("graphs for onnxruntime run on every GPU that it knows; leave --target out")
    known = known_targets(backend)
    unknown = [target for target in targets if target not in known]
    if unknown and known:
        raise UsageError(
            f"{backend} cannot build for {', '.join(unknown)}, only for {', '.join(known)}; other GPUs need "
            "TensorRT itself (--backend tensorrt, on that GPU)"
        )
    if unknown:
        raise UsageError(f"{backend} builds for the GPU of this machine alone; leave --target out")


def build_engine(
    model: bytes,
    *,
    backend: str,
    targets: Sequence[str] = (),
    profiles: Sequence[Profile] = (),
    timing_cache: Path | None = None,
) -> bytes:
    """Build one engine from a strongly typed ONNX model; what the library says goes to the standard streams.

    Args:
        model: serialised ONNX, fp32 where it says so and nowhere else.
        backend: one of `LIBRARIES`; the first call of a process decides for all later ones.
        targets: compute capabilities; none = all that the library knows, or this machine's.
        profiles: fixed shapes, one profile each, of a model with free dimensions.
        timing_cache: file read and written by TensorRT; TensorRT-RTX has none.

    Raises:
        BackendError: the library is missing, refuses the model, or fails.
    """
    module = library(backend)
    import polygraphy.config

    polygraphy.config.USE_TENSORRT_RTX = backend == "tensorrt-rtx"
    from polygraphy.backend import trt
    from polygraphy.exception import PolygraphyException

    found = trt.util.trt.__name__
    if found != module.__name__:
        raise BackendError(f"this process already builds with {found}; build with {backend} in another")
    try:
        builder, network, parser = trt.network_from_onnx_bytes(model, strongly_typed=True)
        if network.num_outputs == 0:  # the parser takes an empty file for an empty network
            raise BackendError(f"{backend} finds no network in the model")
        config = _config(trt, backend, targets, profiles, timing_cache)
        plan: Any = trt.engine_bytes_from_network((builder, network, parser), config, timing_cache)
        return bytes(plan)
    except PolygraphyException as error:
        raise BackendError(f"{backend} {module.__version__} cannot build the engine: {error}") from error


def _config(
    trt: ModuleType, backend: str, targets: Sequence[str], profiles: Sequence[Profile], cache: Path | None
) -> Any:
    shapes = []
    for profile in profiles:
        shapes.append(trt.Profile())
        for name, shape in profile.items():
            shapes[-1].add(name, shape, shape, shape)
    if backend == "tensorrt-rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        # "sm_120": all but the last digit is the major version.
        capabilities = [(int(target[3:-1]), int(target[-1])) for target in targets] or None
        return CreateConfigRTX(profiles=shapes or None, compute_capabilities=capabilities)
    return trt.CreateConfig(profiles=shapes or None, load_timing_cache=str(cache) if cache else None)
