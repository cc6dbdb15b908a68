"""Measure a bundle on objects it was not trained on, beside baselines and a ceiling, on the CPU.

Each object is finished before it is written to `OUT/objects/`, so a run that was stopped goes on
where it was; the tables and contact sheets are made from those files.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import click
import numpy as np
from numpy.typing import NDArray

from train.baselines import (
    FloatArray,
    TrainIndex,
    ViewPair,
    as_object,
    autoencoded,
    copied_input,
    ellipsoid_of,
    image_features,
    index_features,
    placed,
    train_index,
    turntable,
)
from train.dataset import EvalSample, ground_truth
from train.mesh_metrics import Triangles, chamfer, volume_iou
from train.metrics import (
    Record,
    categories,
    markdown,
    progress_line,
    record_names,
    summarize,
    view_metrics,
)
from train.objects import Object, find_objects, load_object
from train.sheets import contact_sheet, view_row
from uc3d_rt.backends.base import Network, backend_for
from uc3d_rt.contract import load_manifest
from uc3d_rt.errors import FitError, ImageError, UsageError
from uc3d_rt.mesh.build import MeshOptions
from uc3d_rt.neus.fit import FitOptions
from uc3d_rt.pipeline import Pipeline, Views
from uc3d_rt.views import decode_normals

PAGE = 25  # objects on a contact sheet
VIEW_PX = 80


@dataclass(frozen=True)
class EvaluateOptions:
    """What is evaluated, and how."""

    bundle: Path
    objects: Path
    out: Path
    train_objects: Path | None = None  # None: `objects`' sibling folder `train`, if there is one
    index: Path | None = None  # None: beside `out`
    meshes: bool = True
    steps: int | None = None  # None: the bundle's
    guidance: float | None = None  # None: the bundle's
    seed: int = 0
    workers: int = 1

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UsageError(f"workers must be at least 1, got {self.workers}")
        if self.train_objects is not None and self.train_objects.resolve() == self.objects.resolve():
            raise UsageError(f"{self.objects} is given as training folder too; nothing would be measured")

    def train_folder(self) -> Path | None:
        """The training objects, if they are there."""
        sibling = self.objects.resolve().parent / "train"
        if self.train_objects is None and sibling.is_dir() and sibling != self.objects.resolve():
            return sibling
        return self.train_objects


def evaluate(
    options: EvaluateOptions, files: Sequence[Path], say: Callable[[str], None] = click.echo
) -> Record:
    """Measure the bundle on object files of `options.objects`; returns what `metrics.json` holds.

    Raises:
        UsageError: OUT holds an evaluation with other settings.
        BundleError, BackendError: see `uc3d_rt.errors`.
    """
    names = record_names(options.objects, files)
    folder, train_files = options.train_folder(), list[Path]()
    if folder is not None:
        train_files = find_objects(folder)
    settings = _check_settings(options, train_files)
    missing = [path for path in files if not _record_path(options.out, names[path]).is_file()]
    if missing:
        index = None
        if folder is not None:
            index = _train_index(options, folder, train_files, say)
        say(f"{len(files) - len(missing)} of {len(files)} objects are already done")
        started = time.monotonic()
        with _workers(options, index) as run:
            jobs = [(path, names[path]) for path in missing]
            for done, record in enumerate(run(_measure, jobs), start=1):
                left = (time.monotonic() - started) / done * (len(missing) - done)
                say(f"[{done}/{len(missing)}] {progress_line(record)}  (about {left / 60:.0f} min left)")
    records = {}
    for path in files:
        records[names[path]] = json.loads(_record_path(options.out, names[path]).read_text("utf-8"))
    summary = summarize(records, settings, categories(options.objects))
    _write(options.out / "metrics.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    _write(options.out / "metrics.md", markdown(summary))
    _write_sheets(options.out, [name for name in records if "left_out" not in records[name]])
    return summary


class Evaluator:
    """One process's networks and the work on one object; a context manager."""

    def __init__(self, options: EvaluateOptions, index: TrainIndex | None, threads: int) -> None:
        self.options, self.index = options, index
        self.pipeline = Pipeline.from_bundle(options.bundle, "cpu", threads, "bundle")
        self.image_px = self.pipeline.manifest.shape.image_px
        self._backend = backend_for("cpu", threads)
        self._networks: dict[str, Network] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self.pipeline)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._networks.clear()
        self._stack.close()

    def network(self, name: str) -> Network:
        """A network of the bundle, opened when first asked for."""
        if name not in self._networks:
            opened = self._backend.open(self.options.bundle, self.pipeline.manifest, name)
            self._networks[name] = self._stack.enter_context(opened)
        return self._networks[name]

    def index_features(self, path: Path) -> FloatArray:
        """Features (yaws, D) of a training object."""
        return index_features(path, self.network("image_encoder"), self.image_px)

    def measure(self, job: tuple[Path, str]) -> Record:
        """Measure one object and write its record and its line of the contact sheet."""
        path, name = job
        started = time.perf_counter()
        try:
            obj = load_object(path)
        except ValueError as error:
            record: Record = {"left_out": str(error)}
        else:
            sample = ground_truth(path, self.options.seed, image_px=self.image_px)
            try:
                record = self._measured(obj, name, sample)
            except ImageError as error:  # too thin to be seen from there
                record = {"left_out": str(error)}
        record = {"name": name, **record, "seconds": round(time.perf_counter() - started, 2)}
        _write(_record_path(self.options.out, name), json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        return record

    def _measured(self, obj: Object, name: str, sample: EvalSample) -> Record:
        options = self.options
        views = self.pipeline.views(
            sample.input_rgba, steps=options.steps, guidance=options.guidance, seed=options.seed,
            focal_mm=0.0 if sample.focal_mm is None else sample.focal_mm,
        )  # fmt: skip
        true_normal, _ = decode_normals(sample.normal / 255.0)
        truth: ViewPair = (sample.color.astype(np.float32) / np.float32(255.0), true_normal)
        copied = copied_input(obj, sample, self.image_px)
        picture = np.round(copied[0][0] * 255.0).astype(np.uint8)
        pairs: dict[str, ViewPair] = {"model": (views.color, views.normal), "input": copied}
        about: Record = {"yaw_deg": sample.yaw_deg, "elevation_deg": sample.elevation_deg}
        about |= {"focal_mm": sample.focal_mm, "stage_seconds": dict(views.timings)}
        meshes: dict[str, Triangles] = {}
        if self.index is not None and (folder := options.train_folder()) is not None:
            feature = image_features(self.network("image_encoder"), [picture])[0]
            near = self.index.neighbour(folder, feature, self.image_px)
            pairs["nearest"], meshes["nearest"] = near.views, near.object
            about["nearest"] = {
                "file": near.path.relative_to(folder).as_posix(), "yaw_deg": near.yaw_deg,
                "similarity": near.similarity,
            }  # fmt: skip
        pairs["ceiling"] = autoencoded(self.network("vae_encoder"), self.network("vae_decoder"), *truth)
        rows = {row: view_metrics(*pair, *truth) for row, pair in pairs.items()}
        blocks = [view_row(views.color, views.normal), view_row(*truth)]
        if options.meshes:
            outline = (copied[1][0] != 0).any(axis=-1)
            about |= self._fit_all({**pairs, "ceiling": truth}, outline, meshes, about["stage_seconds"])
            true_mesh = placed(obj, sample.object_to_world)
            for row, mesh in meshes.items():
                rows[row] |= {"chamfer": chamfer(mesh, true_mesh), "volume_iou": volume_iou(mesh, true_mesh)}
            blocks += [turntable(thing, VIEW_PX) for thing in (as_object(meshes["model"]), true_mesh)]
        contact_sheet(_record_path(options.out, name).with_suffix(".png"), [picture], [blocks], VIEW_PX)
        about["stage_seconds"] = {k: round(v, 2) for k, v in about["stage_seconds"].items()}
        return {
            **about,
            "rows": {row: {k: _finite(v) for k, v in values.items()} for row, values in rows.items()},
        }

    def _fit_all(
        self,
        pairs: dict[str, ViewPair],
        outline: NDArray[np.bool_],
        meshes: dict[str, Triangles],
        seconds: dict[str, float],
    ) -> Record:
        """Fit the rows that have no mesh yet; the model as users do, the others without a texture.

        Whether colours are baked or stored with the vertices changes nothing of the shape.
        """
        fit_options, stand_ins = FitOptions(seed=self.options.seed), {}
        for row, pair in pairs.items():
            if row in meshes:
                continue
            mesh_options = MeshOptions() if row == "model" else MeshOptions(texture="vertex")
            try:
                made = self.pipeline.reconstruct(
                    Views(*pair), fit_options=fit_options, mesh_options=mesh_options
                )
                meshes[row] = made.mesh
                if row == "model":
                    seconds |= made.timings
            except FitError as error:
                meshes[row] = ellipsoid_of(outline)
                stand_ins[row] = str(error)
        return {"stand_ins": stand_ins}


def _check_settings(options: EvaluateOptions, train_files: Sequence[Path]) -> Record:
    """What the figures depend on, held against what OUT was begun with."""
    manifest = load_manifest(options.bundle)
    sampling = manifest.sampling
    contents = asdict(manifest)
    weights = json.dumps([contents[key] for key in ("networks", "shape", "schedule", "sampling")])
    settings: Record = {
        "bundle": options.bundle.resolve().name,
        "profile": manifest.profile,
        "bundle_sha256": hashlib.sha256(weights.encode()).hexdigest(),
        "image_px": manifest.shape.image_px,
        "steps": sampling.steps if options.steps is None else options.steps,
        "guidance": sampling.guidance if options.guidance is None else options.guidance,
        "seed": options.seed,
        "meshes": options.meshes,
        "train_objects": len(train_files),
    }
    path = options.out / "settings.json"
    if path.is_file():
        there = json.loads(path.read_text("utf-8"))
        other = [key for key, value in settings.items() if there.get(key) != value]
        if other:
            raise UsageError(
                f"{options.out} was begun with other settings ({', '.join(other)}: "
                f"{[there.get(key) for key in other]} there, {[settings[key] for key in other]} now); "
                "give another --out, or remove it"
            )
    else:
        _write(path, json.dumps(settings, indent=2) + "\n")
    return settings


def _train_index(
    options: EvaluateOptions, folder: Path, files: list[Path], say: Callable[[str], None]
) -> TrainIndex:
    started = time.monotonic()

    def progress(done: int, total: int) -> None:
        if done % 50 == 0 or done == total:
            say(f"training objects looked at: {done} of {total}, {(time.monotonic() - started) / 60:.1f} min")

    def compute(missing: Sequence[Path]) -> Iterator[FloatArray]:
        if missing:
            with _workers(options, None) as run:
                yield from run(_index_features, list(missing))

    cache = options.index or options.out.resolve().parent / "train_index.npz"
    encoder = load_manifest(options.bundle).networks["image_encoder"].sha256
    return train_index(cache, folder, files, encoder, compute, progress)


_evaluator: Evaluator | None = None
"""This process's own: a pool's tasks reach it by no other way."""


def _start_worker(options: EvaluateOptions, index: TrainIndex | None, threads: int) -> None:
    import numba

    global _evaluator
    numba.set_num_threads(min(threads, numba.get_num_threads()))
    _evaluator = Evaluator(options, index, threads).__enter__()


def _measure(job: tuple[Path, str]) -> Record:
    assert _evaluator is not None
    return _evaluator.measure(job)


def _index_features(path: Path) -> FloatArray:
    assert _evaluator is not None
    return _evaluator.index_features(path)


@contextmanager
def _workers(
    options: EvaluateOptions, index: TrainIndex | None
) -> Iterator[Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]]:
    """Gives `run(task, jobs)`, results in order; one worker works in this process."""
    threads = max(1, (os.cpu_count() or 1) // options.workers)
    if options.workers == 1:
        global _evaluator
        with Evaluator(options, index, threads) as _evaluator:
            yield map
        _evaluator = None
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        options.workers, context, initializer=_start_worker, initargs=(options, index, threads)
    ) as pool:
        try:
            yield pool.map
        finally:
            pool.shutdown(cancel_futures=True)


def _record_path(out: Path, name: str) -> Path:
    return out / "objects" / f"{name}.json"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _write_sheets(out: Path, names: Sequence[str]) -> None:
    """The objects' lines, `PAGE` a sheet: `contact_sheet.png`, `contact_sheet_2.png`, …"""
    from PIL import Image

    for number, start in enumerate(range(0, len(names), PAGE), start=1):
        lines = []
        for name in names[start : start + PAGE]:
            with Image.open(_record_path(out, name).with_suffix(".png")) as line:
                lines.append(np.asarray(line.convert("RGB")))
        suffix = "" if number == 1 else f"_{number}"
        path = out / f"contact_sheet{suffix}.png"
        temporary = path.with_name(f".{path.name}.tmp.png")
        Image.fromarray(np.concatenate(lines)).save(temporary)
        os.replace(temporary, path)
