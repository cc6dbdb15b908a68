"""Engines built from a bundle: what they are, what they were built for, and whether that fits.

`python -m export build-engines` writes them to `BUNDLE/built/<what they were built for>/`, with an
`engines.json` that is the authority on them; the runtime reads it before it opens any.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from uc3d_rt.contract import (
    Manifest,
    WeightsFile,
    sha256_of,
    weights_fault,
    weights_of,
    without_nothing,
)
from uc3d_rt.errors import BundleError

BUILT_NAME = "built"
ENGINES_NAME = "engines.json"
FORMAT_VERSION = 2
REBUILD = "run: python -m export build-engines"

LIBRARY_MODULES = {"onnxruntime": "onnxruntime", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Modules of the libraries that build and open engines, by backend."""

CPU = "cpu"
"""The target of graphs that stand in for some of a bundle's files on a CPU."""

UNET_PARTS = ("unet_time", "unet_context", "unet_step_1", "unet_step_2", "unet_guidance")
"""The UNet as whole steps: what depends on time alone, on the picture alone, a step without and with
guidance, and what guidance does with two predictions made one after the other."""


def parts_of(backend: str, network: str) -> tuple[str, ...]:
    """Names of the engines that a network of the bundle becomes."""
    return UNET_PARTS if backend == "onnxruntime" and network == "unet" else (network,)


@dataclass(frozen=True)
class EngineFile:
    """One engine: a network of the bundle, or a part of one."""

    file: str
    sha256: str
    bytes: int
    source_sha256: str  # of the bundle's ONNX file it was built from
    key: str  # SHA-256 of all that decides its bytes
    batches: tuple[int, ...]  # objects a call, a profile each
    relative_error: float | None
    """Of the fp16 graph, each value rounded, against the bundle's network on a CPU; None = not checked."""
    weights: WeightsFile | None = None  # beside it; engines of the same weights share them

    @property
    def total_bytes(self) -> int:
        """With the weights beside it."""
        return self.bytes + (self.weights.bytes if self.weights else 0)

    def __post_init__(self) -> None:
        if Path(self.file).name != self.file or not self.batches:
            raise ValueError(f"not an engine of this folder: {self}")


@dataclass(frozen=True)
class EngineSet:
    """`engines.json`: the engines of one folder."""

    backend: str  # of `LIBRARY_MODULES`
    version: str  # of the library that built them; no other opens them
    targets: tuple[str, ...]  # "sm_86" and the like; empty = every GPU that this version knows
    precision: str
    profile: str  # the bundle's
    engines: dict[str, EngineFile]
    deterministic: bool = False  # they give the same bits each time
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Machine:
    """An NVIDIA GPU, as its driver tells."""

    gpu: str
    target: str  # "sm_86"
    driver: str


def save_engine_set(engines: EngineSet, folder: Path) -> None:
    """Write `engines.json`, atomically."""
    temporary = folder / f".{ENGINES_NAME}.{os.getpid()}.tmp"
    try:
        data = asdict(engines)
        data["engines"] = {name: without_nothing(entry) for name, entry in data["engines"].items()}
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, folder / ENGINES_NAME)
    finally:
        temporary.unlink(missing_ok=True)


def load_engine_set(folder: Path) -> EngineSet:
    """Read and check `engines.json`.

    Raises:
        BundleError: it is missing, damaged, or of another format version.
    """
    path = folder / ENGINES_NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format_version"] != FORMAT_VERSION:
            raise BundleError(
                f"{path} has format version {data['format_version']}, this runtime reads {FORMAT_VERSION}; "
                + REBUILD
            )
        engines = {
            name: EngineFile(**{**entry, "batches": tuple(entry["batches"]), "weights": weights_of(entry)})
            for name, entry in data.pop("engines").items()
        }
        return EngineSet(**{**data, "targets": tuple(data["targets"])}, engines=engines)
    except FileNotFoundError as error:
        raise BundleError(f"{path} is missing; {REBUILD}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{path} is damaged ({error}); delete the folder and {REBUILD}") from error


