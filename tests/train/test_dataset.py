"""Variants and evaluation samples: shapes, determinism, and that images agree with one another."""

from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

from train import dataset
from train.dataset import (
    render_folder,
    render_variant,
    variant_rng,
)
from train.objects import Object, find_objects, load_object
from train.render import Scene, View
from train.truth import ground_truth
from uc3d_rt.preprocess import FILL, frame_object
from uc3d_rt.views import TARGET_CAMERAS, Camera, decode_normals

PX = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("objects")
    for k in range(4):
        mesh = trimesh.creation.icosphere(subdivisions=2)
        mesh.apply_scale([1.0, 0.5 + 0.2 * k, 0.7])
        mesh.vertices[:, 0] += 0.3 * mesh.vertices[:, 1] ** 2
        colors = np.full((len(mesh.vertices), 4), 255, np.uint8)
        colors[:, k % 3] = 60
        mesh.visual.vertex_colors = colors
        mesh.export(root / f"object{k}.ply")
    return root


def test_variant_shapes_and_framing(folder: Path) -> None:
    with Scene(load_object(folder / "object1.ply")) as scene:
        variant = render_variant(scene, np.random.default_rng(0), 3, image_px=PX)
    assert variant.color.shape == variant.normal.shape == (6, PX, PX, 3)
    assert variant.color.dtype == variant.normal.dtype == torch.uint8
    assert variant.inputs.shape == (3, PX, PX, 3) and variant.inputs.dtype == torch.uint8
    assert variant.focal.shape == variant.elevation_deg.shape == (3,)
    for image in variant.inputs.numpy():
        dark = (image < 250).any(axis=-1)
        longer = max(dark.any(axis=0).sum(), dark.any(axis=1).sum())
        assert longer == pytest.approx(FILL * PX, abs=2.1)


def test_color_and_normal_agree_on_the_silhouette(folder: Path) -> None:
    with Scene(load_object(folder / "object0.ply")) as scene:
        variant = render_variant(scene, np.random.default_rng(4), 1, image_px=PX)
    for color, normal, camera in zip(variant.color, variant.normal, TARGET_CAMERAS, strict=True):
        normals, mask = decode_normals(normal.numpy() / 255.0)
        assert not (color.numpy()[~mask] < 100).any()
        a = np.radians(camera.azimuth_deg)
        towards = normals @ np.array([np.sin(a), 0.0, np.cos(a)])
        assert towards[mask].min() > -0.02  # every visible surface faces its camera


def test_input_is_the_object_at_azimuth_zero(folder: Path) -> None:
    """Without augmentation, an orthographic input at elevation 0 is the mirror of azimuth 180."""
    sample = ground_truth(folder / "object2.ply", 5, image_px=PX)
    obj = load_object(folder / "object2.ply")
    with Scene(obj) as scene:
        front, behind = scene.render(
            [View(Camera(0.0), sample.object_to_world), View(Camera(180.0), sample.object_to_world)], PX
        ).alpha
        targets = scene.render([View(c, sample.object_to_world) for c in TARGET_CAMERAS], PX, samples=3)
    assert (np.abs(front.astype(int) - behind[:, ::-1]) > 64).mean() < 0.01
    assert (targets.color == sample.color).all() and (targets.normal == sample.normal).all()


def test_ground_truth_is_framed_and_named(folder: Path) -> None:
    sample = ground_truth(folder / "object3.ply", 0, image_px=PX, input_px=128)
    again = ground_truth(folder / "object3.ply", 0, image_px=PX, input_px=128)
    other = ground_truth(folder / "object3.ply", 1, image_px=PX, input_px=128)
    assert sample.input_rgba.shape == (128, 128, 4) and sample.color.shape == (6, PX, PX, 3)
    assert (sample.input_rgba == again.input_rgba).all() and sample.yaw_deg == again.yaw_deg
    assert sample.yaw_deg != other.yaw_deg
    alpha = sample.input_rgba[..., 3]
    assert alpha[0].max() == alpha[-1].max() == alpha[:, 0].max() == alpha[:, -1].max() == 0
    assert frame_object(sample.input_rgba, PX).shape == (PX, PX, 3)
    matrix = sample.object_to_world[:, :3]
    scale = np.linalg.det(matrix) ** (1 / 3)
    assert matrix @ matrix.T == pytest.approx(scale**2 * np.eye(3), abs=1e-5)  # a turn and nothing else


def stream(
    folder: Path, workers: int, seed: int = 3, order: int = 1
) -> dict[tuple[str, int], dataset.Variant]:
    paths = find_objects(folder)[::order]
    found = render_folder(paths, "cpu", 2, 1, seed, workers, image_px=32, samples=1)
    return {(paths[i].name, v): variant for i, v, variant in found}


