"""Time the surface of a field, extracted and turned to the normal maps, on the CPU and on a GPU.

    python benchmarks/surface.py [--device cuda] [--resolution 160] [--runs 20]

One warm process; the first run is told apart.  A GPU's surface is compared with the CPU's, and with that of
its own first run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import click
import numpy as np

from uc3d_rt.device import Scope, uploaded
from uc3d_rt.mesh.extract import extract_surface
from uc3d_rt.mesh.raster import render_normals
from uc3d_rt.mesh.refine import refine_surface
from uc3d_rt.mesh.surface import Surface, is_closed, signed_volumes, vertex_normals
from uc3d_rt.neus.field import Field, node_coordinates

VIEW_PX = 256
MIN_SHARE = 0.05


@click.command(help=__doc__.split("\n")[0])
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--resolution", default=160, show_default=True, help="Nodes along an axis.")
@click.option("--runs", default=20, show_default=True, help="After the first.")
def main(device: str, resolution: int, runs: int) -> None:
    field = lump(resolution)
    smooth = extract_surface(field, MIN_SHARE)
    normal = render_normals(smooth.vertices, smooth.faces, vertex_normals(smooth), VIEW_PX)
    click.echo(f"{resolution}³ nodes, {len(smooth.faces)} faces")
    extracted = timed("cpu, extracted", lambda: extract_surface(field, MIN_SHARE), runs)
    expected = timed("cpu, turned", lambda: refine_surface(extracted, normal), runs)
    if device == "cpu":
        return
    from uc3d_rt.cuda_device import CudaDevice
    from uc3d_rt.mesh.device_extract import DeviceSurface, extract_surface_on_device
    from uc3d_rt.mesh.device_refine import refine_surface_on_device, surface_on_device

    with CudaDevice() as opened:

        def down(surface: DeviceSurface) -> Surface:
            return Surface(opened.download(surface.vertices), opened.download(surface.faces))

        with Scope(opened) as outer:
            sdf = uploaded(outer, field.sdf)

            def extract() -> Surface:
                with Scope(opened) as scope:
                    return down(extract_surface_on_device(scope, sdf, MIN_SHARE))

            timed("cuda, extracted", extract, runs)
            given = extract_surface_on_device(outer, sdf, MIN_SHARE)

            def turn() -> Surface:
                with Scope(opened) as scope:
                    moved = refine_surface_on_device(scope, given, normal)
                    return down(DeviceSurface(moved, given.faces))

            timed("cuda, turned", turn, runs)

        def whole() -> Surface:
            with Scope(opened) as scope:
                return surface_on_device(scope, uploaded(scope, field.sdf), normal, MIN_SHARE)

        found = timed("cuda, uploaded and all", whole, runs)
    assert is_closed(found.faces)
    volumes = [float(signed_volumes(surface).sum()) for surface in (found, expected)]
    click.echo(f"volume {volumes[0]:.6f}, on the CPU {volumes[1]:.6f}; faces {len(found.faces)}")


def lump(resolution: int) -> Field:
    """A closed surface with hollows, and a stray part that is dropped."""
    axis = node_coordinates(resolution)
    y, z, x = np.meshgrid(axis, axis, axis, indexing="ij")
    sdf = np.sqrt(x * x + y * y + z * z) - 0.6 + 0.08 * np.sin(9 * x) * np.sin(8 * y + 1) * np.sin(7 * z)
    stray = np.sqrt((x - 0.8) ** 2 + (y - 0.8) ** 2 + (z - 0.8) ** 2) - 0.05
    return Field(np.minimum(sdf, stray).astype(np.float32), np.zeros((*sdf.shape, 3), np.float32))


def timed(name: str, build: Callable[[], Surface], runs: int) -> Surface:
    """The surface; says how long it took, and whether it was the same each time."""
    seconds: list[float] = []
    first: Surface | None = None
    for _ in range(runs + 1):
        started = time.perf_counter()
        surface = build()  # downloaded, so that the device is done
        seconds.append(time.perf_counter() - started)
        first = surface if first is None else first
        if not all(np.array_equal(getattr(first, k), getattr(surface, k)) for k in ("vertices", "faces")):
            raise click.ClickException(f"{name}: another surface than before")
    rest = [1e3 * value for value in seconds[1:]]
    click.echo(
        f"{name:24s} first {1e3 * seconds[0]:7.1f} ms, then {statistics.median(rest):7.1f} ms "
        f"({min(rest):.1f} to {max(rest):.1f})"
    )
    assert first is not None
    return first


if __name__ == "__main__":
    main()
