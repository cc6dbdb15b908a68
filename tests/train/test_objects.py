"""Object files of every kind: geometry normalised, colours and materials kept, errors that say the file."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from PIL import Image

from train.objects import (
    GREY,
    MAX_TEXTURE_PX,
    find_objects,
    joined,
    linear_to_srgb,
    load_object,
    object_name,
    srgb_to_linear,
)
from uc3d_rt.views import BOUNDING_RADIUS


def box(extents: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> trimesh.Trimesh:
    return trimesh.creation.box(extents)


def textured(mesh: trimesh.Trimesh, image: Image.Image, name: str, **material: Any) -> trimesh.Trimesh:
    uv = np.linspace(0.1, 0.9, 2 * len(mesh.vertices)).reshape(-1, 2)
    pbr = trimesh.visual.material.PBRMaterial(name=name, baseColorTexture=image, **material)
    mesh.visual = trimesh.visual.TextureVisuals(uv=uv, material=pbr)
    return mesh


def saved(scene: trimesh.Scene | trimesh.Trimesh, path: Path) -> Path:
    scene.export(path)
    return path


def shifted(x: float) -> np.ndarray:
    """(4, 4) translation along +X."""
    matrix = np.eye(4)
    matrix[0, 3] = x
    return matrix


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a GLB's JSON in place, for what trimesh cannot write."""
    data = path.read_bytes()
    length = struct.unpack("<I", data[12:16])[0]
    header = json.loads(data[20 : 20 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 4)
    rest = data[20 + length :]
    head = struct.pack("<4s2I", b"glTF", 2, 20 + len(text) + len(rest))
    path.write_bytes(head + struct.pack("<I4s", len(text), b"JSON") + text + rest)


def linear_color_of(obj, face: int) -> np.ndarray:
    """A face's linear base colour without texture."""
    color = np.array(obj.materials[obj.face_material[face]].factor)
    if obj.vertex_color is not None:
        color = color * srgb_to_linear(obj.vertex_color[obj.faces[face]] / 255.0).mean(axis=0)
    return color


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply"])
def test_geometry_is_centred_and_scaled(tmp_path: Path, suffix: str) -> None:
    mesh = box((1.0, 2.0, 3.0))
    mesh.apply_translation([10.0, -4.0, 7.0])
    obj = load_object(saved(mesh, tmp_path / f"thing{suffix}"))
    assert obj.name == "thing"
    assert obj.vertices.dtype == np.float32 and obj.faces.dtype == np.int32
    assert obj.faces.shape == (12, 3)
    assert np.linalg.norm(obj.vertices, axis=1).max() == pytest.approx(BOUNDING_RADIUS, abs=1e-5)
    half = np.array([1.0, 2.0, 3.0]) * BOUNDING_RADIUS / np.sqrt(14.0)  # the box in that sphere
    assert obj.vertices.max(axis=0) == pytest.approx(half, abs=1e-5)
    assert obj.vertices.min(axis=0) == pytest.approx(-half, abs=1e-5)


def test_unused_vertices_do_not_move_the_box(tmp_path: Path) -> None:
    path = tmp_path / "stray.obj"
    path.write_text("v 0 0 0\nv 2 0 0\nv 0 2 0\nv 900 900 900\nf 1 2 3\n", encoding="utf-8")
    obj = load_object(path)
    assert len(obj.vertices) == 3
    assert obj.vertices[:, :2].max() == pytest.approx(BOUNDING_RADIUS / np.sqrt(2.0), abs=1e-5)


def test_meshes_of_a_scene_keep_their_places_and_materials(tmp_path: Path) -> None:
    red = textured(box(), Image.new("RGB", (8, 4), (255, 0, 0)), "red")
    dim = textured(box(), Image.new("RGB", (2, 6), (0, 0, 255)), "dim")
    scene = trimesh.Scene()
    scene.add_geometry(red, node_name="a")
    scene.add_geometry(dim, node_name="b", transform=shifted(3.0))
    path = saved(scene, tmp_path / "two.glb")

    def tint(header: dict[str, Any]) -> None:
        (material,) = (m for m in header["materials"] if m["name"] == "dim")
        material["pbrMetallicRoughness"]["baseColorFactor"] = [0.25, 0.002, 1.0, 1.0]

    edit_header(path, tint)
    obj = load_object(path)
    assert obj.faces.shape == (24, 3) and len(obj.materials) == 2
    assert obj.texture is not None and obj.texture.shape == (10, 8, 3)
    centres = obj.vertices[obj.faces].mean(axis=1)
    for face, x in enumerate(centres[:, 0]):
        material = obj.materials[obj.face_material[face]]
        assert material.tile is not None
        tx, ty, tw, th = material.tile
        tile = obj.texture[ty : ty + th, tx : tx + tw]
        want = (255, 0, 0) if x < 0 else (0, 0, 255)
        assert (tile == want).all()
        # 0.002 is not a multiple of 1/255: the factor is the file's own, not a rounded one
        assert material.factor == pytest.approx((1.0, 1.0, 1.0) if x < 0 else (0.25, 0.002, 1.0), abs=1e-6)


def test_a_texture_that_two_meshes_share_is_kept_once(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    scene = trimesh.Scene()
    scene.add_geometry(textured(box(), image, "a", baseColorFactor=[1.0, 0.5, 0.5, 1.0]))
    scene.add_geometry(textured(box(), image, "b"), transform=shifted(2.0))
    obj = load_object(saved(scene, tmp_path / "shared.glb"))
    assert obj.texture is not None and obj.texture.shape == (16, 16, 3)


def test_samplers_are_read(tmp_path: Path) -> None:
    path = saved(textured(box(), Image.new("RGB", (4, 4)), "only"), tmp_path / "s.glb")
    assert load_object(path).materials[0].repeat == (True, True)  # glTF's default

    def clamp(header: dict[str, Any]) -> None:
        header["samplers"] = [{"wrapS": 33071, "wrapT": 10497, "magFilter": 9728}]
        header["textures"][0]["sampler"] = 0

    edit_header(path, clamp)
    material = load_object(path).materials[0]
    assert material.repeat == (False, True) and material.nearest


def test_large_textures_are_reduced(tmp_path: Path) -> None:
    path = saved(textured(box(), Image.new("RGB", (2 * MAX_TEXTURE_PX, 8)), "big"), tmp_path / "big.glb")
    obj = load_object(path)
    assert obj.texture is not None and obj.texture.shape == (4, MAX_TEXTURE_PX, 3)


def test_alpha_counts_only_where_it_masks(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 40))
    masked = textured(box(), image, "m", alphaMode="MASK", alphaCutoff=0.3)
    kept = load_object(saved(masked, tmp_path / "m.glb"))
    assert kept.texture is not None and kept.texture.shape[2] == 4
    assert kept.materials[0].alpha_cutoff == pytest.approx(0.3)
    plain = load_object(saved(textured(box(), image, "o"), tmp_path / "o.glb"))
    assert plain.texture is not None and plain.texture.shape[2] == 3
    assert plain.materials[0].alpha_cutoff == 0.0
    assert (plain.texture == (10, 20, 30)).all()


def test_plain_colors_and_vertex_colors_multiply(tmp_path: Path) -> None:
    mesh = box()
    pbr = trimesh.visual.material.PBRMaterial(name="plain", baseColorFactor=[255, 51, 0, 255])
    mesh.visual = trimesh.visual.TextureVisuals(material=pbr)
    plain = load_object(saved(mesh, tmp_path / "plain.glb"))
    assert plain.texture is None and plain.uv is None
    assert linear_color_of(plain, 3) == pytest.approx([1.0, 0.2, 0.0], abs=1e-6)
    mesh.visual = trimesh.visual.TextureVisuals(material=pbr)
    mesh.visual.vertex_attributes["color"] = np.tile(np.array([128, 255, 255, 255], np.uint8), (8, 1))
    both = load_object(saved(mesh, tmp_path / "both.glb"))
    assert linear_color_of(both, 3) == pytest.approx([128 / 255, 0.2, 0.0], abs=0.01)


def test_vertex_colors_are_srgb_in_ply_and_linear_in_gltf(tmp_path: Path) -> None:
    mesh = box()
    mesh.visual.vertex_colors = np.tile([128, 64, 255, 255], (8, 1))
    ply = load_object(saved(mesh, tmp_path / "c.ply"))
    assert ply.vertex_color is not None and (ply.vertex_color == (128, 64, 255)).all()
    glb = load_object(saved(mesh, tmp_path / "c.glb"))
    assert linear_color_of(glb, 0) == pytest.approx(np.array([128, 64, 255]) / 255.0, abs=0.01)


def test_face_colors(tmp_path: Path) -> None:
    mesh = box()
    colors = np.zeros((12, 4), np.uint8)
    colors[:, 0], colors[:, 3] = np.arange(12) * 20, 255
    mesh.visual = trimesh.visual.ColorVisuals(mesh, face_colors=colors)
    obj = load_object(saved(mesh, tmp_path / "f.ply"))
    assert obj.vertex_color is not None
    shown = sorted(obj.vertex_color[obj.faces[:, 0], 0].tolist())
    assert shown == [20 * i for i in range(12)]


def test_materials_of_obj_files(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / "map.png")
    (tmp_path / "m.mtl").write_text(
        "newmtl plain\nKd 0.5 0.25 1.0\nnewmtl mapped\nKd 0 0 0\nmap_Kd map.png\n", encoding="utf-8"
    )
    (tmp_path / "m.obj").write_text(
        "mtllib m.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nvt 0 0\nvt 1 0\nvt 0 1\n"
        "usemtl plain\nf 1/1 2/2 3/3\nusemtl mapped\nf 1/1 3/2 4/3\n",
        encoding="utf-8",
    )
    obj = load_object(tmp_path / "m.obj")
    by_map = {material.tile is not None: material for material in obj.materials}
    assert linear_to_srgb(np.array(by_map[False].factor)) == pytest.approx([0.5, 0.25, 1.0], abs=0.003)
    assert by_map[True].factor == (1.0, 1.0, 1.0)
    assert obj.texture is not None and (obj.texture == (9, 8, 7)).all()


def test_no_color_is_grey(tmp_path: Path) -> None:
    path = tmp_path / "grey.ply"
    path.write_text(
        "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
        "element face 1\nproperty list uchar int vertex_indices\nend_header\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n",
        encoding="utf-8",
    )
    obj = load_object(path)
    assert obj.texture is None and obj.uv is None and obj.vertex_color is None
    assert linear_to_srgb(linear_color_of(obj, 0)) * 255.0 == pytest.approx(GREY, abs=0.01)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.glb", b""),
        ("noise.glb", b"glTF" + bytes(range(200))),
        ("empty.obj", b""),
        ("flat.obj", b"v 1 1 1\nv 1 1 1\nv 2 2 2\nf 1 2 3\n"),
        ("nan.obj", b"v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"),
        ("points.obj", b"v 0 0 0\nv 1 0 0\n"),
        ("noise.ply", b"ply\nnonsense"),
    ],
)
def test_files_without_a_surface_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.") + r".*(remove|repair)"):
        load_object(path)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing"):
        load_object(tmp_path / "no.glb")
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match="no object file"):
        load_object(tmp_path / "notes.txt")


