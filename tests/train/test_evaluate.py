"""`python -m train evaluate` from end to end, with the tiny bundle on objects made here."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import trimesh
from click.testing import CliRunner, Result
from PIL import Image

from train.__main__ import cli
from train.baselines import (
    INDEX_YAWS_DEG,
    autoencoded,
    copied_input,
    ellipsoid_of,
    image_features,
    placed,
    train_index,
)
from train.objects import load_object
from train.truth import ground_truth
from uc3d_rt.errors import UsageError
from uc3d_rt.mesh.build import MeshOptions
from uc3d_rt.neus.fit_plan import FitOptions
from uc3d_rt.preprocess import frame_object
from uc3d_rt.views import decode_normals, encode_normals

PX = 64  # of the tiny bundle


def save_colored(mesh: trimesh.Trimesh, path: Path, color: tuple[int, int, int]) -> None:
    mesh.visual.vertex_colors = np.tile(np.array([*color, 255], np.uint8), (len(mesh.vertices), 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    mesh.export(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`val/` with a box and a ball, `train/` with two others, and `index.csv`."""
    root = tmp_path_factory.mktemp("objects")
    save_colored(trimesh.creation.box((1.0, 0.6, 0.4)), root / "val" / "box.glb", (200, 60, 40))
    save_colored(trimesh.creation.icosphere(subdivisions=3), root / "val" / "ball.glb", (40, 90, 180))
    save_colored(trimesh.creation.box((0.5, 1.0, 0.5)), root / "train" / "post.glb", (180, 60, 50))
    save_colored(trimesh.creation.cylinder(0.5, 1.0), root / "train" / "can.glb", (50, 90, 170))
    (root / "index.csv").write_text("id,split,category\nbox,val,boxes\nball,val,balls\n", encoding="utf-8")
    return root


def run(bundle: Path, objects: Path, out: Path, *more: str) -> Result:
    arguments = ["evaluate", "--bundle", bundle, "--objects", objects, "--out", out, "--steps", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.evaluator.FitOptions", partial(FitOptions, resolution=32, iterations=(5,)))
        patch.setattr("train.evaluator.MeshOptions", partial(MeshOptions, faces=1000, texture_px=128))
        return CliRunner().invoke(cli, [str(a) for a in (*arguments, *more)])


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory, data: Path, tiny_bundle: Path) -> tuple[Path, Result]:
    """One run over both objects, with meshes and the nearest training object."""
    out = tmp_path_factory.mktemp("evaluation") / "out"
    return out, run(tiny_bundle, data / "val", out)


def test_a_run_writes_every_file(full_run: tuple[Path, Result]) -> None:
    out, result = full_run
    assert result.exit_code == 0, result.output
    assert "[2/2]" in result.output and "min left" in result.output
    summary = json.loads((out / "metrics.json").read_text("utf-8"))
    assert summary["objects"] == 2
    assert set(summary["rows"]) == {"model", "input", "nearest", "ceiling"}
    for row in summary["rows"].values():
        assert 0.0 < row["chamfer"] < 1.0
        assert 0.0 <= row["volume_iou"] <= 1.0
        assert 0.0 < row["psnr"] < 60.0
    assert set(summary["groups"]) == {"balls", "boxes"}
    text = (out / "metrics.md").read_text("utf-8")
    assert "nearest training object" in text and "Chamfer" in text
    assert {p.name for p in (out / "objects").iterdir()} == {"ball.json", "ball.png", "box.json", "box.png"}
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.size == (80 * (2 + 4 * 6), 2 * 2 * 80)


def test_fits_of_true_views_come_close(full_run: tuple[Path, Result]) -> None:
    summary = json.loads((full_run[0] / "metrics.json").read_text("utf-8"))
    assert summary["rows"]["ceiling"]["chamfer"] < 0.04
    assert summary["rows"]["ceiling"]["volume_iou"] > 0.75


def test_done_objects_are_kept(full_run: tuple[Path, Result], data: Path, tiny_bundle: Path) -> None:
    out, _ = full_run
    record = out / "objects" / "ball.json"
    changed = json.loads(record.read_text("utf-8"))
    changed["rows"]["model"]["psnr"] = 55.0
    record.write_text(json.dumps(changed), encoding="utf-8")
    result = run(tiny_bundle, data / "val", out)
    assert result.exit_code == 0, result.output
    assert "[1/" not in result.output
    box = json.loads((out / "objects" / "box.json").read_text("utf-8"))["rows"]["model"]["psnr"]
    summary = json.loads((out / "metrics.json").read_text("utf-8"))
    assert summary["rows"]["model"]["psnr"] == pytest.approx((55.0 + box) / 2)


def test_other_settings_are_refused(full_run: tuple[Path, Result], data: Path, tiny_bundle: Path) -> None:
    result = run(tiny_bundle, data / "val", full_run[0], "--seed", "1")
    assert result.exit_code == 1
    assert "seed: [0] there, [1] now" in result.output


def test_workers_views_alone_and_no_training_folder(tmp_path: Path, data: Path, tiny_bundle: Path) -> None:
    objects = tmp_path / "alone"
    objects.mkdir()
    (objects / "box.glb").write_bytes((data / "val" / "box.glb").read_bytes())
    (objects / "damaged.glb").write_bytes(b"glTF")
    result = run(tiny_bundle, objects, tmp_path / "out", "--no-mesh", "--workers", "2")
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "out" / "metrics.json").read_text("utf-8"))
    assert set(summary["rows"]) == {"model", "input", "ceiling"}
    assert "--train-objects" in summary["left_out_rows"]["nearest"]
    assert list(summary["left_out_objects"]) == ["damaged"]
    text = (tmp_path / "out" / "metrics.md").read_text("utf-8")
    assert "Left out: nearest training object" in text and "Chamfer ↓" not in text


