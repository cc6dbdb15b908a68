"""Which backend runs a bundle on a device, and why that one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from uc3d_rt.backends.base import Backend, Place, backend_for
from uc3d_rt.backends.onnxruntime import check_provider
from uc3d_rt.contract import Manifest
from uc3d_rt.engines import (
    CPU,
    REBUILD,
    EngineSet,
    built_folders,
    installed_version,
    load_engine_set,
    misfits,
    this_machine,
)
from uc3d_rt.errors import BackendError, BundleError, UsageError
from uc3d_rt.ladder import LowMemory

PRECISIONS: tuple[str, ...] = ("auto", "fp16", "int8", "fp8")
"""Of engines, in the order in which they are taken where several fit."""

BACKENDS: tuple[str, ...] = ("auto", "onnxruntime", "tensorrt", "tensorrt-rtx", "bundle")
MENDS = {
    "cpu": "run: python -m export quantize PICTURES",
    "cuda": f"{REBUILD} --backend onnxruntime",
}


@dataclass(frozen=True)
class Choice:
    """A backend, in words for the user."""

    backend: Backend
    name: str  # "onnxruntime, fp16, cuda"
    reason: str
    notable: bool = False  # more than the bundle's own files, or they for want of what fits

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose(
    bundle: Path, manifest: Manifest, device: str = "cpu", backend: str = "auto",
    threads: int | None = None, low_memory: LowMemory = False, deterministic: bool = False,
    precision: str = "auto",
) -> Choice:  # fmt: skip
    """The backend for a device; never another device than the one asked for.

    Args:
        bundle: whose engines are looked at.
        manifest: of the bundle.
        device: a name of `uc3d_rt.backends.base.Place`.
        backend: one of `BACKENDS`: "bundle" runs the bundle's own files in fp32, "auto" the first that
            fits, any other what was built for it.
        threads: CPU threads a network may use; None leaves the choice to the library.
        low_memory: a rung of `uc3d_rt.ladder.LADDER`.
        deterministic: only what gives the same bits each time; on the CPU everything does.
        precision: one of `PRECISIONS`, of engines; "auto" takes fp16 before others.

    Raises:
        UsageError: unknown device, backend, precision or rung, or `threads` below 1.
        BackendError: what was asked for by name does not fit.
    """
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    if backend == "bundle" and precision != "auto":
        raise UsageError(f"the bundle's own files are fp32; leave out --backend bundle or {precision}")
    kind = Place.named(device).kind
    deterministic = deterministic and kind != "cpu"
    own = backend_for(device, threads, low_memory)
    plain = Choice(own, f"the bundle's own files, fp32, {device}", "asked for")
    if backend == "bundle" and not deterministic:
        return plain
    unfit, fitting = [], []
    for folder, engines, reasons in engine_choices(bundle, manifest, device):
        if engines is None:
            unfit.append(f"{folder.name}: {', '.join(reasons)}")
        elif backend in ("auto", engines.backend):
            if deterministic and not engines.deterministic:
                reasons = [*reasons, "its results differ in their last bits"]
            held = engines.precision.partition("-")[0]
            if precision not in ("auto", held):
                reasons = [*reasons, f"it is {held}"]
            if reasons:
                unfit.append(f"{folder.name}: {', '.join(reasons)}")
            else:
                rank = BACKENDS.index(engines.backend), engines.deterministic, PRECISIONS.index(held)
                fitting.append((rank, folder, engines))
    if fitting:
        _, folder, engines = min(fitting, key=lambda one: one[0])
        return _built_choice(folder, engines, device, threads, low_memory)
    lacks = "; ".join(unfit) or "nothing was built for it"
    if deterministic:
        raise BackendError(
            f"nothing that gives the same bits each time fits --device {device} ({lacks}); "
            f"{REBUILD} --backend onnxruntime --deterministic"
        )
    if precision != "auto":
        raise BackendError(
            f"nothing in {precision} fits --device {device} ({lacks}); {_mend(kind, precision)}"
        )
    if backend != "auto":
        mend = MENDS[kind] if backend == "onnxruntime" else f"{REBUILD} --backend {backend}"
        if kind == "cpu" and backend != "onnxruntime":
            raise UsageError(f"--backend {backend} runs on GPUs alone; add --device cuda")
        raise BackendError(f"{backend} has nothing that fits --device {device} ({lacks}); {mend}")
    return Choice(plain.backend, plain.name, f"{lacks}; for speed {MENDS[kind]}", notable=bool(unfit))


def _mend(kind: str, precision: str) -> str:
    """How engines of a precision come to a device."""
    if precision == "fp16":
        return MENDS["cuda"] if kind == "cuda" else "fp16 is for GPUs; add --device cuda"
    if kind == "cuda":
        return f"{REBUILD} --backend tensorrt --precision {precision}, or --backend tensorrt-rtx"
    return MENDS["cpu"] if precision == "int8" else f"{precision} is for GPUs; add --device cuda"


def _built_choice(
    folder: Path, engines: EngineSet, device: str, threads: int | None, low_memory: LowMemory
) -> Choice:
    from uc3d_rt.backends.onnxruntime import OnnxRuntimeQuantized
    from uc3d_rt.backends.onnxruntime_engines import OnnxRuntimeEngines

    reason = f"{folder.name} fits"
    if device == "cpu":
        names = ", ".join(engines.engines)
        quantized = OnnxRuntimeQuantized(folder, engines, threads, low_memory)
        return Choice(quantized, f"onnxruntime, {names} in {engines.precision}, cpu", reason, notable=True)
    if engines.backend != "onnxruntime":
        from uc3d_rt.backends.tensorrt import TensorRtEngines

        name = f"{engines.backend}, {engines.precision}, {device}"
        ordinal = Place.named(device).ordinal
        return Choice(TensorRtEngines(folder, engines, low_memory, ordinal), name, reason, notable=True)
    fused = OnnxRuntimeEngines(folder, engines, device, low_memory)
    return Choice(fused, f"onnxruntime, {engines.precision}, {device}", reason, notable=True)


def chosen_device(asked: str) -> tuple[str, str]:
    """The device that "auto" stands for on this machine, any other for itself; and why it."""
    if asked != "auto":
        return asked, "asked for"
    machine = this_machine()
    if machine is None:
        return "cpu", "no NVIDIA GPU was found"
    try:
        check_provider("cuda")
    except BackendError as error:
        return "cpu", f"{machine.gpu} is not used: {error}"
    return "cuda", f"{machine.gpu} is here"


def engine_choices(
    bundle: Path, manifest: Manifest, device: str
) -> Iterator[tuple[Path, EngineSet | None, list[str]]]:
    """Every folder of engines for a device, with the reasons why it cannot be used here."""
    folders, place = built_folders(bundle), Place.named(device)
    machine = this_machine(place.ordinal) if folders and place.kind != "cpu" else None
    for folder in folders:
        try:
            engines = load_engine_set(folder)
        except BundleError as error:
            yield folder, None, [str(error)]
            continue
        if (engines.targets == (CPU,)) != (device == "cpu"):
            continue
        reasons = misfits(engines, folder, manifest, machine, installed_version(engines.backend))
        yield folder, engines, reasons
