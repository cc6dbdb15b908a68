"""Quality and time of the fit alone, from ground-truth views of whole objects.

    python benchmarks/fit.py --objects DIR --limit 50 [--device cuda] [--peers] [--out DIR]
    python benchmarks/fit.py --objects DIR --limit 50 --spread --save-views views.npz
    python benchmarks/fit.py --views views.npz --device cuda --peers
    python benchmarks/fit.py --views views.npz --seeds 4

Renders each object's six target views, or takes them from a file that --save-views wrote, which needs
neither the objects nor the renderer and gives the same figures; fits, builds the textured mesh, and
measures that mesh:

- IoU: its silhouettes against the given ones, mean over the views;
- normal: mean angle in degrees between its smooth vertex normals and the given normal maps, over the
  pixels where both silhouettes hold;
- Chamfer: mean of both mean nearest distances, 10 000 points each, longest side of the truth = 1; for
  the mesh and for the visual hull that the fit starts from;
- seconds of fit + mesh, the first object run once before to warm up.

--peers measures others on the same views in the same run: the fit on the CPU, where --device is a GPU
("cpu"), and NeuS with networks in place of the grid (`neus_reference.py`, by PyTorch, on the same kind of
device), once with a mesh of its own, marching cubes and the network's normals, and once with our mesh of
its field ("networks"); both, unless one is named.

--seeds N fits each object N times, which shows how much of a difference between two runs is chance: the
means over the objects by seed, then their mean and standard deviation over the seeds.

Exits with 1 if any mesh of ours is not watertight and consistently wound.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import trimesh
from numpy.typing import NDArray

from benchmarks.ground_truth import GroundTruth, chosen, load_truths, rendered_truth, save_truths
from train.mesh_metrics import chamfer_to_points
from train.metrics import normal_error_deg, silhouette_iou
from uc3d_rt.cuda_device import CudaDevice
from uc3d_rt.device import Scope
from uc3d_rt.mesh.build import MeshOptions, build_mesh
from uc3d_rt.mesh.extract import extract_surface
from uc3d_rt.mesh.raster import render_normals
from uc3d_rt.mesh.writers import export_mesh
from uc3d_rt.neus.device_fit import fit_on_device
from uc3d_rt.neus.field import DeviceField, Field
from uc3d_rt.neus.fit import fit
from uc3d_rt.neus.fit_plan import FitOptions
from uc3d_rt.neus.hull import hull_sdf

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Built:
    """One mesh of an object, and what it took."""

    by: str
    mesh: trimesh.Trimesh
    fit_s: float
    mesh_s: float
    iterations: int


Builder = Callable[[FloatArray, FloatArray], list[Built]]
"""Colour and normals (6, H, H, 3) to meshes."""


@dataclass(frozen=True)
class Row:
    """One mesh's figures."""

    name: str
    by: str
    iou: float
    normal_deg: float
    chamfer: float
    chamfer_hull: float
    fit_s: float
    mesh_s: float
    iterations: int
    faces: int
    parts: int
    closed: bool


def our_builder(
    by: str, options: FitOptions, mesh_options: MeshOptions, device: CudaDevice | None
) -> Builder:
    """The runtime's fit and mesh on a device; None = the CPU."""

    def build(color: FloatArray, normal: FloatArray) -> list[Built]:
        with ExitStack() as opened:
            started = time.perf_counter()
            if device is None:
                field: Field | DeviceField = fit(color, normal, options)
                scope = None
            else:
                scope = opened.enter_context(Scope(device))
                field = fit_on_device(scope, color, normal, options)
            fitted = time.perf_counter()
            mesh = build_mesh(field, color, normal, mesh_options, device=scope)
            built = time.perf_counter()
        iterations = options.total_iterations
        return [Built(by, mesh, fitted - started, built - fitted, iterations)]

    return build


def measure(truth: GroundTruth, builders: list[Builder], hull_nodes: int, out: Path | None) -> Iterator[Row]:
    """Build all meshes of one object and measure them.

    Args:
        truth: the object.
        builders: what makes them.
        hull_nodes: resolution of the visual hull that is measured beside.
        out: folder for the meshes; the first one's name is the object's alone.
    """
    color, normal = truth.color, truth.normal
    points = truth.surface_points
    wanted = (normal != 0).any(-1)
    hull_field = Field(hull_sdf(wanted, hull_nodes), np.zeros((hull_nodes,) * 3 + (3,), np.float32))
    chamfer_hull = chamfer_to_points(extract_surface(hull_field, 1e-6), points, truth.longest)
    for index, built in enumerate(built for build in builders for built in build(color, normal)):
        mesh = built.mesh
        vertices, faces = np.asarray(mesh.vertices), np.asarray(mesh.faces)
        seen = render_normals(vertices, faces, np.asarray(mesh.vertex_normals), normal.shape[1])
        mask = (seen != 0).any(-1)
        merged = trimesh.Trimesh(vertices, faces, process=False)
        merged.merge_vertices()  # the atlas stores vertices on chart borders several times
        if out is not None:
            export_mesh(mesh, out / (f"{truth.name}-{built.by}.glb" if index else f"{truth.name}.glb"))
        yield Row(
            name=truth.name,
            by=built.by,
            iou=silhouette_iou(mask, wanted),
            normal_deg=normal_error_deg(seen, normal, mask, wanted),
            chamfer=chamfer_to_points(mesh, points, truth.longest),
            chamfer_hull=chamfer_hull,
            fit_s=built.fit_s,
            mesh_s=built.mesh_s,
            iterations=built.iterations,
            faces=len(faces),
            parts=int(merged.body_count),
            closed=bool(merged.is_watertight and merged.is_winding_consistent and merged.volume > 0),
        )


