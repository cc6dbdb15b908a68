"""Image metrics of the six views, on NumPy arrays, and the table of all that is measured."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Row = Mapping[str, float | None]
"""One object's figures by column; None where a column says nothing of that object."""
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
    Column("silhouette_iou", "silhouette IoU ↑", 3, True),
    Column("normal_deg", "normals ° ↓", 1, False),
    Column("chamfer", "Chamfer ↓", 4, False),
    Column("volume_iou", "volume IoU ↑", 3, True),
)


def mean_row(rows: Sequence[Row]) -> dict[str, float | None]:
    """Mean of every column over the objects it says something of; None where it is silent on all."""
    means: dict[str, float | None] = {}
    for column in COLUMNS:
        values = [value for row in rows if (value := row.get(column.name)) is not None]
        means[column.name] = math.fsum(values) / len(values) if values else None
    return means


def way_to_ceiling(model: Row, baselines: Sequence[Row], ceiling: Row) -> dict[str, float | None]:
    """How far the model gets from the better baseline (0 %) to the ceiling (100 %), each column.

    None where the ceiling is no better than the baseline.
    """
    ways: dict[str, float | None] = {}
    for column in COLUMNS:
        sign = 1.0 if column.more_is_better else -1.0
        given = [value for row in baselines if (value := row.get(column.name)) is not None]
        here, top = model.get(column.name), ceiling.get(column.name)
        ways[column.name] = None
        if given and here is not None and top is not None:
            best = max(given, key=lambda value: sign * value)
            if sign * (top - best) > 0:
                ways[column.name] = 100.0 * (here - best) / (top - best)
    return ways


