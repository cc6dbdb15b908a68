"""Engines of a bundle are built: each network in a process of its own, nothing half-written.

Needs no torch: a user's machine builds from the bundle that ships.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from export.data_file import graph_bytes
from export.engine_plan import BuildOptions, Job, Plan
from export.example_inputs import example_inputs
from export.onnxruntime_builder import build_part, data_file
from export.quantized_graph import (
    QUANTIZED_NETWORK,
    load_ranges,
)
from export.tensorrt_builder import build_engine
from export.typed_graph import relative_error, typed_graph
from uc3d_rt.contract import (
    Manifest,
    WeightsFile,
    network_specs,
)
from uc3d_rt.engines import (
    ENGINES_NAME,
    EngineFile,
    EngineSet,
    load_engine_set,
    save_engine_set,
)
from uc3d_rt.errors import BackendError, OutputError, Uc3dError

ERROR_LIMIT = 1e-2
"""Largest relative error of an fp16 graph.  Rounding makes 0.001 to 0.005, an overflow far more."""

QUANTIZED_ERROR_LIMIT = 0.2
"""The same in int8 and fp8, which make 0.02 to 0.06.  What they are held to is their samples."""


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
                ending = _ending(process.exitcode, _log(job))
                message = BackendError(f"{job.name}: the builder died ({ending})")
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


def _ending(code: int | None, log: Path) -> str:
    """How a builder died, with the last line that it printed: what an uncaught exception says."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"{name}; memory may have run out: use fewer --jobs" if name == "SIGKILL" else name
    lines = log.read_text("utf-8", errors="replace").split("\n") if log.is_file() else []
    last = next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
    return f"exit code {code}: {last}" if last else f"exit code {code}"
