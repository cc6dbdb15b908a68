"""Objects for tests, made here."""

import numpy as np
import trimesh

from train.objects import Material, Object, normalized


def cone(color: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Object:
    mesh = trimesh.creation.cone(0.4, 1.5, sections=12)
    return normalized(
        Object(
            name="cone",
            vertices=np.asarray(mesh.vertices, np.float32),
            faces=np.asarray(mesh.faces, np.int32),
            uv=None,
            texture=None,
            vertex_color=None,
            face_material=np.zeros(len(mesh.faces), np.int32),
            materials=(Material(factor=color),),
        )
    )