def markdown_table(rows: Mapping[str, Row], ways: Row | None = None) -> str:
    """Rows by title, the columns that any of them fills, and `way_to_ceiling` at the bottom."""
    columns = [c for c in COLUMNS if any(row.get(c.name) is not None for row in rows.values())]
    lines = ["| | " + " | ".join(c.title for c in columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for title, row in rows.items():
        cells = [_cell(row.get(c.name), c.digits) for c in columns]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    if ways is not None:
        cells = [_cell(ways.get(c.name), 0, " %") for c in columns]
        lines.append("| from the better baseline to the ceiling | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float | None, digits: int, unit: str = "") -> str:
    return "–" if value is None else f"{value:.{digits}f}{unit}"


def summarize(records: dict[str, Record], settings: Record, category: dict[str, str]) -> Record:
    """Means of each row, overall and by category."""
    measured = {name: record for name, record in records.items() if "left_out" not in record}
    rows = {
        row: mean_row([record["rows"][row] for record in measured.values()])
        for row in ROWS
        if measured and all(row in record["rows"] for record in measured.values())
    }
    groups: dict[str, list[Record]] = {}
    for name, record in measured.items():
        if name in category:
            groups.setdefault(category[name], []).append(record["rows"]["model"])
    summary: Record = {"settings": settings, "objects": len(measured), "rows": rows}
    if rows:
        baselines = [rows[row] for row in ("input", "nearest") if row in rows]
        summary["way_to_ceiling_percent"] = way_to_ceiling(rows["model"], baselines, rows["ceiling"])
    summary["left_out_rows"] = {}
    if "nearest" not in rows:
        summary["left_out_rows"]["nearest"] = (
            "there is no folder of training objects; give it with --train-objects"
        )
    summary["left_out_objects"] = {n: r["left_out"] for n, r in records.items() if "left_out" in r}
    summary["stand_ins"] = {
        row: [n for n, r in measured.items() if row in r.get("stand_ins", {})] for row in rows
    }
    summary["no_volume"] = [
        n for n, r in measured.items() if r["rows"]["ceiling"].get("volume_iou", 0.0) is None
    ]
    summary["groups"] = {k: {"objects": len(v), **mean_row(v)} for k, v in sorted(groups.items())}
    times = [record["seconds"] for record in measured.values()]
    summary["seconds_per_object"] = float(np.median(times)) if times else None
    return summary


def markdown(summary: Record) -> str:
    """`metrics.md`: the table, then all that a reader must know to believe it."""
    s = summary["settings"]
    lines = [
        f"{summary['objects']} objects, one random input view each; bundle `{s['bundle']}` ({s['profile']}), "
        f"{s['steps']} steps, guidance {s['guidance']:g}, seed {s['seed']}; views of {s['image_px']} px.",
        "",
    ]
    if summary["rows"]:
        titles = {ROWS[row]: values for row, values in summary["rows"].items()}
        lines += [markdown_table(titles, summary["way_to_ceiling_percent"]), ""]
    lines += [
        "The ceiling's views are the true ones through the bundle's autoencoder; its meshes are fitted to "
        "the true views.",
        "Chamfer: mean of both mean nearest distances, the object's longest side = 1. "
        "Nothing is aligned before it is measured.",
    ]
    for row, reason in summary["left_out_rows"].items():
        lines.append(f"Left out: {ROWS[row]} ({reason}).")
    for name, reason in summary["left_out_objects"].items():
        lines.append(f"Left out: object {name} ({reason}).")
    for row, names in summary["stand_ins"].items():
        if names:
            lines.append(
                f"{ROWS[row]}: no surface fits the views of {len(names)} objects ({', '.join(names)}); an "
                "ellipsoid as wide and high as the input's silhouette stands in."
            )
    if summary["no_volume"]:
        lines.append(f"No volume, so no volume IoU: {', '.join(summary['no_volume'])}.")
    if summary["groups"]:
        titles = {f"{k} ({v['objects']})": v for k, v in summary["groups"].items()}
        lines += ["", "The model by category:", "", markdown_table(titles)]
    return "\n".join(lines) + "\n"


def categories(folder: Path) -> dict[str, str]:
    """Category by object id from `index.csv` beside the folder; empty where there is none."""
    path = folder.resolve().parent / "index.csv"
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as stream:
        return {row["id"]: row["category"] for row in csv.DictReader(stream) if row.get("category")}


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
    mesh = f"  Chamfer {row['chamfer']:.4f}" if "chamfer" in row else ""
    return f"{record['name']}: PSNR {row['psnr']:.2f}{mesh}  {record['seconds']:.0f} s"


def view_metrics(color: Array, normal: Array, true_color: Array, true_normal: Array) -> dict[str, float]:
    """All image metrics of one object's views, by name.

    Args:
        color: (V, H, W, 3) in [0, 1].
        normal: (V, H, W, 3) unit normals, zero outside of the silhouette.
        true_color: as `color`.
        true_normal: as `normal`.
    """
    mask, true_mask = (normal != 0).any(axis=-1), (true_normal != 0).any(axis=-1)
    return {
        "psnr": psnr(color, true_color),
        "ssim": ssim(color, true_color),
        "silhouette_iou": silhouette_iou(mask, true_mask),
        "normal_deg": normal_error_deg(normal, true_normal, mask, true_mask),
    }


def psnr(image: Array, truth: Array) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1], over all entries given."""
    error = float(np.mean((np.asarray(image, np.float64) - np.asarray(truth, np.float64)) ** 2))
    return float(-10.0 * np.log10(max(error, 1e-12)))


def ssim(image: Array, truth: Array) -> float:
    """Mean SSIM (Wang et al. 2004: Gaussian window of sigma 1.5) of views (V, H, W, 3) in [0, 1]."""
    from skimage.metrics import structural_similarity

    values = [
        structural_similarity(
            a,
            b,
            data_range=1.0,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(image, truth, strict=True)
    ]
    return float(np.mean(values))


def silhouette_iou(mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Mean over views of intersection over union of silhouettes (V, H, W)."""
    both = (mask & truth).sum(axis=(1, 2))
    either = (mask | truth).sum(axis=(1, 2))
    return float(np.mean(np.where(either > 0, both / np.maximum(either, 1), 1.0)))


def normal_error_deg(
    normal: Array, truth: Array, mask: NDArray[np.bool_], truth_mask: NDArray[np.bool_]
) -> float:
    """Mean angle in degrees between unit normals (V, H, W, 3) where both silhouettes hold.

    NaN when the silhouettes never meet.
    """
    both = mask & truth_mask
    if not both.any():
        return float("nan")
    cosine = np.clip((normal[both] * truth[both]).sum(axis=-1), -1.0, 1.0)
    return float(np.degrees(np.arccos(cosine)).mean())
