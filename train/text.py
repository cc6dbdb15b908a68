"""Pictures made from prompts, and what is made of them (the paper's Sec. 4.2.2, Table 2).

A folder holds the pictures that a text-to-image model made, and `prompts.csv` with the columns `file` and
`prompt`.  Of each picture the six views are generated and the mesh is fitted.  Told are

- **FID** between all views (or the meshes as the same six cameras see them) and the pictures as the network
  is given them: one real image a prompt, six of what was made.  It depends on how many images there are, so
  compare only runs over the same prompts;
- **CLIP score**: the mean cosine of an image with its prompt, over the same images; the pictures' own says
  what can be reached.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from train.baselines import as_object
from train.perceptual import SetMetric, TextMetric, Weights, clip_score, frechet_distance
from train.protocols import EvaluateOptions
from train.render import Light, Scene, View
from train.report import Column, Record, left_out_lines, markdown_table, opening
from train.sheets import contact_sheet, view_row, write_picture
from uc3d_rt.errors import FitError, UsageError
from uc3d_rt.mesh.build import MeshOptions
from uc3d_rt.neus.fit_plan import FitOptions
from uc3d_rt.pipeline import Pipeline
from uc3d_rt.preprocess import preprocess
from uc3d_rt.views import TARGET_CAMERAS

ByteArray = NDArray[np.uint8]

PROMPTS = "prompts.csv"
OVERFLOW = ""  # where the reader puts what a line has beyond its columns: no column has this name
VIEW_PX = 80

UNLIT = Light(direction=(0.0, 1.0, 0.0), ambient=1.0, key=0.0, wrap=1.0)
"""Colours as they are: the mesh's come from the six views, whose light is in them already."""

COLUMNS: tuple[Column, ...] = (
    Column("fid", "FID ↓", 1, False),
    Column("clip", "CLIP score ↑", 3, True),
)
ROWS: dict[str, str] = {
    "views": "six views",
    "mesh": "mesh, from the same six cameras",
    "pictures": "the pictures themselves",
}


@dataclass(frozen=True)
class Scores:
    """The metrics of this protocol; None: no weights are given."""

    fid: SetMetric | None = None
    clip: TextMetric | None = None


def scores_from(weights: Weights, device: str) -> Scores:
    """Open what there are weights for.

    Raises:
        UsageError: weights do not fit, or the libraries are not there.
    """
    return Scores(
        None if weights.fid is None else frechet_distance(weights.fid, device),
        None if weights.clip is None else clip_score(weights.clip, device),
    )


def read_prompts(folder: Path) -> dict[Path, str]:
    """Prompt by picture, in the file's order.

    Raises:
        UsageError: `prompts.csv` is missing or unreadable, has other columns, names no picture, or one that
            is not there.
    """
    path, prompts = folder / PROMPTS, dict[Path, str]()
    if not path.is_file():
        raise UsageError(f"{path} is missing; write it with the columns file,prompt, a line a picture")
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}); write it as UTF-8") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey=OVERFLOW, strict=True)
    try:
        if not {"file", "prompt"} <= set(reader.fieldnames or ()):
            raise UsageError(f"{path} has the columns {reader.fieldnames}; it needs file and prompt")
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            picture, prompt = _named(folder, row, place)
            if picture in prompts:
                raise UsageError(f"{place}: {row['file']} is there twice; name it once")
            prompts[picture] = prompt
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: {error}; write plain CSV") from error
    if not prompts:
        raise UsageError(f"{path} names no pictures; give it a line a picture")
    return prompts


def _named(folder: Path, row: Mapping[str, str | None], place: str) -> tuple[Path, str]:
    """A line's picture and prompt."""
    file, prompt = row["file"] or "", (row["prompt"] or "").strip()
    picture = folder / file
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise UsageError(f"{place}: {file} is outside of {folder}; put the picture into it")
    if not file or not picture.is_file():
        raise UsageError(f"{place}: there is no picture {file!r} in {folder}; add it, or take the line out")
    if not prompt or OVERFLOW in row:
        raise UsageError(f"{place}: {file} needs one prompt; write it, in quotes if it has a comma")
    return picture, prompt


