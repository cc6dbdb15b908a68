"""Objects for tests, made here."""

from dataclasses import replace

import numpy as np
import trimesh

from train.objects import Material, Object, normalized


def thing(
    mesh: trimesh.Trimesh,
    *,
    colors: np.ndarray | None = None,
    factor: tuple[float, float, float] = (1.0, 1.0, 1.0),
    normalise: bool = True,
) -> Object:
    """A mesh as an object, with colours of its vertices (V, 3) or one colour."""
    obj = Object(
        name="thing",
        vertices=np.asarray(mesh.vertices, np.float32),
        faces=np.asarray(mesh.faces, np.int32),
        uv=None,
        texture=None,
        vertex_color=colors,
        face_material=np.zeros(len(mesh.faces), np.int32),
        materials=(Material(factor=factor),),
    )
    return normalized(obj) if normalise else obj


def cone(color: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Object:
    return replace(thing(trimesh.creation.cone(0.4, 1.5, sections=12), factor=color), name="cone")
