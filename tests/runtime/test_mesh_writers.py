"""Files are written whole or not at all, and say what is wrong."""

import os
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image
from trimesh.visual.material import PBRMaterial
from trimesh.visual.texture import TextureVisuals

from uc3d_rt.errors import OutputError
from uc3d_rt.mesh.writers import export_mesh, mesh_format


@pytest.fixture
def mesh() -> trimesh.Trimesh:
    box = trimesh.creation.box()
    uv = np.random.default_rng(0).random((len(box.vertices), 2))
    material = PBRMaterial(baseColorTexture=Image.new("RGB", (8, 8), (200, 10, 10)), metallicFactor=0.0)
    return trimesh.Trimesh(
        box.vertices,
        box.faces,
        vertex_normals=box.vertex_normals,
        visual=TextureVisuals(uv=uv, material=material),
        process=False,
    )


@pytest.mark.parametrize("ending", ["glb", "obj", "ply", "stl"])
def test_export_mesh_round_trip(mesh: trimesh.Trimesh, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"thing.{ending}"
    path.write_text("old")
    export_mesh(mesh, path)
    again = trimesh.load(path, force="mesh")
    assert again.bounds == pytest.approx(mesh.bounds)
    assert len(again.faces) == 12
    if ending in ("glb", "obj"):
        assert isinstance(again.visual, TextureVisuals)
    expected = {f"thing.{ending}"} | ({"thing.mtl", "thing.png"} if ending == "obj" else set())
    assert {p.name for p in tmp_path.iterdir()} == expected


def test_mesh_format_comes_from_the_option_then_the_ending_then_glb() -> None:
    assert mesh_format(Path("a.obj")) == "obj"
    assert mesh_format(Path("a.obj"), "PLY") == "ply"
    assert mesh_format(Path("a")) == "glb"
    with pytest.raises(OutputError, match="glb, obj, ply, stl"):
        mesh_format(Path("a.fbx"))


def test_export_mesh_errors_leave_nothing_behind(
    mesh: trimesh.Trimesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        export_mesh(mesh, tmp_path / "missing" / "a.glb")
    with pytest.raises(OutputError, match="is a folder"):
        export_mesh(mesh, tmp_path)
    target = tmp_path / "a.glb"
    target.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        export_mesh(mesh, target)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.glb"]
