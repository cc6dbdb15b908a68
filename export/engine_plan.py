"""What must be built of a bundle's engines: which are there, for which GPUs, with which library.

Needs no torch: a user's machine builds from the bundle that ships.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from export.quantized_graph import (
    LEAST_SAMPLE_DB,
    QUANTIZED,
    QUANTIZED_NETWORK,
    RANGES_NAME,
    ActivationRanges,
    load_ranges,
)
from export.step_graph import PLAN_ROWS
from export.tensorrt_builder import LIBRARIES, check_targets, library
from export.typed_graph import WEIGHTS
from uc3d_rt.contract import (
    NETWORK_NAMES,
    Manifest,
    ModelShape,
    load_manifest,
    sha256_of,
    verified_network_path,
    weights_fault,
)
from uc3d_rt.engines import (
    BUILT_NAME,
    ENGINES_NAME,
    EngineSet,
    installed_version,
    known_targets,
    load_engine_set,
    parts_of,
    this_machine,
)
from uc3d_rt.errors import BackendError, UsageError

RECIPE = 3
"""Counts changes of how engines are made; raise it when old ones should be built again."""

LARGEST_TOGETHER_PX, DECODED_TOGETHER = 256, 2
"""Larger images are decoded a few at a time: twelve of sdxl's take more memory than its UNet does."""

OLDEST_FP8 = 89
"""Compute capability, times ten, of the first GPUs that multiply fp8 numbers: Ada."""


@dataclass(frozen=True)
class BuildOptions:
    """What to build."""

    bundle: Path
    backend: str = "auto"
    targets: tuple[str, ...] = ()  # "sm_86" and the like; none = all the library knows
    weights: str = "fp16"
    timing_cache: Path | None = None
    jobs: int = 2
    check: bool = True  # hold every engine's graph against the bundle's network on the CPU
    deterministic: bool = False  # the same bits each time: see `export.fused_graph.Fuser`
    precision: str = "fp16"  # of the UNet's products; the rest is fp16, with its islands of fp32

    def __post_init__(self) -> None:
        if self.precision not in ("fp16", *QUANTIZED):
            raise UsageError(f"unknown precision {self.precision!r}; choose fp16, {', '.join(QUANTIZED)}")
        if self.precision != "fp16" and self.weights != "fp16":
            raise UsageError(f"--precision {self.precision} stores weights its own way; leave --weights out")
        if self.backend not in ("auto", *LIBRARIES):
            raise UsageError(f"unknown backend {self.backend!r}; choose auto, {', '.join(LIBRARIES)}")
        if self.weights not in WEIGHTS:
            raise UsageError(f"unknown weights {self.weights!r}; choose {', '.join(WEIGHTS)}")
        if self.jobs < 1:
            raise UsageError(f"jobs must be at least 1, got {self.jobs}")


@dataclass(frozen=True)
class Job:
    """One network's engine, to be built or already there."""

    name: str
    source: Path
    source_sha256: str
    source_bytes: int  # with the weights beside it
    batches: tuple[int, ...]
    key: str
    target: Path
    done: bool


@dataclass(frozen=True)
class Plan:
    """All that `build` will do."""

    options: BuildOptions  # with the backend decided
    reason: str  # of that decision
    manifest: Manifest
    folder: Path
    engines: EngineSet  # as they are now
    jobs: tuple[Job, ...]


def plan_build(options: BuildOptions) -> Plan:
    """Decide what must be built.

    Raises:
        BundleError: the bundle is missing, incomplete or altered.
        UsageError: an unknown target, or a timing cache where there is none.
        BackendError: the library is not installed.
    """
    manifest = load_manifest(options.bundle)
    backend, reason = chosen_backend(options.backend)
    check_targets(backend, options.targets)
    if options.timing_cache is not None and backend == "tensorrt-rtx":
        raise UsageError("TensorRT-RTX has no timing cache: it tunes where it runs; leave --timing-cache out")
    # The order of targets changes nothing.
    known = known_targets(backend)
    targets = tuple(sorted(set(options.targets), key=known.index))
    ranges = None
    if options.precision != "fp16":
        ranges = _checked_ranges(options, manifest, backend)
        targets = _targets_of_precision(options.precision, targets, known)
    options = replace(options, backend=backend, targets=targets)
    release = str(library(backend).__version__)
    if not targets and not known and backend != "onnxruntime":
        machine = this_machine()
        if machine is None:
            raise BackendError(
                f"{backend} builds on the GPU that will run the engine, and there is none here"
            )
        targets = (machine.target,)
    if options.deterministic and backend != "onnxruntime":
        raise UsageError(
            f"whether engines of {backend} give the same bits each time is not known; "
            "leave --deterministic out, or add --backend onnxruntime"
        )
    precision = options.precision if options.weights == "fp16" else "fp16-int8-weights"
    precision += "-deterministic" if options.deterministic else ""
    label = "-".join((backend, release, precision, "-".join(t.replace("_", "") for t in targets) or "all"))
    folder = options.bundle / BUILT_NAME / label
    now = EngineSet(backend, release, targets, precision, manifest.profile, {}, options.deterministic)
    if (folder / ENGINES_NAME).is_file():
        now = load_engine_set(folder)
    jobs = []
    sources = {name: verified_network_path(options.bundle, manifest, name) for name in manifest.networks}
    for part, batches in engine_batches(manifest.shape, backend).items():
        network = next(name for name in manifest.networks if part in parts_of(backend, name))
        source = sources[network]
        entry = manifest.networks[network]
        # A step with guidance holds its rescaling.
        rescale = manifest.sampling.guidance_rescale if part in ("unet_step_2", "unet_guidance") else 0.0
        quantized = ranges if part == QUANTIZED_NETWORK else None
        key = _key(entry.sha256, batches, options, release, rescale, quantized)
        target = folder / f"{part}{LIBRARIES[backend].suffix}"
        old = now.engines.get(part)
        done = old is not None and old.key == key and target.is_file() and sha256_of(target) == old.sha256
        if old is not None and done:
            checked = old.relative_error is not None or not options.check
            done = checked and weights_fault(old.weights, folder) is None
        jobs.append(Job(part, source, entry.sha256, entry.total_bytes, batches, key, target, done))
    return Plan(options, reason, manifest, folder, now, tuple(jobs))


