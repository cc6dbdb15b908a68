"""Which backend runs a bundle on a device, and why that one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from uc3d_rt.backends.base import Backend, backend_for
from uc3d_rt.contract import Manifest
from uc3d_rt.engines import (
    CPU,
    REBUILD,
    EngineSet,
    Machine,
    built_folders,
    installed_version,
    load_engine_set,
    misfits,
    this_machine,
)
from uc3d_rt.errors import BundleError, UsageError

BACKENDS: tuple[str, ...] = ("auto", "onnxruntime")
REBUILD_FUSED = f"{REBUILD} --backend onnxruntime"


@dataclass(frozen=True)
class Choice:
    """A backend, in words for the user."""

    backend: Backend
    name: str  # "onnxruntime, fused fp16 graphs"
    reason: str


def choose(
    bundle: Path, manifest: Manifest, device: str = "cpu", backend: str = "auto", threads: int | None = None
) -> Choice:
    """The backend for a device; never another device than the one asked for.

    Args:
        bundle: whose engines are looked at.
        manifest: of the bundle.
        device: one of `uc3d_rt.backends.base.DEVICES`.
        backend: one of `BACKENDS`; "auto" takes the fastest that fits.
        threads: CPU threads a network may use; None leaves the choice to the library.

    Raises:
        UsageError: unknown device or backend, or `threads` below 1.
    """
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    plain = backend_for(device, threads)
    if device == "cpu":
        return _on_cpu(bundle, manifest, plain, threads)
    found = list(engine_choices(bundle, manifest))
    for folder, engines, reasons in found:
        if engines is not None and engines.targets == (CPU,):
            continue
        if engines is not None and engines.backend == "onnxruntime" and not reasons:
            from uc3d_rt.backends.onnxruntime_engines import OnnxRuntimeEngines

            fused = OnnxRuntimeEngines(folder, engines)
            return Choice(
                fused, f"onnxruntime on CUDA, {engines.precision}, {folder.name}", "its engines fit"
            )
    lacks = (
        "; ".join(f"{folder.name}: {', '.join(reasons)}" for folder, _, reasons in found) or "none were built"
    )
    reason = f"no engines fit ({lacks}); for speed {REBUILD_FUSED}"
    return Choice(plain, "onnxruntime on CUDA, fp32, the bundle's own files", reason)


def _on_cpu(bundle: Path, manifest: Manifest, plain: Backend, threads: int | None) -> Choice:
    """int8 graphs that were made for this bundle, else its own files."""
    from uc3d_rt.backends.onnxruntime import OnnxRuntimeQuantized

    unfit = []
    for folder, engines, reasons in engine_choices(bundle, manifest):
        if engines is None or engines.targets != (CPU,):
            continue
        if not reasons:
            names = ", ".join(engines.engines)
            quantized = OnnxRuntimeQuantized(folder, engines, threads)
            return Choice(quantized, f"onnxruntime on the CPU, {names} in {engines.precision}", folder.name)
        unfit.append(f"{folder.name} does not fit: {', '.join(reasons)}")
    return Choice(plain, "onnxruntime on the CPU, fp32", "; ".join(unfit) or "the bundle's own files")


def engine_choices(bundle: Path, manifest: Manifest) -> Iterator[tuple[Path, EngineSet | None, list[str]]]:
    """Every folder of engines of a bundle, with the reasons why it cannot be used here."""
    machine: Machine | None = None
    asked = False
    for folder in built_folders(bundle):
        if not asked:
            machine, asked = this_machine(), True
        try:
            engines = load_engine_set(folder)
        except BundleError as error:
            yield folder, None, [str(error)]
            continue
        reasons = misfits(engines, folder, manifest, machine, installed_version(engines.backend))
        if engines.backend != "onnxruntime":
            reasons.append(f"the runtime does not open {engines.backend} engines yet")
        yield folder, engines, reasons
