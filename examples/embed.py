"""Use the library in a program of your own: one picture in, six views and a mesh out.

    python examples/embed.py shoe.png out/

Prints what it does; leaves `views.png` (colours above, normals below) and `mesh.glb` in the folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from uc3d_rt import Pipeline, Uc3dError
from uc3d_rt.mesh.writers import export_mesh
from uc3d_rt.views import encode_normals


def show(stage: str, done: int, total: int) -> None:
    """Called by the pipeline; a GUI would move its progress bar here."""
    if done == total:
        print(f"{stage}: done")


def main(image: Path, folder: Path, bundle: Path | None = None) -> None:
    """Reconstruct the object in `image` into `folder`."""
    # Opening a bundle reads its manifest; networks load stage by stage, and are freed again.
    # bundle=None is the model that ships with the package.
    pipeline = Pipeline.from_bundle(bundle)

    # Any option may be left out; `steps` trades quality for time, `seed` picks another guess of
    # what the picture does not show.
    result = pipeline(image, steps=20, seed=0, on_progress=show)

    # Doubts about the input, for example a background that is hard to remove.
    for note in result.notes:
        print("note:", note)

    # Views are plain arrays (6, H, W, 3): colours in [0, 1], normals as unit vectors.
    rows = [
        np.concatenate(list(images), axis=1)
        for images in (result.views.color, encode_normals(result.views.normal))
    ]
    sheet = np.round(np.concatenate(rows) * 255).astype(np.uint8)
    Image.fromarray(sheet).save(folder / "views.png")

    # The mesh is a trimesh.Trimesh: +Y up, +Z towards the camera that took the picture.
    export_mesh(result.mesh, folder / "mesh.glb")
    print(f"{len(result.mesh.faces)} triangles in {sum(result.timings.values()):.1f} s")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), *map(Path, sys.argv[3:4]))
    except Uc3dError as error:  # every mistake a user can make is a child of this
        sys.exit(f"error: {error}")
