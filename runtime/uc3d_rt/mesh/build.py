"""Field and views to a textured mesh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.device import Device, Scope, uploaded
from uc3d_rt.mesh.surface import FloatArray, Surface, crease_normals, largest_parts, vertex_normals
from uc3d_rt.neus.field import DeviceField, Field, resample

if TYPE_CHECKING:
    import trimesh

Progress = Callable[[int, int], None]

MOST_EXCESS = 5
"""Times the wanted faces that decimation may leave before a coarser grid is used."""


@dataclass(frozen=True)
class MeshOptions:
    """Settings of `build_mesh`."""

    texture: Literal["atlas", "vertex"] = "atlas"
    faces: int = 12_000  # decimation target; 0 = keep every triangle of marching cubes
    texture_px: int = 1024
    crease_deg: float = 25.0  # faces that meet at a larger angle keep their own normals (atlas only)
    min_share: float = 0.02  # parts smaller than this share of the largest part's volume are dropped

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: naming the option, its value and what it may be.
        """
        if self.texture not in ("atlas", "vertex"):
            raise ValueError(f"MeshOptions.texture must be 'atlas' or 'vertex', got {self.texture!r}")
        if self.faces != 0 and self.faces < 100:
            raise ValueError(f"MeshOptions.faces must be 0 (no decimation) or at least 100, got {self.faces}")
        if not 64 <= self.texture_px <= 8192:
            raise ValueError(f"MeshOptions.texture_px must be in [64, 8192], got {self.texture_px}")
        if not 0 < self.crease_deg <= 180:
            raise ValueError(f"MeshOptions.crease_deg must be in (0, 180], got {self.crease_deg}")
        if not 0 < self.min_share <= 1:
            raise ValueError(f"MeshOptions.min_share must be in (0, 1], got {self.min_share}")


def build_mesh(
    field: Field | DeviceField,
    color: FloatArray,
    normal: FloatArray,
    options: MeshOptions | None = None,
    on_progress: Progress | None = None,
    device: Device | None = None,
) -> trimesh.Trimesh:
    """Extract, clean, simplify, unwrap and texture the surface of a field.

    The surface is closed: watertight, edge-manifold and wound outward.  With an atlas, vertices on a
    chart's border or a crease are stored several times, so a reader must merge vertices by position
    (`mesh.merge_vertices(merge_tex=True, merge_norm=True)`) before it asks whether the mesh is closed.

    Args:
        field: from `uc3d_rt.neus.fit.fit`, or of `device`.
        color: (6, H, H, 3) in [0, 1], the target views.
        normal: (6, H, H, 3) unit world normals, zero = background.
        options: settings; None = `MeshOptions()`.
        on_progress: called with (steps done, steps in all).
        device: where the surface is extracted, turned to the normal maps and textured; None = on the CPU.

    Returns:
        A mesh in the field's frame and scale, with smooth vertex normals and either a base colour
        texture (metallic 0, roughness 1) or vertex colours.

    Raises:
        FitError: the field holds no surface that can be closed.
        BackendError: the device failed, for example for want of memory.
    """
    options = options or MeshOptions()
    steps = 4 if options.texture == "atlas" else 3
    report = on_progress or (lambda done, total: None)
    surface = _simple_surface(field, normal, options, lambda: report(1, steps), device)
    normals = vertex_normals(surface)
    report(2, steps)
    if options.texture == "vertex":
        mesh = _vertex_colored(surface, normals, color, normal, device)
    else:
        mesh = _textured(surface, normals, color, normal, options, report, device)
    report(steps, steps)
    return mesh