def verified_engine_path(engines: EngineSet, folder: Path, part: str) -> Path:
    """Path of an engine after checking that it is the one that was built.

    Raises:
        BundleError: it was not built, is missing, or was altered.
    """
    entry = engines.engines.get(part)
    if entry is None:
        raise BundleError(f"{folder} holds no {part}; {REBUILD}")
    path = folder / entry.file
    if not path.is_file() or sha256_of(path) != entry.sha256:
        raise BundleError(f"{path} is missing or was altered; delete the folder and {REBUILD}")
    beside = weights_fault(entry.weights, folder)
    if beside is not None:
        raise BundleError(f"{folder / beside}; delete the folder and {REBUILD}")
    return path


def built_folders(bundle: Path) -> list[Path]:
    """Folders with engines of a bundle, sorted by name."""
    return sorted(path.parent for path in (bundle / BUILT_NAME).glob(f"*/{ENGINES_NAME}"))


def this_machine(ordinal: int = 0) -> Machine | None:
    """The GPU of a number, counted as `nvidia-smi` does; None where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.splitlines()
    fields = [field.strip() for field in lines[ordinal].split(",")] if ordinal < len(lines) else []
    if len(fields) != 3:
        return None
    gpu, capability, driver = fields
    return Machine(gpu, "sm_" + capability.replace(".", ""), driver)


def installed_version(backend: str) -> str | None:
    """Version of the library of a backend; None if it is not installed or does not load."""
    try:
        return str(importlib.import_module(LIBRARY_MODULES[backend]).__version__)
    except ImportError:
        return None


def known_targets(backend: str) -> tuple[str, ...]:
    """GPUs that the library of a backend can build for from anywhere: "sm_86" and the like.

    Empty where it is not installed, or builds for the GPU it runs on alone.
    """
    if backend == "onnxruntime":
        return ()  # a fused graph runs on every GPU that the provider knows
    try:
        library = importlib.import_module(LIBRARY_MODULES[backend])
    except ImportError:
        return ()
    kinds = getattr(library, "ComputeCapability", None)
    names = [] if kinds is None else [name for name in kinds.__members__ if name.startswith("SM")]
    return tuple("sm_" + name[2:] for name in sorted(names, key=lambda name: int(name[2:])))


def misfits(
    engines: EngineSet, folder: Path, manifest: Manifest, machine: Machine | None, installed: str | None
) -> list[str]:
    """Why engines cannot be used here, each reason a sentence; empty = they can.

    Args:
        engines: of `folder`.
        manifest: of the bundle they should be of.
        machine: where they should run.
        installed: version of the library that opens them, None if it is not installed.
    """
    reasons = []
    on_cpu = engines.targets == (CPU,)  # in the place of some files; the bundle's own serve for the others
    for network, entry in manifest.networks.items():
        for part in (network,) if on_cpu else parts_of(engines.backend, network):
            built = engines.engines.get(part)
            if built is None and on_cpu:
                continue
            if built is None:
                reasons.append(f"{part} was not built")
            elif built.source_sha256 != entry.sha256:
                reasons.append(f"{part} was built from another {entry.file} than the bundle's")
            elif not (folder / built.file).is_file():
                reasons.append(f"{built.file} is missing")
            elif sha256_of(folder / built.file) != built.sha256:
                reasons.append(f"{built.file} was altered or damaged")
            elif (beside := weights_fault(built.weights, folder)) is not None:
                reasons.append(beside)
    if installed is None:
        reasons.append(f"{engines.backend} is not installed")
    elif installed != engines.version:
        reasons.append(f"built by {engines.backend} {engines.version}, installed is {installed}")
    if on_cpu:
        return reasons
    targets = engines.targets or known_targets(engines.backend)
    if machine is None:
        reasons.append("no NVIDIA GPU was found")
    elif targets and machine.target not in targets:
        reasons.append(f"built for {', '.join(targets)}, but {machine.gpu} is {machine.target}")
    return reasons
