"""Tables of all that is measured: means of each row, breakdowns, and `metrics.md`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.breakdown import DIMENSIONS, Entry, breakdowns
from train.metrics import WITHIN_DEG, Row
from train.perceptual import TITLES
from train.protocols import PROTOCOLS

Record = dict[str, Any]
"""What `train.evaluate` keeps of one object, and of a whole run."""

ROWS: dict[str, str] = {
    "model": "model",
    "input": "input copied six times",
    "nearest": "nearest training object",
    "ceiling": "ceiling: true views",
}
"""The compared candidates, by name in the records."""


@dataclass(frozen=True)
class Column:
    """One measured quantity."""

    name: str
    title: str
    digits: int
    more_is_better: bool


COLUMNS: tuple[Column, ...] = (
    Column("psnr", "PSNR dB ↑", 2, True),
    Column("ssim", "SSIM ↑", 3, True),
    Column("lpips", "LPIPS ↓", 4, False),
    Column("silhouette_iou", "silhouette IoU ↑", 3, True),
    Column("normal_deg", "normals ° ↓", 1, False),
    Column("chamfer", "Chamfer ↓", 4, False),
    Column("volume_iou", "volume IoU ↑", 3, True),
)


def _normal_columns(name: str) -> tuple[Column, ...]:
    shares = [Column(f"{name}_within_{int(a)}", f"below {a:g}° % ↑", 1, True) for a in WITHIN_DEG]
    return (
        Column(f"{name}_deg", "mean ° ↓", 2, False),
        Column(f"{name}_median_deg", "median ° ↓", 2, False),
        *shares,
    )


NORMAL_COLUMNS: dict[str, tuple[Column, ...]] = {
    "over both silhouettes": _normal_columns("normal"),
    "over the true silhouette, a missing normal as 90°": _normal_columns("normal_true"),
}
"""The paper's Table 5, by where the angles are taken."""

ALL_COLUMNS: tuple[Column, ...] = tuple(
    {c.name: c for group in (*NORMAL_COLUMNS.values(), COLUMNS) for c in group}.values()
)


def mean_row(rows: Sequence[Row]) -> dict[str, float | None]:
    """Mean of every column over the objects it says something of; None where it is silent on all."""
    means: dict[str, float | None] = {}
    for column in ALL_COLUMNS:
        values = [value for row in rows if (value := row.get(column.name)) is not None]
        means[column.name] = math.fsum(values) / len(values) if values else None
    return means


def way_to_ceiling(model: Row, baselines: Sequence[Row], ceiling: Row) -> dict[str, float | None]:
    """How far the model gets from the better baseline (0 %) to the ceiling (100 %), each column.

    None where the ceiling is no better than the baseline.
    """
    ways: dict[str, float | None] = {}
    for column in ALL_COLUMNS:
        sign = 1.0 if column.more_is_better else -1.0
        given = [value for row in baselines if (value := row.get(column.name)) is not None]
        here, top = model.get(column.name), ceiling.get(column.name)
        ways[column.name] = None
        if given and here is not None and top is not None:
            best = max(given, key=lambda value: sign * value)
            if sign * (top - best) > 0:
                ways[column.name] = 100.0 * (here - best) / (top - best)
    return ways


