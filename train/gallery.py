"""A sheet of what a bundle makes of pictures: input, six views with normals, mesh from all sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from train.baselines import as_object, turntable
from train.sheets import contact_sheet, view_row
from uc3d_rt.errors import UsageError
from uc3d_rt.pipeline import Pipeline
from uc3d_rt.preprocess import preprocess

VIEW_PX = 96


def gallery(
    bundle: Path,
    pictures: Sequence[Path],
    out: Path,
    seed: int = 0,
    say: Callable[[str], None] = print,
    *,
    steps: int | None = None,
    guidance: float | None = None,
) -> None:
    """Run every picture and write the sheet, rewritten after each; None is the bundle's default.

    Raises:
        UsageError: `out` is of no kind that Pillow writes.
        ImageError, BundleError, BackendError, FitError: see `uc3d_rt.errors`.
    """
    if out.suffix.lower() not in Image.registered_extensions():
        raise UsageError(f"{out} is no kind of picture that can be written; name a .png or .webp file")
    inputs, rows = [], []
    with Pipeline.from_bundle(bundle, backend="bundle") as pipeline:
        for path in pictures:
            given = preprocess(path, pipeline.manifest.shape.image_px)
            result = pipeline(path, steps=steps, guidance=guidance, seed=seed)
            inputs.append(np.round(given.image.transpose(1, 2, 0) * 255.0).astype(np.uint8))
            views = view_row(result.views.color, result.views.normal)
            rows.append([views, turntable(as_object(result.mesh), VIEW_PX)])
            contact_sheet(out, inputs, rows, VIEW_PX)
            say(f"{path.name}: {sum(result.timings.values()):.0f} s")
