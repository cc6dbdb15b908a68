"""Quality and time of the fit alone, from ground-truth views of whole objects.

    python benchmarks/fit.py --objects DIR --limit 50 [--device cuda] [--out DIR]

Renders each object's six target views, fits, builds the textured mesh, and measures that mesh:

- IoU: its silhouettes against the given ones, mean over the views;
- normal: mean angle in degrees between its smooth vertex normals and the given normal maps, over the
  pixels where both silhouettes hold;
- Chamfer: mean of both mean nearest distances, 10 000 points each, longest side of the truth = 1; for
  the mesh and for the visual hull that the fit starts from;
- seconds of fit + mesh, the first object run once before to warm up.

Exits with 1 if any mesh is not watertight and consistently wound.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import trimesh
from numpy.typing import NDArray

from train.mesh_metrics import chamfer
from train.metrics import silhouette_iou
from train.objects import Object, find_objects, load_object
from train.render import Scene, View
from uc3d_rt.cuda_device import CudaDevice
from uc3d_rt.device import Device
from uc3d_rt.mesh.build import MeshOptions, build_mesh
from uc3d_rt.mesh.extract import extract_surface
from uc3d_rt.mesh.raster import render_normals
from uc3d_rt.mesh.writers import export_mesh
from uc3d_rt.neus.field import Field
from uc3d_rt.neus.fit import FitOptions, fit
from uc3d_rt.neus.hull import hull_sdf
from uc3d_rt.views import TARGET_CAMERAS, decode_normals

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """One object's figures."""

    name: str
    iou: float
    normal_deg: float
    chamfer: float
    chamfer_hull: float
    fit_s: float
    mesh_s: float
    faces: int
    parts: int
    closed: bool


def target_views(thing: Object, size_px: int) -> tuple[FloatArray, FloatArray]:
    """Ground-truth colour and normals (6, H, H, 3) of the target cameras."""
    with Scene(thing) as scene:
        images = scene.render([View(camera) for camera in TARGET_CAMERAS], size_px)
    normal, _ = decode_normals(images.normal.astype(np.float32) / 255.0)
    return images.color.astype(np.float32) / 255.0, normal


def measure(
    path: Path,
    size_px: int,
    options: FitOptions,
    mesh_options: MeshOptions,
    out: Path | None,
    device: Device | None,
) -> Row:
    """Fit one object and measure the mesh."""
    truth = load_object(path)
    color, normal = target_views(truth, size_px)
    started = time.perf_counter()
    field = fit(color, normal, options, device=device)
    fitted = time.perf_counter()
    mesh = build_mesh(field, color, normal, mesh_options, device=device)
    built = time.perf_counter()
    vertices, faces = np.asarray(mesh.vertices), np.asarray(mesh.faces)
    seen = render_normals(vertices, faces, np.asarray(mesh.vertex_normals), size_px)
    mask, wanted = (seen != 0).any(-1), (normal != 0).any(-1)
    both = mask & wanted
    cosine = np.clip((seen[both] * normal[both]).sum(-1), -1.0, 1.0)
    merged = trimesh.Trimesh(vertices, faces, process=False)
    merged.merge_vertices()  # the atlas stores vertices on chart borders several times
    hull = extract_surface(Field(hull_sdf(wanted, options.resolution), field.color), 1e-6)
    if out is not None:
        export_mesh(mesh, out / f"{path.stem}.glb")
    return Row(
        name=path.stem,
        iou=silhouette_iou(mask, wanted),
        normal_deg=float(np.degrees(np.arccos(cosine)).mean()),
        chamfer=chamfer(mesh, truth),
        chamfer_hull=chamfer(hull, truth),
        fit_s=fitted - started,
        mesh_s=built - fitted,
        faces=len(faces),
        parts=int(merged.body_count),
        closed=bool(merged.is_watertight and merged.is_winding_consistent and merged.volume > 0),
    )


def report(rows: list[Row]) -> dict[str, float]:
    """Print and return the means."""
    seconds = [row.fit_s + row.mesh_s for row in rows]
    means = {
        "objects": len(rows),
        "iou": statistics.fmean(row.iou for row in rows),
        "normal_deg": statistics.fmean(row.normal_deg for row in rows),
        "chamfer": statistics.fmean(row.chamfer for row in rows),
        "chamfer_hull": statistics.fmean(row.chamfer_hull for row in rows),
        "fit_s_median": statistics.median(row.fit_s for row in rows),
        "seconds_median": statistics.median(seconds),
        "seconds_mean": statistics.fmean(seconds),
        "seconds_max": max(seconds),
        "closed": sum(row.closed for row in rows),
    }
    print(
        f"\n{len(rows)} objects: IoU {means['iou']:.4f}  normal {means['normal_deg']:.2f} deg  "
        f"Chamfer {means['chamfer']:.4f} (hull {means['chamfer_hull']:.4f})\n"
        f"fit + mesh: median {means['seconds_median']:.1f} s  mean {means['seconds_mean']:.1f} s  "
        f"max {means['seconds_max']:.1f} s  (fit alone: median {means['fit_s_median']:.2f} s)\n"
        f"watertight and consistently wound: {means['closed']} of {len(rows)}"
    )
    return means


def main() -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--objects", type=Path, required=True, help="folder of GLB/OBJ/PLY files, taken by name"
    )
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--size", type=int, default=256, help="side of the views in pixels")
    parser.add_argument("--out", type=Path, help="folder for the meshes and results.json")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="of the fit and of the surface"
    )
    arguments = parser.parse_args()
    paths = sorted(find_objects(arguments.objects))[: arguments.limit]
    if not paths:
        parser.error(f"no object files in {arguments.objects}")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
    options, mesh_options = FitOptions(), MeshOptions()
    device = CudaDevice() if arguments.device == "cuda" else None
    measure(paths[0], arguments.size, options, mesh_options, None, device)  # compiles
    print(f"{'object':40s}     IoU  normal  Chamfer     hull  fit s mesh s faces parts")
    rows = []
    for path in paths:
        row = measure(path, arguments.size, options, mesh_options, arguments.out, device)
        rows.append(row)
        print(
            f"{row.name[:40]:40s} {row.iou:7.4f} {row.normal_deg:7.2f} {row.chamfer:8.4f} "
            f"{row.chamfer_hull:8.4f} {row.fit_s:6.2f} {row.mesh_s:6.2f} {row.faces:5d} {row.parts:5d}"
            f"{'' if row.closed else '  NOT CLOSED'}",
            flush=True,
        )
    if device is not None:
        device.close()
    means = report(rows)
    if arguments.out is not None:
        text = json.dumps({"means": means, "rows": [asdict(row) for row in rows]}, indent=2)
        (arguments.out / "results.json").write_text(text + "\n", encoding="utf-8")
    return 0 if all(row.closed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
