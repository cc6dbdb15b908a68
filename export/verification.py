"""Does every form of a bundle compute the same: torch, ONNX, the fp16 graph, engines.

Each form is a backend of the runtime, so that tensors and whole samples go through the code that
users run.  The bundle's ONNX files on the CPU are what all others are held against.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from export.engine_plan import engine_batches
from export.example_inputs import example_inputs
from export.quantized_graph import (
    LEAST_SAMPLE_DB,
    QUANTIZED,
    QUANTIZED_NETWORK,
    RANGES_NAME,
    ActivationRanges,
    load_ranges,
)
from export.typed_graph import rounded_session, typed_graph
from uc3d_rt.backends.base import Backend, Network, check_inputs
from uc3d_rt.backends.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeNetwork, OnnxRuntimeQuantized
from uc3d_rt.backends.onnxruntime_engines import OnnxRuntimeEngines
from uc3d_rt.backends.tensorrt import TensorRtEngines
from uc3d_rt.contract import (
    NETWORK_NAMES,
    Manifest,
    NetworkSpec,
    load_manifest,
    network_specs,
    verified_network_path,
)
from uc3d_rt.engines import (
    CPU,
    EngineSet,
    built_folders,
    installed_version,
    load_engine_set,
    misfits,
    this_machine,
)
from uc3d_rt.errors import BundleError
from uc3d_rt.pipeline import Pipeline, Views
from uc3d_rt.views import encode_normals

if TYPE_CHECKING:
    from torch import nn

FloatArray = NDArray[np.float32]

FP16_LIMIT = 1e-2
"""Largest relative 2-norm error of a network's output in fp16."""

INT8_LIMIT = 5e-2
"""The same for weights stored as int8, against the checkpoint's fp32."""

SAMPLE_LIMIT_DB = {"fp16": 40.0, "torch": 25.0} | dict.fromkeys(QUANTIZED, LEAST_SAMPLE_DB)
"""Smallest PSNR between the views of a whole sample.  Against torch it says what int8 storage does; int8
and fp8 arithmetic is held to whole samples alone, for late calls add little to them and may be far off."""


@dataclass(frozen=True)
class Check:
    """One comparison; `note` says why one was not made."""

    form: str
    what: str
    value: float = math.nan
    limit: float = math.nan
    more_is_better: bool = False
    note: str = ""

    @property
    def failed(self) -> bool:
        """No number fails; what was not compared does not."""
        if self.note:
            return False
        return not (self.value >= self.limit if self.more_is_better else self.value <= self.limit)


