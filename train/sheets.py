"""Contact sheets: what the model makes beside what is true."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from uc3d_rt.views import encode_normals


def view_row(color: NDArray[np.floating], normal: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Six colour views over six normal maps: (2H, 6W, 3) bytes from (6, H, W, 3) each."""
    top = np.concatenate(list(np.clip(color, 0, 1)), axis=1)
    bottom = np.concatenate(list(encode_normals(normal)), axis=1)
    return (np.concatenate([top, bottom]) * 255 + 0.5).astype(np.uint8)


def contact_sheet(
    path: Path,
    inputs: Sequence[NDArray[np.uint8]],
    rows: Sequence[Sequence[NDArray[np.uint8]]],
    view_px: int = 96,
) -> None:
    """Write a sheet: a line an object, its input at the left, then each of `rows[i]` side by side."""
    lines = []
    for picture, blocks in zip(inputs, rows, strict=True):
        tiles = [Image.fromarray(picture).resize((2 * view_px, 2 * view_px), Image.Resampling.LANCZOS)]
        for block in blocks:
            tiles.append(Image.fromarray(block).resize((6 * view_px, 2 * view_px), Image.Resampling.LANCZOS))
        lines.append(np.concatenate([np.asarray(tile) for tile in tiles], axis=1))
    write_picture(path, Image.fromarray(np.concatenate(lines)))


def write_picture(path: Path, picture: Image.Image) -> None:
    """An image file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    picture.save(temporary)
    temporary.replace(path)


def loss_curves(path: Path, history: Sequence[dict[str, float]]) -> None:
    """Draw every logged quantity against the step, one panel each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [key for key in history[-1] if key != "step"]
    figure, axes = pyplot.subplots(1, len(names), figsize=(3.2 * len(names), 2.6), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        rows = [(entry["step"], entry[name]) for entry in history if name in entry]
        axis.plot(*zip(*rows, strict=True), linewidth=0.8)
        axis.set_title(name)
        axis.set_xlabel("step")
        if all(value > 0 for _, value in rows):
            axis.set_yscale("log")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