def _simple_surface(
    field: Field | DeviceField,
    normal: FloatArray,
    options: MeshOptions,
    extracted: Callable[[], None],
    device: Device | None,
) -> Surface:
    """The field's surface, turned to the normal maps, with about the wanted number of faces.

    Views that contradict each other can leave a sponge whose handles no decimation removes, and unwrapping
    hundreds of thousands of faces takes minutes: such a surface is taken from a grid half as fine.
    """
    from uc3d_rt.mesh.simplify import simplify_surface

    while True:
        surface = _refined_surface(field, normal, options.min_share, device)
        extracted()
        surface = simplify_surface(surface, options.faces)
        surface = largest_parts(surface, options.min_share)  # decimation can cut a thin bridge
        coarse = field.sdf.shape[0] // 2
        if not options.faces or len(surface.faces) <= MOST_EXCESS * options.faces or coarse < 32:
            return surface
        if isinstance(field, DeviceField):
            field = field.download()
        field = Field(resample(field.sdf, coarse), resample(field.color, coarse))


def _refined_surface(
    field: Field | DeviceField, normal: FloatArray, min_share: float, device: Device | None
) -> Surface:
    """The field's surface, turned to the normal maps."""
    if device is None:
        from uc3d_rt.mesh.extract import extract_surface
        from uc3d_rt.mesh.refine import refine_surface

        host = field.download() if isinstance(field, DeviceField) else field
        return refine_surface(extract_surface(host, min_share), normal)
    from uc3d_rt.mesh.device_refine import surface_on_device

    with Scope(device) as scope:
        sdf = field.sdf if isinstance(field, DeviceField) else uploaded(scope, field.sdf)
        return surface_on_device(scope, sdf, normal, min_share)


def _vertex_colored(
    surface: Surface, normals: FloatArray, color: FloatArray, normal: FloatArray, device: Device | None
) -> trimesh.Trimesh:
    import trimesh

    if device is None:
        from uc3d_rt.mesh.bake import ProjectedViews, vertex_colors

        colors = vertex_colors(surface, normals, ProjectedViews(surface, color, normal))
    else:
        from uc3d_rt.mesh.device_bake import vertex_colors_on_device

        colors = vertex_colors_on_device(device, surface, normals, color, normal)
    rgba = np.full((len(colors), 4), 255, np.uint8)
    rgba[:, :3] = (colors * 255.0 + 0.5).astype(np.uint8)
    return trimesh.Trimesh(
        surface.vertices,
        surface.faces,
        vertex_normals=normals,
        vertex_colors=rgba,
        process=False,
        validate=False,
    )


def _textured(
    surface: Surface,
    normals: FloatArray,
    color: FloatArray,
    normal: FloatArray,
    options: MeshOptions,
    report: Progress,
    device: Device | None,
) -> trimesh.Trimesh:
    import trimesh
    from PIL import Image
    from trimesh.visual.material import PBRMaterial
    from trimesh.visual.texture import TextureVisuals

    from uc3d_rt.mesh.unwrap import unwrap_surface

    atlas = unwrap_surface(surface, options.texture_px, device)
    report(3, 4)
    texture: NDArray[np.uint8]
    if device is None:
        from uc3d_rt.mesh.bake import ProjectedViews, bake_texture

        views = ProjectedViews(surface, color, normal)
        texture = bake_texture(surface, normals, atlas, views, options.texture_px)
    else:
        from uc3d_rt.mesh.device_bake import bake_texture_on_device

        texture = bake_texture_on_device(device, surface, normals, atlas, color, normal, options.texture_px)
    material = PBRMaterial(
        name="surface", baseColorTexture=Image.fromarray(texture), metallicFactor=0.0, roughnessFactor=1.0
    )
    # A vertex of the file is a point of one chart with one normal.
    group, group_normals = crease_normals(surface, options.crease_deg)
    pairs = atlas.faces.astype(np.int64) * len(group_normals) + group
    split, faces = np.unique(pairs, return_inverse=True)
    point, shading = np.divmod(split, len(group_normals))
    return trimesh.Trimesh(
        surface.vertices[atlas.source[point]],
        faces.reshape(-1, 3),
        vertex_normals=group_normals[shading],
        visual=TextureVisuals(uv=atlas.uv[point], material=material),
        process=False,
        validate=False,
    )