def test_the_order_of_work_does_not_matter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "subject", lambda own, rng, other: own)  # a partner depends on the list
    one, three = stream(folder, 1), stream(folder, 3, order=-1)
    assert one.keys() == three.keys() and len(one) == 8
    for key, variant in one.items():
        assert torch.equal(variant.color, three[key].color) and torch.equal(variant.normal, three[key].normal)
        assert (variant.inputs == three[key].inputs).all() and (variant.focal == three[key].focal).all()
    first, second = one[("object0.ply", 0)], one[("object0.ply", 1)]
    assert not torch.equal(first.color, second.color)
    assert not torch.equal(first.color, stream(folder, 1, seed=4)[("object0.ply", 0)].color)


def test_changed_objects_are_part_of_the_stream(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = stream(folder, 2)
    for key, variant in stream(folder, 3).items():
        assert torch.equal(variant.color, mixed[key].color) and (variant.inputs == mixed[key].inputs).all()
    drawn: list[bool] = []
    real = dataset.subject

    def watched(own: Object, rng: np.random.Generator, other: object) -> Object:
        shown = real(own, rng, other)  # type: ignore[arg-type]
        drawn.append(shown is not own)
        return shown

    monkeypatch.setattr(dataset, "subject", watched)
    stream(folder, 1)
    assert len(drawn) == 8 and any(drawn)
    drawn.clear()
    list(render_folder(find_objects(folder), "cpu", 2, 1, 3, 1, image_px=32, samples=1, augment=False))
    assert not drawn


def test_stream_is_in_order_and_reports(folder: Path) -> None:
    paths = find_objects(folder)
    told: list[tuple[int, int]] = []
    found = render_folder(
        paths, "cpu", 2, 1, 0, 2, lambda done, total: told.append((done, total)), image_px=32, samples=1
    )
    assert [(i, v) for i, v, _ in found] == [(i, v) for i in range(4) for v in range(2)]
    assert told == [(k, 4) for k in range(1, 5)]


def test_a_stream_can_be_left_early(folder: Path) -> None:
    found = render_folder(find_objects(folder), "cpu", 2, 1, 0, 2, image_px=32, samples=1)
    next(found)
    found.close()  # type: ignore[attr-defined]  # generators have it


def test_a_broken_file_is_named(folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.obj"
    bad.write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad\.obj"):
        list(render_folder([*find_objects(folder), bad], "cpu", 1, 1, 0, 2, image_px=32, samples=1))
    with pytest.raises(ValueError, match="at least one"):
        list(render_folder([], "cpu"))


def test_a_sheet_edge_on_is_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sheet.obj"
    path.write_text("v 0 0 0\nv 0 0 1\nv 0 1 1\nv 0 1 0\nf 1 2 3 4\n", encoding="utf-8")
    edge_on = {"left": 1}
    original = dataset.random_variation

    def first_edge_on(vertices, rng):
        variation = original(vertices, rng)
        if edge_on["left"]:
            edge_on["left"] -= 1
            placement = np.eye(3, 4, dtype=np.float32)  # in the plane x = 0: invisible from azimuth 0
            return dataset.Variation(placement, variation.color_matrix, variation.brightness)
        return variation

    monkeypatch.setattr(dataset, "random_variation", first_edge_on)
    monkeypatch.setattr(dataset, "random_input_camera", lambda rng: Camera(0.0))
    ((_, _, variant),) = render_folder([path], "cpu", 1, 1, 0, 1, image_px=32)
    assert edge_on["left"] == 0 and (variant.inputs < 250).any()


def test_variant_rng_depends_on_all_it_names() -> None:
    different = ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (0, "a", 0, 1))
    draws = {variant_rng(*arguments).random() for arguments in different}
    assert len(draws) == 5
    assert variant_rng(0, "a", 0).random() in draws


@pytest.mark.gpu
def test_targets_stay_on_the_cuda_device(folder: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    cuda = list(render_folder(find_objects(folder), "cuda:0", 2, 1, 0, 2, image_px=PX))
    cpu = list(render_folder(find_objects(folder), "cpu", 2, 1, 0, 2, image_px=PX))
    for (_, _, got), (_, _, want) in zip(cuda, cpu, strict=True):
        assert got.color.is_cuda and got.normal.is_cuda
        assert (got.color.cpu().int() - want.color.int()).abs().float().mean() < 0.5
        assert (got.normal.cpu().int() - want.normal.int()).abs().float().mean() < 0.5
        assert got.inputs.is_cuda and (got.inputs.cpu().int() - want.inputs.int()).abs().float().mean() < 0.5