def _checked_ranges(options: BuildOptions, manifest: Manifest, backend: str) -> ActivationRanges:
    """The bundle's ranges, if the precision asked for does not change its views too much."""
    if backend == "onnxruntime":
        raise UsageError(
            f"ONNX Runtime multiplies no {options.precision} numbers on GPUs; leave --precision out, or "
            "choose --backend tensorrt or tensorrt-rtx (on a CPU: python -m export quantize PICTURES)"
        )
    ranges = load_ranges(options.bundle, manifest.networks[QUANTIZED_NETWORK].sha256)
    accuracy = ranges.accuracy.get(options.precision)
    if accuracy is None or not min(accuracy.sample_db) >= LEAST_SAMPLE_DB:
        found = "was not compared" if accuracy is None else f"{min(accuracy.sample_db):.1f} dB"
        raise BackendError(
            f"{options.precision} changes the bundle's views too much, says {RANGES_NAME} ({found}, limit "
            f"{LEAST_SAMPLE_DB:g}); build with --precision fp16"
        )
    return ranges


def _targets_of_precision(
    precision: str, targets: tuple[str, ...], known: tuple[str, ...]
) -> tuple[str, ...]:
    """The targets that multiply such numbers: all that were asked for must, of all known those that do."""
    if precision != "fp8" or not known:
        return targets
    able = tuple(target for target in known if int(target[3:]) >= OLDEST_FP8)
    unable = [target for target in targets if target not in able]
    if unable:
        raise UsageError(
            f"{', '.join(unable)} cannot multiply fp8 numbers, only {', '.join(able)} can; build int8 or fp16"
        )
    return targets or able


def chosen_backend(asked: str) -> tuple[str, str]:
    """The backend to build with, and why it."""
    if asked != "auto":
        return asked, "asked for"
    machine = this_machine()
    if installed_version("tensorrt") is not None and machine is not None:
        return "tensorrt", f"TensorRT is installed and {machine.gpu} is here to build on"
    if installed_version("tensorrt-rtx") is not None:
        lacks = "there is no GPU here" if machine is None else "TensorRT is not installed"
        return "tensorrt-rtx", f"{lacks}; TensorRT-RTX builds ahead of time"
    raise BackendError(f"no library that builds engines is installed; {LIBRARIES['tensorrt-rtx'].mend}")


def engine_batches(shape: ModelShape, backend: str = "tensorrt") -> dict[str, tuple[int, ...]]:
    """How many of what it takes a call every engine is built for: fixed, so that CUDA graphs can be.

    The UNet is called for one object without guidance and, as two, with it; the decoder makes all
    colour and normal images of an object at once, if they are small.
    """
    if backend == "onnxruntime":
        parts = {
            "unet_time": (PLAN_ROWS,), "unet_context": (1, 2), "unet_step_1": (1,), "unet_step_2": (2,),
            "unet_guidance": (1,),
        }  # fmt: skip
        images = 2 * shape.views if shape.image_px <= LARGEST_TOGETHER_PX else DECODED_TOGETHER
        return {name: (1,) for name in NETWORK_NAMES if name != "unet"} | {"vae_decoder": (images,)} | parts
    return {
        "image_encoder": (1,),
        "vae_encoder": (1,),
        "unet": (1, 2),
        "vae_decoder": (2 * shape.views,),
        "projection_heads": (1,),
    }


def _key(
    source_sha256: str, batches: Sequence[int], options: BuildOptions, release: str, rescale: float,
    ranges: ActivationRanges | None,
) -> str:  # fmt: skip
    """SHA-256 of all that decides the bytes of an engine."""
    import onnxruntime

    polygraphy = [] if options.backend == "onnxruntime" else [version("polygraphy")]
    what = {
        "source": source_sha256,
        "batches": list(batches),
        "weights": options.weights,
        "deterministic": options.deterministic,
        "backend": [options.backend, release],
        "targets": list(options.targets),
        "tools": [version("onnx"), onnxruntime.__version__, *polygraphy],
        "rescale": rescale,
        "recipe": RECIPE,
    }
    if ranges is not None:  # a network that stays fp16 is the same whatever becomes of the UNet
        what |= {"precision": options.precision, "ranges": sorted(ranges.largest.items())}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