def means_of(rows: list[Row]) -> dict[str, float]:
    """Means and medians of rows."""
    seconds = [row.fit_s + row.mesh_s for row in rows]
    return {
        "objects": len(rows),
        "iou": statistics.fmean(row.iou for row in rows),
        "normal_deg": statistics.fmean(row.normal_deg for row in rows),
        "chamfer": statistics.fmean(row.chamfer for row in rows),
        "chamfer_hull": statistics.fmean(row.chamfer_hull for row in rows),
        "fit_s_median": statistics.median(row.fit_s for row in rows),
        "seconds_median": statistics.median(seconds),
        "seconds_mean": statistics.fmean(seconds),
        "seconds_max": max(seconds),
        "iterations": rows[0].iterations,
        "closed": sum(row.closed for row in rows),
    }


def over_seeds(means: list[dict[str, float]]) -> dict[str, float]:
    """Mean and sample standard deviation over seeds of the objects' means, two seeds or more."""
    found: dict[str, float] = {"seeds": len(means)}
    for key in ("iou", "normal_deg", "chamfer"):
        values = [mean[key] for mean in means]
        found[key], found[f"{key}_sd"] = statistics.fmean(values), statistics.stdev(values)
    return found


def report(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Print and return the means, by what built the meshes; the first is ours."""
    names = list(dict.fromkeys(row.by for row in rows))
    means = {by: means_of([row for row in rows if row.by == by]) for by in names}
    own = means[names[0]]
    print(
        f"\n{own['objects']} objects: IoU {own['iou']:.4f}  normal {own['normal_deg']:.2f} deg  "
        f"Chamfer {own['chamfer']:.4f} (hull {own['chamfer_hull']:.4f})\n"
        f"fit + mesh: median {own['seconds_median']:.1f} s  mean {own['seconds_mean']:.1f} s  "
        f"max {own['seconds_max']:.1f} s  (fit alone: median {own['fit_s_median']:.3f} s)\n"
        f"watertight and consistently wound: {own['closed']} of {own['objects']}"
    )
    if len(names) > 1:
        print(
            f"\n{'':18s}     IoU  normal  Chamfer iterations      fit s  fit + mesh s  "
            f"fit / {names[0]}'s  closed"
        )
    for by, mean in means.items() if len(names) > 1 else ():
        print(
            f"{by:18s} {mean['iou']:7.4f} {mean['normal_deg']:7.2f} {mean['chamfer']:8.4f} "
            f"{mean['iterations']:10d} {mean['fit_s_median']:10.3f} {mean['seconds_median']:13.3f} "
            f"{mean['fit_s_median'] / own['fit_s_median']:{len(names[0]) + 9}.1f} {mean['closed']:7d}"
        )
    seeds = [mean for by, mean in means.items() if " seed " in by]
    if seeds:
        means["seeds"] = found = over_seeds(seeds)
        print(
            f"\n{found['seeds']} seeds: IoU {found['iou']:.5f} +- {found['iou_sd']:.5f}  "
            f"normal {found['normal_deg']:.3f} +- {found['normal_deg_sd']:.3f} deg  "
            f"Chamfer {found['chamfer']:.5f} +- {found['chamfer_sd']:.5f}"
        )
    return means


def parsed() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--objects", type=Path, help="folder of GLB/OBJ/PLY files, taken by name")
    source.add_argument("--views", type=Path, help="file of --save-views instead")
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--spread", action="store_true", help="evenly spaced objects, not the first ones")
    parser.add_argument("--size", type=int, default=256, help="side of the views in pixels; of --objects")
    parser.add_argument("--resolution", type=int, default=160, help="nodes along an axis, of all fits")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="fit with seeds 0 to N - 1")
    parser.add_argument("--save-views", type=Path, help="write the views here (.npz), measure nothing")
    parser.add_argument("--out", type=Path, help="folder for the meshes and results.json")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="of the fit and of the surface"
    )
    parser.add_argument(
        "--peers", nargs="?", choices=["all", "cpu", "networks"], const="all", help="measure others beside"
    )
    peers = parser.add_argument_group("of the networks, with --peers")
    peers.add_argument("--reference-iterations", type=int, default=1000)
    peers.add_argument("--reference-rays", type=int, default=512)
    peers.add_argument("--reference-samples", type=int, default=64, help="stratified; as many follow")
    peers.add_argument("--reference-width", type=int, default=256, help="of hidden layers")
    peers.add_argument("--tf32", action="store_true", help="TF32 in their matrix products")
    arguments = parser.parse_args()
    if arguments.limit < 1:
        parser.error(f"--limit must be at least 1, got {arguments.limit}")
    if arguments.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {arguments.seeds}")
    if arguments.peers == "cpu" and arguments.device == "cpu":
        parser.error("--peers cpu measures the CPU beside a GPU; add --device cuda")
    return arguments


def truths_of(arguments: argparse.Namespace) -> Iterator[GroundTruth]:
    """The objects that the arguments name."""
    if arguments.views is not None:
        yield from load_truths(arguments.views, arguments.limit, arguments.spread)
        return
    from train.objects import find_objects

    paths = sorted(find_objects(arguments.objects))
    for index in chosen(len(paths), arguments.limit, arguments.spread):
        yield rendered_truth(paths[index], arguments.size)


def peers_of(arguments: argparse.Namespace, options: FitOptions, mesh_options: MeshOptions) -> list[Builder]:
    """What is measured beside ours, warmed up but for compiled code that depends on the views."""
    wanted = arguments.device == "cuda" and arguments.peers in ("all", "cpu")
    on_cpu = [our_builder("fit-cpu", options, mesh_options, None)] if wanted else []
    if arguments.peers == "cpu":
        return on_cpu
    import torch

    from benchmarks.neus_reference import ReferenceOptions, fit_reference

    reference = ReferenceOptions(
        iterations=arguments.reference_iterations,
        rays=arguments.reference_rays,
        samples=arguments.reference_samples,
        importance_samples=arguments.reference_samples,
        width=arguments.reference_width,
        resolution=options.resolution,
        tf32=arguments.tf32,
    )
    warm = arguments.device == "cuda"
    where = torch.cuda.get_device_name() if warm else "CPU"
    products = ", products in TF32" if reference.tf32 and warm else ""
    print(f"networks: {reference.iterations} iterations of {reference.rays} rays on {where}, fp32{products}")

    def networks(color: FloatArray, normal: FloatArray) -> list[Built]:
        nonlocal warm
        if warm:
            fit_reference(color, normal, replace(reference, iterations=3), arguments.device)
            warm = False
        found = fit_reference(color, normal, reference, arguments.device)
        own = Built("networks", found.mesh, found.fit_s, found.mesh_s, found.iterations)
        started = time.perf_counter()
        mesh = build_mesh(found.field, color, normal, mesh_options)
        return [own, replace(own, by="networks-our-mesh", mesh=mesh, mesh_s=time.perf_counter() - started)]

    return [*on_cpu, networks]


def main() -> int:
    """Parse, run, print."""
    arguments = parsed()
    if arguments.save_views is not None:
        truths = list(truths_of(arguments))
        save_truths(truths, arguments.save_views)
        print(f"{len(truths)} objects, {arguments.save_views.stat().st_size / 2**20:.1f} MiB")
        return 0
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
    options, mesh_options = FitOptions(resolution=arguments.resolution), MeshOptions()
    device = None
    if arguments.device == "cuda":
        device = CudaDevice()
    by = f"fit-{arguments.device}"
    builders = [
        our_builder(
            f"{by} seed {seed}" if arguments.seeds > 1 else by,
            replace(options, seed=seed),
            mesh_options,
            device,
        )
        for seed in range(arguments.seeds)
    ]
    peers = peers_of(arguments, options, mesh_options) if arguments.peers else []
    rows: list[Row] = []
    for truth in truths_of(arguments):
        if not rows:
            for build in [*builders[:1], *(peers if arguments.peers == "cpu" else peers[:-1])]:
                build(truth.color, truth.normal)  # compiles
            print(f"{'object':40s}     IoU  normal  Chamfer     hull   fit s mesh s faces parts  by")
        for row in measure(truth, [*builders, *peers], options.resolution, arguments.out):
            rows.append(row)
            print(
                f"{row.name[:40]:40s} {row.iou:7.4f} {row.normal_deg:7.2f} {row.chamfer:8.4f} "
                f"{row.chamfer_hull:8.4f} {row.fit_s:7.2f} {row.mesh_s:6.2f} {row.faces:5d} {row.parts:5d}  "
                f"{row.by}{'' if row.closed else '  NOT CLOSED'}",
                flush=True,
            )
    if device is not None:
        device.close()
    means = report(rows)
    if arguments.out is not None:
        text = json.dumps({"means": means, "rows": [asdict(row) for row in rows]}, indent=2)
        (arguments.out / "results.json").write_text(text + "\n", encoding="utf-8")
    return 0 if all(row.closed for row in rows if row.by.startswith(by)) else 1


if __name__ == "__main__":
    sys.exit(main())
