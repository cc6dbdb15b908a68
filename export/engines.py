"""Engines of a bundle: what must be built, each network in a process of its own, nothing half-written.

Needs no torch: a user's machine builds from the bundle that ships.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from export.data_file import graph_bytes
from export.example_inputs import example_inputs
from export.onnxruntime_builder import build_part, data_file
from export.quantized_graph import (
    LEAST_SAMPLE_DB,
    QUANTIZED,
    QUANTIZED_NETWORK,
    RANGES_NAME,
    ActivationRanges,
    load_ranges,
)
from export.step_graph import PLAN_ROWS
from export.tensorrt_builder import LIBRARIES, build_engine, check_targets, library
from export.typed_graph import WEIGHTS, relative_error, typed_graph
from uc3d_rt.contract import (
    NETWORK_NAMES,
    Manifest,
    ModelShape,
    WeightsFile,
    load_manifest,
    network_specs,
    sha256_of,
    verified_network_path,
    weights_fault,
)
from uc3d_rt.engines import (
    BUILT_NAME,
    ENGINES_NAME,
    EngineFile,
    EngineSet,
    installed_version,
    known_targets,
    load_engine_set,
    parts_of,
    save_engine_set,
    this_machine,
)
from uc3d_rt.errors import BackendError, OutputError, Uc3dError, UsageError

RECIPE = 3
"""Counts changes of how engines are made; raise it when old ones should be built again."""

LARGEST_TOGETHER_PX, DECODED_TOGETHER = 256, 2
"""Larger images are decoded a few at a time: twelve of sdxl's take more memory than its UNet does."""

ERROR_LIMIT = 1e-2
"""Largest relative error of an fp16 graph.  Rounding makes 0.001 to 0.005, an overflow far more."""

QUANTIZED_ERROR_LIMIT = 0.2
"""The same in int8 and fp8, which make 0.02 to 0.06.  What they are held to is their samples."""

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


@dataclass(frozen=True)
class Built:
    """What a worker tells of its engine."""

    sha256: str
    bytes: int
    relative_error: float | None  # None = not checked
    prepare_s: float
    build_s: float
    weights: WeightsFile | None = None

    @property
    def total_bytes(self) -> int:
        """With the weights beside it."""
        return self.bytes + (self.weights.bytes if self.weights else 0)


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


def build(plan: Plan, on_event: Callable[[str, Job, Built | None], None] | None = None) -> EngineSet:
    """Build what the plan lacks; every engine stands at its place as soon as it is whole.

    Args:
        plan: of `plan_build`.
        on_event: told `("start" | "done", job, result)`.

    Raises:
        BackendError, OutputError: the first network that failed; the others' engines are kept.
        KeyboardInterrupt: workers are ended and nothing half-written stays.
    """
    tell = on_event or (lambda event, job, result: None)
    # The longest first, so that no worker is left alone with it at the end.
    waiting = sorted((job for job in plan.jobs if not job.done), key=lambda job: -job.source_bytes)
    engines = plan.engines
    if not waiting:
        return engines
    with _folder_lock(plan.folder), _Workers(plan) as workers:
        if (plan.folder / ENGINES_NAME).is_file():
            engines = load_engine_set(plan.folder)
        while waiting or workers.running:
            while waiting and len(workers.running) < plan.options.jobs:
                job = waiting.pop(0)
                workers.start(job)
                tell("start", job, None)
            for job, built in workers.finished():
                if built.weights is not None:  # named by what it holds: it changes nothing for other engines
                    os.replace(_weights(job), plan.folder / built.weights.file)
                os.replace(_temporary(job), job.target)
                entry = EngineFile(
                    job.target.name, built.sha256, built.bytes, job.source_sha256, job.key, job.batches,
                    built.relative_error, built.weights,
                )  # fmt: skip
                engines = replace(engines, engines={**engines.engines, job.name: entry})
                save_engine_set(engines, plan.folder)
                tell("done", job, built)
        _remove_unread(engines, plan.folder)
    return engines


def _remove_unread(engines: EngineSet, folder: Path) -> None:
    """Remove weights that no engine refers to any more."""
    read = {engine.weights.file for engine in engines.engines.values() if engine.weights is not None}
    for path in folder.glob("weights-*.bin"):
        if path.name not in read:
            path.unlink()