def test_find_objects_sorts_by_relative_path(tmp_path: Path) -> None:
    for name in ("b/2.GLB", "b/10.obj", "a.ply", "c.txt", "b/c/z.gltf"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [p.relative_to(tmp_path).as_posix() for p in find_objects(tmp_path)]
    assert found == ["a.ply", "b/10.obj", "b/2.GLB", "b/c/z.gltf"]
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="void holds no object"):
        find_objects(tmp_path / "void")
    with pytest.raises(ValueError, match="no folder"):
        find_objects(tmp_path / "absent")


def test_generic_names_take_their_folder() -> None:
    assert object_name(Path("x/chair.glb")) == "chair"
    assert object_name(Path("gso/Blue_Jar/meshes/model.obj")) == "Blue_Jar/meshes/model"


def test_joined_fills_missing_attributes(tmp_path: Path) -> None:
    plain = load_object(saved(box(), tmp_path / "a.ply"))
    mapped = load_object(saved(textured(box(), Image.new("RGB", (4, 4)), "t"), tmp_path / "b.glb"))
    both = joined([plain, mapped], "both")
    assert both.uv is not None and both.uv.shape == (len(both.vertices), 2)
    assert both.faces.max() == len(both.vertices) - 1
    assert len(both.face_material) == len(both.faces) and both.face_material.max() == len(both.materials) - 1


def test_srgb_round_trip() -> None:
    values = np.arange(256) / 255.0
    assert linear_to_srgb(srgb_to_linear(values)) == pytest.approx(values, abs=1e-9)
    assert srgb_to_linear(np.array(0.5)) == pytest.approx(0.21404114, abs=1e-7)  # IEC 61966-2-1