def markdown_table(
    rows: Mapping[str, Row], ways: Row | None = None, columns: Sequence[Column] = COLUMNS
) -> str:
    """Rows by title, the columns that any of them fills, and `way_to_ceiling` at the bottom."""
    columns = [c for c in columns if any(row.get(c.name) is not None for row in rows.values())]
    lines = ["| | " + " | ".join(c.title for c in columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for title, row in rows.items():
        cells = [cell(row.get(c.name), c.digits) for c in columns]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    if ways is not None:
        cells = [cell(ways.get(c.name), 0, " %") for c in columns]
        lines.append("| from the better baseline to the ceiling | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(value: float | None, digits: int, unit: str = "") -> str:
    """A figure in a table."""
    return "–" if value is None else f"{value:.{digits}f}{unit}"


def common_summary(
    records: Mapping[str, Record],
    settings: Record,
    index: Mapping[str, Entry],
    left_out_metrics: Mapping[str, str],
) -> Record:
    """What every protocol of objects tells: how many, the model by groups, what is left out, seconds."""
    measured = {name: record for name, record in records.items() if "left_out" not in record}
    model = {name: record["rows"]["model"] for name, record in measured.items()}
    by_category: dict[str, list[str]] = {}
    for name in measured:
        if category := index.get(name, {}).get("category"):
            by_category.setdefault(category, []).append(name)

    def means(groups: Mapping[str, Sequence[str]]) -> Record:
        return {k: {"objects": len(v), **mean_row([model[n] for n in v])} for k, v in groups.items()}

    times = [record["seconds"] for record in measured.values()]
    return {
        "settings": settings,
        "objects": len(measured),
        "left_out_metrics": dict(left_out_metrics),
        "left_out_objects": {n: r["left_out"] for n, r in records.items() if "left_out" in r},
        "groups": means(dict(sorted(by_category.items()))),
        "breakdowns": {key: means(groups) for key, groups in breakdowns(measured, index).items()},
        "seconds_per_object": float(np.median(times)) if times else None,
    }


def summarize(
    records: Mapping[str, Record],
    settings: Record,
    index: Mapping[str, Entry],
    left_out_metrics: Mapping[str, str] | None = None,
) -> Record:
    """Means of each row, overall and by group, of the protocols with one input view an object."""
    measured = {name: record for name, record in records.items() if "left_out" not in record}
    rows = {
        row: mean_row([record["rows"][row] for record in measured.values()])
        for row in ROWS
        if measured and all(row in record["rows"] for record in measured.values())
    }
    summary = common_summary(records, settings, index, left_out_metrics or {}) | {"rows": rows}
    if rows:
        baselines = [rows[row] for row in ("input", "nearest") if row in rows]
        summary["way_to_ceiling_percent"] = way_to_ceiling(rows["model"], baselines, rows["ceiling"])
    summary["left_out_rows"] = {}
    if "nearest" not in rows:
        summary["left_out_rows"]["nearest"] = (
            "there is no folder of training objects; give it with --train-objects"
        )
    summary["stand_ins"] = {
        row: [n for n, r in measured.items() if row in r.get("stand_ins", {})] for row in rows
    }
    summary["no_volume"] = [
        n for n, r in measured.items() if r["rows"]["ceiling"].get("volume_iou", 0.0) is None
    ]
    return summary


def markdown(summary: Record) -> str:
    """`metrics.md`: the table, then all that a reader must know to believe it."""
    measures = PROTOCOLS[summary["settings"].get("protocol", "all")]
    lines = [opening(summary, "one random input view each"), ""]
    titles = {ROWS[row]: values for row, values in summary["rows"].items()}
    columns = COLUMNS if measures.name != "normals" else ()
    if titles and columns:
        lines += [markdown_table(titles, summary["way_to_ceiling_percent"]), ""]
    if titles and measures.normals:
        for where, angles in NORMAL_COLUMNS.items():
            lines += [f"Normals, {where} (of each object, then the mean over objects):", ""]
            lines += [markdown_table(titles, None, angles), ""]
    if measures.colors or measures.normals:
        lines.append("The ceiling's views are the true ones through the bundle's autoencoder.")
    if summary["settings"].get("meshes"):
        lines.append(
            "The ceiling's meshes are fitted to the true views. Chamfer: mean of both mean nearest "
            "distances, the object's longest side = 1. Nothing is aligned before it is measured."
        )
    for row, reason in summary["left_out_rows"].items():
        lines.append(f"Left out: {ROWS[row]} ({reason}).")
    lines += left_out_lines(summary)
    for row, names in summary["stand_ins"].items():
        if names:
            lines.append(
                f"{ROWS[row]}: no surface fits the views of {len(names)} objects ({', '.join(names)}); an "
                "ellipsoid as wide and high as the input's silhouette stands in."
            )
    if summary["no_volume"]:
        lines.append(f"No volume, so no volume IoU: {', '.join(summary['no_volume'])}.")
    lines += group_lines(summary, columns or NORMAL_COLUMNS["over both silhouettes"])
    return "\n".join(lines) + "\n"


def opening(summary: Record, inputs: str) -> str:
    """The first line of every `metrics.md`: of what, and with which settings."""
    s = summary["settings"]
    return (
        f"{counted(summary['objects'], 'object')}, {inputs}; bundle `{s['bundle']}` ({s['profile']}), "
        f"{s['steps']} steps, guidance {s['guidance']:g}, seed {s['seed']}; views of {s['image_px']} px."
    )


def counted(number: int, thing: str) -> str:
    """A number and its thing, in the plural where it must be."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def left_out_lines(summary: Record) -> list[str]:
    """What was not measured, and why."""
    lines = [f"Left out: {TITLES[name]} ({reason})." for name, reason in summary["left_out_metrics"].items()]
    return lines + [
        f"Left out: object {name} ({reason})." for name, reason in summary["left_out_objects"].items()
    ]


def group_lines(summary: Record, columns: Sequence[Column]) -> list[str]:
    """The model's tables by category and by every other dimension."""
    lines: list[str] = []
    by_title = {"category": summary["groups"]}
    by_title |= {DIMENSIONS[key]: groups for key, groups in summary["breakdowns"].items()}
    for title, groups in by_title.items():
        if groups:
            rows = {f"{k} ({v['objects']})": v for k, v in groups.items()}
            lines += ["", f"The model by {title}:", "", markdown_table(rows, None, columns)]
    return lines


def record_names(folder: Path, files: Sequence[Path]) -> dict[Path, str]:
    """A file name for each object's record: its path in the folder, with the suffix where it must."""
    short = {path: path.relative_to(folder).with_suffix("").as_posix().replace("/", "__") for path in files}
    taken = list(short.values())
    return {p: n if taken.count(n) == 1 else f"{n}{p.suffix.replace('.', '_')}" for p, n in short.items()}


def progress_line(record: Record) -> str:
    """One object's outcome in a few words."""
    if "left_out" in record:
        return f"{record['name']}: left out ({record['left_out']})"
    row = record["rows"]["model"]
    named = {"psnr": "PSNR {:.2f}", "normal_deg": "normals {:.1f}°", "chamfer": "Chamfer {:.4f}"}
    if "psnr" in row:
        del named["normal_deg"]
    told = [text.format(row[name]) for name, text in named.items() if row.get(name) is not None]
    return f"{record['name']}: {'  '.join([*told, '{:.0f} s'.format(record['seconds'])])}"


def write_json(path: Path, record: Record) -> None:
    """A record as a file that is whole or not there."""
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
