"""Time the baking of a texture, on the CPU and on a GPU, in one warm process.

    python benchmarks/bake.py [--device cuda] [--faces 12000] [--texture-px 1024] [--runs 20]

The surface is a lump with hollows, the views show noise; the first run is told apart.  A GPU's texture is
compared with the CPU's, and with that of its own first run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import click
import numpy as np

from uc3d_rt.mesh.bake import ProjectedViews, bake_texture
from uc3d_rt.mesh.extract import extract_surface
from uc3d_rt.mesh.raster import render_normals
from uc3d_rt.mesh.simplify import simplify_surface
from uc3d_rt.mesh.surface import Surface, vertex_normals
from uc3d_rt.mesh.unwrap import unwrap_surface
from uc3d_rt.neus.field import Field, node_coordinates

VIEW_PX = 256


@click.command(help=__doc__.split("\n")[0])
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--faces", default=12_000, show_default=True, help="Of the mesh, about.")
@click.option("--texture-px", default=1024, show_default=True)
@click.option("--runs", default=20, show_default=True, help="After the first.")
def main(device: str, faces: int, texture_px: int, runs: int) -> None:
    surface = simplify_surface(lump(160), faces)
    normals = vertex_normals(surface)
    normal = render_normals(surface.vertices, surface.faces, normals, VIEW_PX)
    color = np.random.default_rng(0).random(normal.shape).astype(np.float32)
    atlas = unwrap_surface(surface, texture_px)
    click.echo(f"{len(surface.faces)} faces, {texture_px}² texels")

    def on_cpu() -> np.ndarray:
        return bake_texture(surface, normals, atlas, ProjectedViews(surface, color, normal), texture_px)

    expected = timed("cpu", on_cpu, runs)
    if device == "cpu":
        return
    from uc3d_rt.cuda_device import CudaDevice
    from uc3d_rt.mesh.device_bake import bake_texture_on_device

    with CudaDevice() as opened:
        found = timed(
            device,
            lambda: bake_texture_on_device(opened, surface, normals, atlas, color, normal, texture_px),
            runs,
        )
    off = np.abs(found.astype(int) - expected).max(axis=-1)
    click.echo(f"texels that differ: {(off > 0).mean():.2e}; by more than 1/255: {(off > 1).mean():.2e}")


def lump(resolution: int) -> Surface:
    """A closed surface with parts that no view sees."""
    axis = node_coordinates(resolution)
    y, z, x = np.meshgrid(axis, axis, axis, indexing="ij")
    sdf = np.sqrt(x * x + y * y + z * z) - 0.6 + 0.08 * np.sin(9 * x) * np.sin(8 * y + 1) * np.sin(7 * z)
    return extract_surface(Field(sdf.astype(np.float32), np.zeros((*sdf.shape, 3), np.float32)), 0.05)


def timed(name: str, bake: Callable[[], np.ndarray], runs: int) -> np.ndarray:
    """The texture; says how long it took, and whether it was the same each time."""
    seconds: list[float] = []
    first: np.ndarray | None = None
    for _ in range(runs + 1):
        started = time.perf_counter()
        texture = bake()  # downloaded, so that the device is done
        seconds.append(time.perf_counter() - started)
        first = texture if first is None else first
        if not np.array_equal(first, texture):
            raise click.ClickException(f"{name}: another texture than before")
    rest = [1e3 * value for value in seconds[1:]]
    click.echo(
        f"{name:5s} first {1e3 * seconds[0]:7.1f} ms, then {statistics.median(rest):7.1f} ms "
        f"({min(rest):.1f} to {max(rest):.1f})"
    )
    return first


if __name__ == "__main__":
    main()