def test_training_on_the_evaluated_objects_is_refused(tmp_path: Path, data: Path, tiny_bundle: Path) -> None:
    result = run(tiny_bundle, data / "val", tmp_path / "o", "--train-objects", str(data / "val"))
    assert result.exit_code == 1
    assert "training folder" in result.output


def test_placed_object_fills_the_true_silhouettes(data: Path) -> None:
    path = data / "val" / "box.glb"
    sample = ground_truth(path, 3, image_px=PX)
    world = placed(load_object(path), sample.object_to_world).vertices
    assert np.linalg.norm(world, axis=1).max() == pytest.approx(0.95, abs=1e-4)
    _, mask = decode_normals(sample.normal[1] / 255.0)  # azimuth 90: z runs to the left
    columns = np.flatnonzero(mask.any(axis=0))
    assert (PX / 2 - columns[0]) / (PX / 2) == pytest.approx(world[:, 2].max(), abs=2 / PX)


def test_copied_input_holds_the_picture_and_its_world_normals(data: Path) -> None:
    path = data / "val" / "ball.glb"
    sample = ground_truth(path, 5, image_px=PX)
    color, normal = copied_input(load_object(path), sample, PX)
    assert (color == frame_object(sample.input_rgba, PX).astype(np.float32) / np.float32(255.0)).all()
    assert (normal == normal[0]).all()
    length = np.linalg.norm(normal[0], axis=-1)
    assert (np.isclose(length, 1.0, atol=1e-3) | (length == 0.0)).all()
    assert (length > 0).mean() == pytest.approx(np.pi / 4 * 0.82**2, abs=0.03)
    e = np.radians(sample.elevation_deg)
    centre = normal[0, PX // 2 - 2 : PX // 2 + 2, PX // 2 - 2 : PX // 2 + 2].mean(axis=(0, 1))
    assert centre @ np.array([0.0, np.sin(e), np.cos(e)]) > 0.99  # what faces the camera


def test_ellipsoid_of_a_silhouette() -> None:
    mask = np.zeros((64, 64), bool)
    mask[8:40, 16:48] = True
    low, high = ellipsoid_of(mask).bounds
    assert high == pytest.approx([0.5, 0.75, 0.5], abs=0.01)
    assert low == pytest.approx([-0.5, -0.25, -0.5], abs=0.01)


def test_autoencoded_reads_views_as_the_runtime_does() -> None:
    color, normal = np.full((6, 8, 8, 3), 0.25, np.float32), np.zeros((6, 8, 8, 3), np.float32)
    normal[:, :, :4, 1] = 1.0
    seen: list[np.ndarray] = []

    def encode(image: np.ndarray) -> dict[str, np.ndarray]:
        seen.append(image)
        return {"latent": image}

    got_color, got_normal = autoencoded(encode, lambda latent: {"image": latent}, color, normal)
    assert np.concatenate(seen)[6].transpose(1, 2, 0) == pytest.approx(encode_normals(normal[0]))
    assert got_normal == pytest.approx(normal, abs=1e-6)
    assert (got_color[:, :, :4] == 0.25).all() and (got_color[:, :, 4:] == 1.0).all()


def test_index_finds_the_turned_object_itself_and_is_kept(tmp_path: Path, data: Path) -> None:
    files = sorted((data / "train").glob("*.glb"))
    asked: list[str] = []
    rows = np.eye(2 * len(INDEX_YAWS_DEG), dtype=np.float32).reshape(2, len(INDEX_YAWS_DEG), -1)

    def compute(missing: list[Path]) -> list[np.ndarray]:
        asked.extend(path.name for path in missing)
        return [rows[files.index(path)] for path in missing]

    cache = tmp_path / "index.npz"
    index = train_index(cache, data / "train", files[:1], "a", compute)
    index = train_index(cache, data / "train", files, "a", compute)
    assert asked == [path.name for path in files]  # each of them once
    near = index.neighbour(data / "train", rows[1, 3], PX)
    assert (near.path, near.yaw_deg) == (files[1], 135.0)
    assert near.similarity == pytest.approx(1.0)
    assert near.views[0].shape == near.views[1].shape == (6, PX, PX, 3)
    train_index(cache, data / "train", files, "another encoder", compute)
    assert len(asked) == 4


@pytest.mark.parametrize("content", [b"", b"no index", b"PK\x03\x04 damaged"])
def test_an_index_of_something_else_is_told_and_kept(tmp_path: Path, data: Path, content: bytes) -> None:
    cache = tmp_path / "index.npz"
    cache.write_bytes(content)
    with pytest.raises(UsageError, match=r"index\.npz is no index"):
        train_index(cache, data / "train", [], "a", lambda missing: [])
    assert cache.read_bytes() == content


def test_image_features_have_unit_length() -> None:
    pictures = [np.full((8, 8, 3), value, np.uint8) for value in (10, 200)]

    def encode(image: np.ndarray) -> dict[str, np.ndarray]:
        return {"tokens": image.reshape(1, 3, -1).transpose(0, 2, 1) + np.float32(0.1)}

    features = image_features(encode, pictures)
    assert features.shape == (2, 3)
    assert np.linalg.norm(features, axis=1) == pytest.approx([1.0, 1.0])