def verify(
    bundle: Path,
    *,
    checkpoint: Path | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> Iterator[Check]:
    """Compare all forms of a bundle, tensor by tensor and over a whole sample.

    Args:
        bundle: its ONNX files are the reference.
        checkpoint: what it was exported from; None leaves torch out.
        steps: of the sample; None takes the bundle's default.
        seed: of the inputs and of the sample's noise.

    Raises:
        BundleError, BackendError: a file is missing or altered, or does not load.
    """
    manifest = load_manifest(bundle)
    reference = OnnxRuntimeBackend("cpu")
    forms: dict[str, tuple[Backend, float]] = {"fp16": (TypedBackend(), FP16_LIMIT)}
    if checkpoint is None:
        yield Check("torch", "all", note="no --checkpoint was given")
    else:
        forms["torch"] = (TorchBackend(checkpoint, manifest), INT8_LIMIT)
    for form, (backend, limit) in forms.items():
        for name in NETWORK_NAMES:
            yield from compare_network(form, backend, reference, bundle, manifest, name, limit, seed)
    views = sample(bundle, manifest, reference, steps, seed)
    if (bundle / RANGES_NAME).is_file():
        ranges = load_ranges(bundle, manifest.networks[QUANTIZED_NETWORK].sha256)
        forms |= {precision: (TypedBackend(precision, ranges), math.inf) for precision in QUANTIZED}
    for form, (backend, _) in forms.items():
        found = sample(bundle, manifest, backend, steps, seed)
        for kind, decibels in views_psnr(found, views).items():
            yield Check(form, f"sample: {kind} views", decibels, SAMPLE_LIMIT_DB[form], more_is_better=True)
    yield from _engine_checks(bundle, manifest, reference, views, steps, seed)


def compare_network(
    form: str, backend: Backend, reference: Backend, bundle: Path, manifest: Manifest, name: str,
    limit: float, seed: int = 0, batches: tuple[int, ...] | None = None,
) -> Iterator[Check]:  # fmt: skip
    """Relative 2-norm error of every output of a network, the largest over its batch sizes."""
    errors: dict[str, float] = {}
    with backend.open(bundle, manifest, name) as network, reference.open(bundle, manifest, name) as truth:
        for batch in batches or engine_batches(manifest.shape)[name]:
            inputs = example_inputs(manifest.shape, name, batch, seed + batch, manifest.schedule.train_steps)
            found, expected = network(**inputs), truth(**inputs)
            for output, value in expected.items():
                error = float(np.linalg.norm(found[output] - value) / np.linalg.norm(value))
                errors[output] = float(np.fmax(errors.get(output, 0.0), error)) if error == error else error
    for output, error in errors.items():
        yield Check(form, f"{name}.{output}", error, limit)


def sample(bundle: Path, manifest: Manifest, backend: Backend, steps: int | None, seed: int) -> Views:
    """The views of a shaded ball, through the runtime's own pipeline."""
    with Pipeline(bundle, manifest, backend) as pipeline:
        return pipeline.views(shaded_ball(), steps=steps, seed=seed, focal_mm=0.0)


def views_psnr(found: Views, truth: Views) -> dict[str, float]:
    """PSNR in dB between the colour and between the normal views; infinite where they are the same."""
    pairs = {
        "colour": (found.color, truth.color),
        "normal": (encode_normals(found.normal), encode_normals(truth.normal)),
    }
    errors = {kind: float(np.mean((a - b) ** 2, dtype=np.float64)) for kind, (a, b) in pairs.items()}
    return {kind: math.inf if error == 0 else -10.0 * math.log10(error) for kind, error in errors.items()}


def shaded_ball(size_px: int = 256) -> NDArray[np.uint8]:
    """An RGBA picture (H, W, 4) of a lit orange ball: an input that needs no file."""
    v, u = np.mgrid[1.0 : -1.0 : size_px * 1j, -1.0 : 1.0 : size_px * 1j]
    height = np.sqrt(np.maximum(0.64 - u * u - v * v, 0.0))
    light = 0.35 + 0.65 * np.clip((0.3 * u + 0.5 * v + 0.8 * height) / 0.8, 0.0, 1.0)
    rgba = np.zeros((size_px, size_px, 4), np.uint8)
    rgba[..., :3] = np.round(light[..., None] * np.array([230.0, 120.0, 40.0]))
    rgba[..., 3] = np.where(height > 0, 255, 0)
    return rgba


class TypedBackend(Backend):
    """The typed graphs that engines are built from, on the CPU with every value rounded as it is typed."""

    def __init__(self, precision: str = "fp16", ranges: ActivationRanges | None = None) -> None:
        """Take the precision of the UNet, and the ranges that int8 and fp8 need; the others are fp16."""
        self._precision, self._ranges = precision, ranges

    def open(self, bundle: Path, manifest: Manifest, name: str) -> Network:
        """Make and load one network's graph; raises as `Backend.open`."""
        path = verified_network_path(bundle, manifest, name)
        try:
            precision = self._precision if name == QUANTIZED_NETWORK else "fp16"
            session = rounded_session(typed_graph(path, {}, precision=precision, ranges=self._ranges))
        except ValueError as error:
            raise BundleError(str(error)) from error
        return OnnxRuntimeNetwork(session, network_specs(manifest.shape)[name], manifest.shape.views)


class TorchBackend(Backend):
    """The modules of a checkpoint, fp32, on the CPU."""

    def __init__(self, checkpoint: Path, manifest: Manifest) -> None:
        from export.networks import load_networks

        preset, self._modules = load_networks(checkpoint)
        if preset.shape != manifest.shape:
            raise BundleError(
                f"{checkpoint} is of profile {preset.name}, the bundle of {manifest.profile}; "
                "give the checkpoint it was exported from"
            )

    def open(self, bundle: Path, manifest: Manifest, name: str) -> Network:
        """One network, of the checkpoint and not of the bundle."""
        return TorchNetwork(self._modules[name], network_specs(manifest.shape)[name], manifest.shape.views)


class TorchNetwork(Network):
    """A torch module behind the runtime's interface."""

    def __init__(self, module: nn.Module, spec: NetworkSpec, views: int) -> None:
        self._module, self._spec, self._views = module, spec, views

    def __call__(self, **inputs: FloatArray) -> dict[str, FloatArray]:
        import torch

        check_inputs(self._spec, inputs, self._views)
        with torch.no_grad():
            found = self._module(*(torch.from_numpy(inputs[tensor.name]) for tensor in self._spec.inputs))
        found = found if isinstance(found, tuple) else (found,)
        return {t.name: value.numpy() for t, value in zip(self._spec.outputs, found, strict=True)}

    def close(self) -> None:
        """Nothing to free: the checkpoint holds the weights."""


def _engine_checks(
    bundle: Path, manifest: Manifest, reference: Backend, views: Views, steps: int | None, seed: int
) -> Iterator[Check]:
    folders, machine = built_folders(bundle), this_machine()
    if not folders:
        yield Check("engines", "all", note="none were built")
    for folder in folders:
        engines = load_engine_set(folder)
        reasons = misfits(engines, folder, manifest, machine, installed_version(engines.backend))
        if reasons:
            yield Check(folder.name, "all", note=f"not run: {'; '.join(reasons)}")
            continue
        backend: Backend
        if engines.targets == (CPU,):
            backend = OnnxRuntimeQuantized(folder, engines)
        elif engines.backend == "onnxruntime":
            backend = OnnxRuntimeEngines(folder, engines)
        else:
            backend = TensorRtEngines(folder, engines)
        for name in _compared_networks(engines):
            built = engines.engines.get(name)  # the UNet may be there as steps, which take what it takes
            batches = engine_batches(manifest.shape)[name] if built is None else built.batches
            yield from compare_network(
                folder.name, backend, reference, bundle, manifest, name, FP16_LIMIT, seed, batches
            )
        found = sample(bundle, manifest, backend, steps, seed)
        for kind, decibels in views_psnr(found, views).items():
            what = f"sample: {kind} views"
            limit = SAMPLE_LIMIT_DB[engines.precision if engines.precision in QUANTIZED else "fp16"]
            yield Check(folder.name, what, decibels, limit, more_is_better=True)


def _compared_networks(engines: EngineSet) -> tuple[str, ...]:
    """Networks held against the bundle's tensor by tensor: of int8 and fp8 ones whole samples tell."""
    if engines.targets == (CPU,):
        return ()
    quantized = QUANTIZED_NETWORK if engines.precision in QUANTIZED else None
    return tuple(name for name in NETWORK_NAMES if name != quantized)


def table(checks: list[Check], say: Callable[[str], None]) -> bool:
    """Print a line for every check; True if none failed."""
    for check in checks:
        if check.note:
            say(f"{check.form:8s} {check.what:34s} {check.note}")
            continue
        unit, sign = ("dB", "at least") if check.more_is_better else ("", "at most")
        value = f"{check.value:.1f}" if check.more_is_better else f"{check.value:.1e}"
        verdict = "FAILED" if check.failed else "ok"
        say(f"{check.form:8s} {check.what:34s} {value:>8s} {unit:2s}  {sign} {check.limit:g}  {verdict}")
    return not any(check.failed for check in checks)