class _Workers:
    """Processes that build an engine each; all are ended, and their files removed, on the way out."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.running: dict[multiprocessing.connection.Connection, tuple[Any, Job]] = {}
        self._spawn = multiprocessing.get_context("spawn")

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process, job in self.running.values():
            process.kill()
            process.join()
            _temporary(job).unlink(missing_ok=True)
            _weights(job).unlink(missing_ok=True)
            _log(job).unlink(missing_ok=True)

    def start(self, job: Job) -> None:
        receiver, sender = self._spawn.Pipe(duplex=False)
        paths = (_temporary(job), _weights(job), _log(job))
        arguments = (sender, job, self.plan.options, self.plan.manifest, *paths)
        process = self._spawn.Process(target=_work, args=arguments, name=f"build {job.name}")
        process.start()
        sender.close()  # the worker's end; ours tells when it dies
        self.running[receiver] = (process, job)

    def finished(self) -> list[tuple[Job, Built]]:
        """Wait for at least one; raises what went wrong in it."""
        results = []
        for receiver in multiprocessing.connection.wait(list(self.running)):
            process, job = self.running[receiver]  # type: ignore[index]
            try:
                message = receiver.recv()  # type: ignore[union-attr]
            except EOFError:
                process.join()
                message = BackendError(f"{job.name}: the builder died ({_ending(process.exitcode)})")
            if isinstance(message, Uc3dError):
                raise message
            process.join()
            _log(job).unlink(missing_ok=True)
            del self.running[receiver]  # type: ignore[arg-type]
            results.append((job, message))
        return results


def _work(
    sender: multiprocessing.connection.Connection, job: Job, options: BuildOptions, manifest: Manifest,
    target: Path, weights: Path, log: Path,
) -> None:  # fmt: skip
    """Build one engine into `target`, in a process of its own; sends `Built` or an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    try:
        # The libraries write to both streams, from C too.
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, sys.stdout.fileno())
        os.dup2(handle, sys.stderr.fileno())
        sender.send(_built(job, options, manifest, target, weights))
    except Uc3dError as error:
        sys.stdout.flush()
        sys.stderr.flush()
        said = first_error(log)
        sender.send(type(error)(f"{job.name}: {error}{f' ({said})' if said else ''}"))
    except OSError as error:
        sender.send(
            OutputError(f"cannot write {job.target}: {error.strerror or error}; free space and run again")
        )
    except ValueError as error:
        sender.send(BackendError(f"{job.name}: {error}"))
    except MemoryError:
        sender.send(BackendError(f"{job.name}: memory ran out; use fewer --jobs"))


def _built(job: Job, options: BuildOptions, manifest: Manifest, target: Path, weights: Path) -> Built:
    started, shape = time.perf_counter(), manifest.shape
    if options.backend == "onnxruntime":
        return _fused(job, options, manifest, target, weights)
    sizes, profiles = {}, []
    spec = network_specs(shape)[job.name]
    all_sizes = [{"batch": batch, "samples": batch * shape.views} for batch in job.batches]
    if len(all_sizes) == 1:
        names = {size for tensor in spec.inputs for size in tensor.shape if isinstance(size, str)}
        sizes = {name: all_sizes[0][name] for name in sorted(names)}
    else:
        for free in all_sizes:
            profiles.append(
                {t.name: tuple(free[s] if isinstance(s, str) else s for s in t.shape) for t in spec.inputs}
            )
    precision, ranges = "fp16", None
    if options.precision != "fp16" and job.name == QUANTIZED_NETWORK:
        precision, ranges = options.precision, load_ranges(options.bundle, job.source_sha256)
    model = typed_graph(job.source, sizes, options.weights, precision, ranges)
    steps = manifest.schedule.train_steps
    inputs = example_inputs(shape, job.name, min(job.batches), seed=1, train_steps=steps)
    error = relative_error(job.source, model, [inputs]) if options.check else None
    _check_error(error, precision)
    prepared = time.perf_counter()
    engine = build_engine(
        model.SerializeToString(deterministic=True), backend=options.backend, targets=options.targets,
        profiles=profiles, timing_cache=options.timing_cache,
    )  # fmt: skip
    return _written(engine, target, error, started, prepared)


def _fused(job: Job, options: BuildOptions, manifest: Manifest, target: Path, weights: Path) -> Built:
    """An engine for ONNX Runtime, with large weights in a file of their own."""
    started = time.perf_counter()
    data = data_file(job.source, weights)
    with data or nullcontext():
        model, error = build_part(
            job.name, job.source, manifest, max(job.batches), data, options.check, options.deterministic
        )
        _check_error(error)
        prepared = time.perf_counter()
        record = None if data is None else data.record()
        if data is None or record is None:
            engine = bytes(model.SerializeToString(deterministic=True))
            return _written(engine, target, error, started, prepared)
        engine = graph_bytes(model, record.file)
        data.keep()
        return replace(_written(engine, target, error, started, prepared), weights=record)


def _check_error(error: float | None, precision: str = "fp16") -> None:
    limit = ERROR_LIMIT if precision == "fp16" else QUANTIZED_ERROR_LIMIT
    if error is not None and not error <= limit:
        raise BackendError(
            f"its {precision} graph differs from the bundle's network by {error:.1e} (limit {limit:g}); "
            f"the weights do not suit {precision}"
        )


def _written(engine: bytes, target: Path, error: float | None, started: float, prepared: float) -> Built:
    with target.open("wb") as stream:
        stream.write(engine)
        stream.flush()
        os.fsync(stream.fileno())
    ended = time.perf_counter()
    digest = hashlib.sha256(engine).hexdigest()
    return Built(digest, len(engine), error, prepared - started, ended - prepared)


def first_error(log: Path) -> str:
    """The first error a library printed: those after it tell of its consequences."""
    try:
        lines = log.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    plain = (" ".join(re.sub(r"\x1b\[[0-9;]*m", "", line).split()) for line in lines)  # without colours
    return next((line[:300] for line in plain if line.startswith("[E]")), "")


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


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """One build a folder at a time; the lock ends with the process that holds it."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        with lock:
            yield
    except Timeout as error:
        raise OutputError(f"another build is writing to {folder}; wait for it to end") from error
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder} ({error.strerror or error}); free space or change its permissions"
        ) from error


def _temporary(job: Job) -> Path:
    return job.target.with_name(f".{job.target.name}.{os.getpid()}.tmp")


def _weights(job: Job) -> Path:
    return job.target.with_name(f".{job.target.name}.{os.getpid()}.weights")


def _log(job: Job) -> Path:
    return job.target.with_name(f".{job.target.name}.{os.getpid()}.log")


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"{name}; memory may have run out: use fewer --jobs" if name == "SIGKILL" else name
    return f"exit code {code}"
