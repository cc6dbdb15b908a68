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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from train.baselines import as_object
from train.perceptual import Weights, clip_score, frechet_distance
from train.protocols import EvaluateOptions
from train.render import Scene, View
from train.report import Column, Record, left_out_lines, markdown_table, opening
from train.sheets import contact_sheet, view_row, write_picture
from uc3d_rt.errors import FitError, UsageError
from uc3d_rt.mesh.build import MeshOptions
from uc3d_rt.neus.fit import FitOptions
from uc3d_rt.pipeline import Pipeline
from uc3d_rt.preprocess import preprocess
from uc3d_rt.views import TARGET_CAMERAS

ByteArray = NDArray[np.uint8]

PROMPTS = "prompts.csv"
VIEW_PX = 80

COLUMNS: tuple[Column, ...] = (
    Column("fid", "FID ↓", 1, False),
    Column("clip", "CLIP score ↑", 3, True),
)
ROWS: dict[str, str] = {
    "views": "six views",
    "mesh": "mesh, from the same six cameras",
    "pictures": "the pictures themselves",
}


def read_prompts(folder: Path) -> dict[Path, str]:
    """Prompt by picture, in the file's order.

    Raises:
        UsageError: `prompts.csv` is missing, has other columns, names no picture, or one that is not there.
    """
    path = folder / PROMPTS
    if not path.is_file():
        raise UsageError(f"{path} is missing; write it with the columns file,prompt, a line a picture")
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        if not {"file", "prompt"} <= set(reader.fieldnames or ()):
            raise UsageError(f"{path} has the columns {reader.fieldnames}; it needs file and prompt")
        prompts: dict[Path, str] = {}
        for row in reader:
            picture, prompt = folder / (row["file"] or ""), (row["prompt"] or "").strip()
            if not picture.is_file() or not prompt:
                raise UsageError(f"{path}, line {reader.line_num}: no such picture, or no prompt: {row}")
            if picture in prompts:
                raise UsageError(f"{path}, line {reader.line_num}: {row['file']} is there twice")
            prompts[picture] = prompt
    if not prompts:
        raise UsageError(f"{path} names no pictures")
    return prompts


def measure_picture(pipeline: Pipeline, options: EvaluateOptions, path: Path, name: str) -> Record:
    """Make views, and the mesh if wanted, of one picture; they are kept as images to be scored together."""
    px = pipeline.manifest.shape.image_px
    given = np.round(preprocess(path, px).image.transpose(1, 2, 0) * 255.0).astype(np.uint8)
    views = pipeline.views(path, steps=options.steps, guidance=options.guidance, seed=options.seed)
    kept = {"pictures": given, "views": np.concatenate(list(views.color), axis=1)}
    record: Record = {"rows": {"model": {}}, "stage_seconds": dict(views.timings)}
    row = view_row(views.color, views.normal)
    if options.fits:
        try:
            made = pipeline.reconstruct(
                views, fit_options=FitOptions(seed=options.seed), mesh_options=MeshOptions()
            )
        except FitError as error:
            record["no_mesh"] = str(error)
        else:
            record["stage_seconds"] = dict(made.timings)
            with Scene(as_object(made.mesh)) as scene:
                seen = scene.render([View(camera) for camera in TARGET_CAMERAS], px)
            kept["mesh"] = np.concatenate(list(seen.color), axis=1)
            row = np.concatenate([row, _two_rows(seen.color, seen.normal)], axis=1)
    for kind, pixels in kept.items():
        image = pixels if pixels.dtype == np.uint8 else np.round(pixels * 255.0).astype(np.uint8)
        write_picture(options.out / _kept(name, kind), Image.fromarray(image))
    blocks = np.split(row, row.shape[1] // (6 * px), axis=1)
    contact_sheet(options.out / "objects" / f"{name}.png", [given], [blocks], VIEW_PX)
    record["kept"] = list(kept)
    record["pictures"] = [[title, f"objects/{name}.png"] for title in ["input, six views, mesh"]]
    return record


def _two_rows(color: ByteArray, normal: ByteArray) -> ByteArray:
    return np.concatenate([np.concatenate(list(images), axis=1) for images in (color, normal)])


def _kept(name: str, kind: str) -> Path:
    return Path("gallery") / f"{name}_{kind}.png"


def scored(
    records: Mapping[str, Record], prompts: Mapping[str, str], out: Path, weights: Weights, device: str
) -> tuple[dict[str, Record], dict[str, dict[str, float]], dict[str, str]]:
    """Records with their CLIP scores; FID and CLIP score by row; and the metrics that say nothing, with why.

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
    left_out = weights.left_out(("fid", "clip"))
    rows: dict[str, dict[str, float]] = {kind: {} for kind in ROWS if kind in images}
    new = {name: {**record, "rows": {"model": {}}} for name, record in records.items()}
    if weights.clip is not None and images:
        cosines = clip_score(weights.clip, device)
        for kind in rows:
            rows[kind]["clip"], each = _clip_row(images[kind], prompts, cosines)
            for name, value in each.items():
                new[name]["rows"]["model"] |= {f"clip_{kind}": value}
                if kind == "views":
                    new[name]["rows"]["model"]["clip"] = value
    if weights.fid is not None and len(images.get("pictures", {})) < 2:
        left_out["fid"] = "it needs two pictures or more"
    elif weights.fid is not None:
        distance = frechet_distance(weights.fid, device)
        real = [picture for pictures in images["pictures"].values() for picture in pictures]
        for kind in rows:
            made = [picture for pictures in images[kind].values() for picture in pictures]
            if kind != "pictures":
                rows[kind]["fid"] = distance(made, real)
    return new, rows, left_out


def _clip_row(
    images: Mapping[str, Sequence[ByteArray]],
    prompts: Mapping[str, str],
    cosines: Callable[[Sequence[ByteArray], Sequence[str]], list[float]],
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
