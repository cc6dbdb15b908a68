"""The tables and the contact sheet of an ablation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from train.sheets import contact_sheet
from train.watch import Watch

SHEET_PX = 96

AROUND_TABLE = 6
"""Its figures are its own; its runs are those of Table 4."""

TABLES = {
    4: "Table 4: with and without each regulariser",
    AROUND_TABLE: "Table 6: objects seen from inputs all around, with and without each regulariser",
    7: "Table 7: the weight of L_MI",
    8: "Table 8: the weight of L_Var",
}

Figures = dict[str, float | None]
"""What is measured of one run by name; None where it says nothing."""


@dataclass(frozen=True)
class Variant:
    """One setting of Eq. 18."""

    lambda_var: float
    lambda_mi: float

    @property
    def folder(self) -> str:
        """Its name on disk; one variant of several tables is one folder."""
        return f"var-{self.lambda_var:g}-mi-{self.lambda_mi:g}"

    @property
    def title(self) -> str:
        """As in the tables."""
        kinds = {(False, False): "neither", (True, False): "no L_MI", (False, True): "no L_Var"}
        kind = kinds.get((self.lambda_var > 0, self.lambda_mi > 0), "both")
        return f"{kind} (λ_Var {self.lambda_var:g}, λ_MI {self.lambda_mi:g})"


@dataclass(frozen=True)
class Figure:
    """One measured quantity."""

    name: str
    title: str
    digits: int
    scale: float = 1.0


FIGURES = (
    Figure("psnr", "PSNR dB ↑", 2),
    Figure("ssim", "SSIM ↑", 3),
    Figure("silhouette_iou", "silhouette IoU ↑", 3),
    Figure("normal_deg", "normals ° ↓", 1),
    Figure("latent_variance", "L_Var ↓", 4),
    Figure("latent_variance_share", "of the features % ↓", 2, 100.0),
    Figure("outlines", "outlines agree ↑", 3),
    Figure("edges", "edges agree ↑", 3),
    Figure("retrieval_own", "retrieval, own heads % ↑", 1, 100.0),
    Figure("retrieval", "retrieval, one pair of heads % ↑", 1, 100.0),
    Figure("steps", "steps", 0),
)

AROUND_FIGURES = (
    Figure("agree_psnr", "inputs agree, PSNR dB ↑", 2),
    Figure("agree_silhouette_iou", "silhouette IoU ↑", 3),
    Figure("agree_normal_deg", "normals ° ↓", 1),
    Figure("spread_psnr", "spread over inputs, PSNR dB ↓", 2),
    Figure("spread_silhouette_iou", "silhouette IoU ↓", 3),
    Figure("spread_normal_deg", "normals ° ↓", 1),
    Figure("around_psnr", "mean over inputs, PSNR dB ↑", 2),
    Figure("around_silhouette_iou", "silhouette IoU ↑", 3),
    Figure("around_normal_deg", "normals ° ↓", 1),
)
"""Of views of two inputs whose target cameras coincide, held against each other; then of all inputs' views
against the truth: standard deviation over the inputs, and mean."""


def markdown(
    head_lines: str,
    rows: Mapping[int, Sequence[Variant]],
    found: Mapping[Variant, Mapping[int, Figures]],
    truth: Figures,
) -> str:
    """All tables: mean ± standard deviation over the seeds that are measured.

    Args:
        head_lines: what stands above them.
        rows: the variants of each table.
        found: the figures of each run, by variant and seed.
        truth: the ceiling.
    """
    parts = []
    for table, variants in rows.items():
        figures, ceiling = FIGURES, "true views through the autoencoder"
        if table == AROUND_TABLE:
            figures, ceiling = AROUND_FIGURES, "true views"
        head = "| | " + " | ".join(figure.title for figure in figures) + " | seeds |"
        lines = [f"## {TABLES[table]}", "", head, "| --- |" + " ---: |" * (len(figures) + 1)]
        for variant in variants:
            runs = list(found[variant].values())
            if runs:
                cells = [cell(figure, [run[figure.name] for run in runs]) for figure in figures]
                lines.append(f"| {variant.title} | {' | '.join(cells)} | {len(runs)} |")
        cells = [cell(figure, [truth.get(figure.name)]) for figure in figures]
        lines.append(f"| {ceiling} | {' | '.join(cells)} | |")
        parts.append("\n".join(lines))
    return "\n\n".join([head_lines, *parts]) + "\n"


def sheet(path: Path, watch: Watch, truth: Sequence[NDArray[np.uint8]], drawn: Mapping[str, Path]) -> None:
    """The same objects in every line: the input pictures, the true views, then what each variant makes."""
    inputs = []
    for picture in watch.picture[: len(truth)]:
        height, width = truth[0].shape[:2]
        block = Image.new("RGB", (width, height), "white")
        block.paste(Image.fromarray(picture).resize((height, height)), ((width - height) // 2, 0))
        inputs.append(np.asarray(block))
    lines: dict[str, Sequence[NDArray[np.uint8]]] = {"input": inputs, "true views": truth}
    for title, place in drawn.items():
        with Image.open(place / "views.png") as picture:
            lines[f"{title}\n{place.name}"] = np.split(np.asarray(picture), len(truth), axis=1)
    contact_sheet(path, [_label(title) for title in lines], list(lines.values()), SHEET_PX)


def summary(variant: Variant, by_seed: Mapping[int, Figures]) -> dict[str, Any]:
    names = [figure.name for figure in (*FIGURES, *AROUND_FIGURES)]
    spread = {n: _spread([run[n] for run in by_seed.values() if n in run]) for n in names}
    return {
        "title": variant.title,
        **asdict(variant),
        "runs": {str(seed): figures for seed, figures in by_seed.items()},
        "mean": {name: mean for name, (mean, _) in spread.items()},
        "std": {name: deviation for name, (_, deviation) in spread.items()},
    }


def _spread(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None for what too few runs tell."""
    known = [value for value in values if value is not None]
    mean = statistics.fmean(known) if known else None
    return mean, statistics.stdev(known) if len(known) > 1 else None


def cell(figure: Figure, values: Sequence[float | None]) -> str:
    mean, deviation = _spread(values)
    if mean is None:
        return "–"
    text = f"{mean * figure.scale:.{figure.digits}f}"
    return text if deviation is None else f"{text} ± {deviation * figure.scale:.{figure.digits}f}"


def mean_of(rows: Iterable[Figures], figures: Sequence[Figure] = FIGURES) -> Figures:
    """Mean of every figure over the objects that it says something of."""
    found = list(rows)
    means: Figures = {}
    for figure in figures:
        values = [
            value for row in found if (value := row.get(figure.name)) is not None and not math.isnan(value)
        ]
        means[figure.name] = statistics.fmean(values) if values else None
    return means


def _label(title: str) -> NDArray[np.uint8]:
    side = 2 * SHEET_PX
    tile = Image.new("RGB", (side, side), "white")
    text = title.replace(" (", "\n(").replace(", ", ",\n").replace("λ", "lambda")  # the font has no Greek
    ImageDraw.Draw(tile).multiline_text((8, 8), text, fill="black", font=ImageFont.load_default(20))
    return np.asarray(tile)