def measure_picture(pipeline: Pipeline, options: EvaluateOptions, path: Path, name: str) -> Record:
    """Make views, and the mesh if wanted, of one picture; they are kept as images to be scored together."""
    px = pipeline.manifest.shape.image_px
    given = np.round(preprocess(path, px).image.transpose(1, 2, 0) * 255.0).astype(np.uint8)
    views = pipeline.views(path, steps=options.steps, guidance=options.guidance, seed=options.seed)
    strip = np.round(np.clip(np.concatenate(list(views.color), axis=1), 0.0, 1.0) * 255.0)
    kept = {"pictures": given, "views": strip.astype(np.uint8)}
    record: Record = {"rows": {"model": {}}, "stage_seconds": dict(views.timings)}
    blocks = [view_row(views.color, views.normal)]
    if options.fits:
        try:
            made = pipeline.reconstruct(
                views, fit_options=FitOptions(seed=options.seed), mesh_options=MeshOptions()
            )
        except FitError as error:
            record["no_mesh"] = str(error)
            blocks.append(np.full_like(blocks[0], 255))  # all lines of a sheet are as wide
        else:
            record["stage_seconds"] = dict(made.timings)
            with Scene(as_object(made.mesh)) as scene:
                seen = scene.render([View(camera, light=UNLIT) for camera in TARGET_CAMERAS], px)
            kept["mesh"] = np.concatenate(list(seen.color), axis=1)
            lines = [np.concatenate(list(images), axis=1) for images in (seen.color, seen.normal)]
            blocks.append(np.concatenate(lines))
    for kind, pixels in kept.items():
        write_picture(options.out / _kept(name, kind), Image.fromarray(pixels))
    contact_sheet(options.out / "objects" / f"{name}.png", [given], [blocks], VIEW_PX)
    record["kept"] = list(kept)
    title = "input, six views, mesh" if "mesh" in kept else "input, six views"
    record["pictures"] = [[title, f"objects/{name}.png"]]
    return record


def _kept(name: str, kind: str) -> Path:
    """A strip of square images, without loss: they are scored once all of them are there."""
    return Path("scored") / name / f"{kind}.png"


def scored(
    records: Mapping[str, Record], prompts: Mapping[str, str], out: Path, scores: Scores
) -> tuple[dict[str, Record], dict[str, dict[str, float]], dict[str, str]]:
    """Records with their CLIP scores; FID and CLIP score by row; what of them says nothing, with why.

    Args:
        records: by name, of what was measured.
        prompts: by name.
        out: where the images of the records are.
    """
    images: dict[str, dict[str, list[ByteArray]]] = {}
    for name, record in records.items():
        for kind in record["kept"]:
            with Image.open(out / _kept(name, kind)) as strip:
                pixels = np.asarray(strip.convert("RGB"))
            images.setdefault(kind, {})[name] = np.split(pixels, pixels.shape[1] // pixels.shape[0], axis=1)
    left_out: dict[str, str] = {}
    rows: dict[str, dict[str, float]] = {kind: {} for kind in ROWS if kind in images}
    new = {name: {**record, "rows": {"model": {}}} for name, record in records.items()}
    if scores.clip is not None:
        for kind in rows:
            rows[kind]["clip"], each = _clip_row(images[kind], prompts, scores.clip)
            for name, value in each.items():
                new[name]["rows"]["model"] |= {f"clip_{kind}": value}
                if kind == "views":
                    new[name]["rows"]["model"]["clip"] = value
    if scores.fid is not None and len(images.get("pictures", {})) < 2:
        left_out["fid"] = "it needs two pictures or more"
    elif scores.fid is not None:
        real = [picture for pictures in images["pictures"].values() for picture in pictures]
        for kind in rows:
            made = [picture for pictures in images[kind].values() for picture in pictures]
            if kind != "pictures":
                rows[kind]["fid"] = scores.fid(made, real)
    return new, rows, left_out


def _clip_row(
    images: Mapping[str, Sequence[ByteArray]],
    prompts: Mapping[str, str],
    cosines: TextMetric,
) -> tuple[float, dict[str, float]]:
    """The mean over pictures, and each one's."""
    each = {name: float(np.mean(cosines(some, [prompts[name]] * len(some)))) for name, some in images.items()}
    return float(np.mean(list(each.values()))), each


def text_summary(
    records: Mapping[str, Record], prompts: Mapping[str, str], settings: Record,
    rows: Mapping[str, Record], left_out: Mapping[str, str],
) -> Record:  # fmt: skip
    """What `metrics.json` holds."""
    measured = {name: record for name, record in records.items() if "left_out" not in record}
    times = [record["seconds"] for record in measured.values()]
    return {
        "settings": settings,
        "objects": len(measured),
        "rows": dict(rows),
        "prompts": {name: prompts[name] for name in measured},
        "left_out_metrics": dict(left_out),
        "left_out_objects": {n: r["left_out"] for n, r in records.items() if "left_out" in r},
        "no_mesh": {n: r["no_mesh"] for n, r in measured.items() if "no_mesh" in r},
        "seconds_per_object": float(np.median(times)) if times else None,
    }


def text_markdown(summary: Record) -> str:
    """`metrics.md`."""
    lines = [opening(summary, "each a picture made from a prompt"), ""]
    rows = {ROWS[row]: values for row, values in summary["rows"].items() if values}
    if rows:
        lines += [markdown_table(rows, None, COLUMNS), ""]
    lines += [
        "FID is between what was made and the pictures as the network is given them; CLIP score is the mean "
        "cosine with the prompt.",
        *left_out_lines(summary),
    ]
    for name, reason in summary["no_mesh"].items():
        lines.append(f"No mesh: {name} ({reason}).")
    return "\n".join(lines) + "\n"
