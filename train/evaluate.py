"""Measure a bundle on objects it was not trained on, by one of the paper's protocols (`train.protocols`).

Each object is finished before it is written to `OUT/objects/`, so a run that was stopped goes on
where it was; tables, contact sheets and gallery are made from those files.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from train.baselines import FloatArray, TrainIndex, train_index
from train.breakdown import Entry, index_entries
from train.evaluator import Evaluator, opened_pipeline, record_path
from train.gallery_page import gallery_page
from train.metrics import Row
from train.objects import find_objects
from train.perceptual import lpips_metric
from train.protocols import EvaluateOptions
from train.report import (
    COLUMNS,
    NORMAL_COLUMNS,
    ROWS,
    Column,
    Record,
    counted,
    markdown,
    progress_line,
    record_names,
    summarize,
    write_json,
    write_text,
)
from train.sheets import write_picture
from train.text import COLUMNS as TEXT_COLUMNS
from train.text import ROWS as TEXT_ROWS
from train.text import Scores, read_prompts, scored, scores_from, text_markdown, text_summary
from train.viewpoint_report import ROWS as VIEWPOINT_ROWS
from train.viewpoint_report import agreeing, viewpoint_markdown, viewpoint_summary
from uc3d_rt.contract import load_manifest
from uc3d_rt.errors import UsageError

PAGE = 25  # objects on a contact sheet

PICTURES: dict[str, str] = {
    "all": "Six views at azimuths 30, 90 … 330 from the input, colour over normals; the truth likewise. "
    "A mesh is shown from four sides and from above.",
    "viewpoint": "A line an input: the input; six views at azimuths 30, 90 … 330 from it, colour over "
    "normals; the truth likewise; and, where meshes are fitted, the mesh from the sides of the first input.",
    "text": "The picture; six views at azimuths 30, 90 … 330 from it, colour over normals; and, where it has "
    "one, its mesh as the same six cameras see it.",
}
"""What the gallery shows, by protocol; the others are as `all`."""


@dataclass(frozen=True)
class Report:
    """What a protocol tells of its records."""

    summary: Record  # `metrics.json`
    markdown: str
    rows: Mapping[str, Row]  # means by title, of the gallery's table
    columns: tuple[Column, ...]
    records: Mapping[str, Record]


def evaluate(
    options: EvaluateOptions, files: Sequence[Path], say: Callable[[str], None] = click.echo
) -> Report:
    """Measure the bundle on files of `options.objects`; `summary` is what `metrics.json` holds.

    Raises:
        UsageError: OUT holds an evaluation with other settings, the training folder holds no object, weights
            do not fit, a worker process died, or not one object could be measured.
        BundleError, BackendError: see `uc3d_rt.errors`.
    """
    names = record_names(options.objects, files)
    prompts = {names[path]: prompt for path, prompt in _prompts(options).items() if path in names}
    folder, train_files = options.train_folder(), list[Path]()
    if folder is not None:
        try:
            train_files = find_objects(folder)
        except ValueError as error:
            raise UsageError(str(error)) from error
    # Weights that do not fit are told before hours of work, by this process, and before OUT is begun.
    scores = scores_from(options.weights, options.device) if options.protocol == "text" else Scores()
    if "lpips" in options.networks and options.weights.lpips is not None:
        lpips_metric(options.weights.lpips)
    settings = _check_settings(options, train_files, say)
    missing = [path for path in files if not _is_measured(record_path(options.out, names[path]))]
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
        records[names[path]] = json.loads(record_path(options.out, names[path]).read_text("utf-8"))
    entries = {} if options.protocol == "text" else index_entries(options.objects)
    report = _report(options, records, settings, entries, prompts, scores)
    write_json(options.out / "metrics.json", report.summary)
    write_text(options.out / "metrics.md", report.markdown)
    write_text(options.out / "gallery.html", _gallery(options, report, entries, prompts))
    _write_sheets(options, [name for name in records if "left_out" not in records[name]])
    if not report.summary["objects"]:
        first = next(iter(report.summary["left_out_objects"].values()))
        raise UsageError(
            f"none of {len(files)} objects could be measured (the first: {first}); "
            f"{options.out / 'metrics.md'} says why of each"
        )
    return report


def _is_measured(path: Path) -> bool:
    """Whether a record is there; what was left out is tried again, for its file may have been mended."""
    return path.is_file() and "left_out" not in json.loads(path.read_text("utf-8"))


def _prompts(options: EvaluateOptions) -> dict[Path, str]:
    return read_prompts(options.objects) if options.protocol == "text" else {}


def _report(
    options: EvaluateOptions, records: dict[str, Record], settings: Record,
    entries: Mapping[str, Entry], prompts: Mapping[str, str], scores: Scores,
) -> Report:  # fmt: skip
    left_out = options.weights.left_out(options.networks)
    if options.protocol == "text":
        measured = {name: record for name, record in records.items() if "left_out" not in record}
        told, rows, silent = scored(measured, prompts, options.out, scores)
        records = {name: told.get(name, record) for name, record in records.items()}
        summary = text_summary(records, prompts, settings, rows, left_out | silent)
        summary["weights_sha256"] = options.weights.digests(options.networks)
        titles, columns = TEXT_ROWS, TEXT_COLUMNS
        text = text_markdown(summary)
    elif options.protocol == "viewpoint":
        summary = viewpoint_summary(records, settings, entries, left_out)
        titles, columns = VIEWPOINT_ROWS, COLUMNS
        text = viewpoint_markdown(summary)
    else:
        summary = summarize(records, settings, entries, left_out)
        titles, columns = ROWS, COLUMNS
        if options.protocol == "normals":
            columns = NORMAL_COLUMNS["over both silhouettes"]
        text = markdown(summary)
    by_title = {titles[row]: values for row, values in summary["rows"].items()}
    if options.protocol == "viewpoint":
        for row, values in agreeing(summary).items():
            by_title[f"{titles[row]}, agreement between inputs"] = values
    return Report(summary, text, by_title, columns, records)


def _gallery(
    options: EvaluateOptions, report: Report, entries: Mapping[str, Entry], prompts: Mapping[str, str]
) -> str:
    s = report.summary["settings"]
    subtitles = {name: f"“{prompt}”" for name, prompt in prompts.items()}
    figures = {n: r["rows"]["model"] for n, r in report.records.items() if "left_out" not in r}
    for name in figures:
        record, about = report.records[name], list[str]()
        if "elevation_deg" in record:
            focal = "orthographic" if record["focal_mm"] is None else f"{record['focal_mm']:g} mm"
            about.append(f"input at elevation {record['elevation_deg']:.0f}°, {focal}")
        if category := entries.get(name, {}).get("category"):
            about.insert(0, category)
        if near := record.get("nearest"):
            about.append(f"nearest training object {near['file']}")
        if about:
            subtitles[name] = ", ".join(about)
    lines = [
        f"{s['bundle']} ({s['profile']}), protocol {s['protocol']}, {s['steps']} steps, "
        f"guidance {s['guidance']:g}, seed {s['seed']}. All figures: metrics.md.",
        PICTURES[options.protocol if options.protocol in PICTURES else "all"],
    ]
    kind = "picture" if options.protocol == "text" else "object"
    title = f"Evaluation of {s['bundle']}: {counted(report.summary['objects'], kind)}"
    return gallery_page(
        title, lines, report.rows, report.columns, report.records, figures, options.measures.main, subtitles
    )


def _check_settings(
    options: EvaluateOptions, train_files: Sequence[Path], say: Callable[[str], None]
) -> Record:
    """What the figures depend on, held against what OUT was begun with."""
    manifest = load_manifest(options.bundle)
    sampling = manifest.sampling
    contents = asdict(manifest)
    weights = json.dumps([contents[key] for key in ("networks", "shape", "schedule", "sampling")])
    choice = opened_pipeline(options).choice
    assert choice is not None
    if options.device != "cpu":
        say(f"networks run on {choice}; the fit on {options.device}")
    settings: Record = {
        "bundle": options.bundle.resolve().name,
        "profile": manifest.profile,
        "bundle_sha256": hashlib.sha256(weights.encode()).hexdigest(),
        "image_px": manifest.shape.image_px,
        "protocol": options.protocol,
        "steps": sampling.steps if options.steps is None else options.steps,
        "guidance": sampling.guidance if options.guidance is None else options.guidance,
        "seed": options.seed,
        "meshes": options.fits,
        "train_objects": len(train_files),
        "networks_on": choice.name,
        "lpips_sha256": options.weights.digests(options.networks).get("lpips"),
    }
    if options.protocol == "viewpoint":
        settings["azimuths"] = options.azimuths
    path = options.out / "settings.json"
    if path.is_file():
        try:
            there = dict(json.loads(path.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise UsageError(
                f"{path} is none of an evaluation's ({error}); give another --out, or remove it"
            ) from error
        other = [key for key, value in settings.items() if there.get(key) != value]
        if other:
            raise UsageError(
                f"{options.out} was begun with other settings ({', '.join(other)}: "
                f"{[there.get(key) for key in other]} there, {[settings[key] for key in other]} now); "
                "give another --out, or remove it"
            )
    else:
        write_text(path, json.dumps(settings, indent=2) + "\n")
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


def end_with_parent() -> None:
    """Let this process of a pool end when its parent does, which cannot end it any more if it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _start_worker(options: EvaluateOptions, index: TrainIndex | None, threads: int) -> None:
    import numba

    end_with_parent()
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
        except BrokenProcessPool as error:
            raise UsageError(
                f"a worker process died, perhaps for want of memory; what was measured is kept: go on with "
                f"--workers below {options.workers}"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _write_sheets(options: EvaluateOptions, names: Sequence[str]) -> None:
    """The objects' lines, `PAGE` a sheet: `contact_sheet.png`, `contact_sheet_2.png`, …"""
    from PIL import Image

    page = max(1, PAGE // options.azimuths) if options.protocol == "viewpoint" else PAGE
    for number, start in enumerate(range(0, len(names), page), start=1):
        lines = []
        for name in names[start : start + page]:
            with Image.open(record_path(options.out, name).with_suffix(".png")) as line:
                lines.append(np.asarray(line.convert("RGB")))
        suffix = "" if number == 1 else f"_{number}"
        write_picture(options.out / f"contact_sheet{suffix}.png", Image.fromarray(np.concatenate(lines)))
