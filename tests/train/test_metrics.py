"""Every metric against a value known beforehand."""

from pathlib import Path

import numpy as np
import pytest
import trimesh

from train.mesh_metrics import chamfer, inside_voxels, surface_points, volume_iou
from train.metrics import normal_error_deg, psnr, silhouette_iou, ssim, view_metrics
from train.report import markdown, markdown_table, mean_row, record_names, summarize, way_to_ceiling


def box(extents: tuple[float, float, float], centre: tuple[float, float, float]) -> trimesh.Trimesh:
    mesh = trimesh.creation.box(extents=extents)
    mesh.apply_translation(centre)
    return mesh


def test_psnr_of_known_noise() -> None:
    truth = np.full((6, 32, 32, 3), 0.5)
    noise = np.where(np.random.default_rng(0).random(truth.shape) < 0.5, -0.1, 0.1)
    assert psnr(truth + noise, truth) == pytest.approx(20.0)
    assert psnr(truth, truth) == pytest.approx(120.0)


def test_psnr_is_of_all_views_together() -> None:
    truth = np.zeros((6, 8, 8, 3))
    image = truth.copy()
    image[0] = 0.6  # mean squared error 0.06 over the six, not infinite in five of them
    assert psnr(image, truth) == pytest.approx(-10.0 * np.log10(0.06))


def test_ssim_of_constant_images() -> None:
    a, b = 0.25, 0.75
    wanted = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)  # no variance: the luminance term alone
    shape = (2, 24, 24, 3)
    assert ssim(np.full(shape, a), np.full(shape, b)) == pytest.approx(wanted, abs=1e-6)
    assert ssim(np.full(shape, a), np.full(shape, a)) == pytest.approx(1.0)


def test_silhouette_iou_of_shifted_squares() -> None:
    a, b = np.zeros((2, 6, 20, 20), bool)
    a[:, 5:15, 2:12] = True
    b[:, 5:15, 7:17] = True
    assert silhouette_iou(a, b) == pytest.approx(50 / 150)
    assert silhouette_iou(a, np.zeros_like(a)) == 0.0
    assert silhouette_iou(np.zeros_like(a), np.zeros_like(a)) == 1.0


def test_normal_error_of_rotated_normals() -> None:
    rng = np.random.default_rng(1)
    mask = np.ones((6, 4, 4), bool)
    angle = rng.uniform(0.0, 2 * np.pi, (6, 4, 4))
    turn = np.radians(25.0)
    a = np.stack([np.cos(angle), np.sin(angle), np.zeros_like(angle)], axis=-1)
    b = np.stack([np.cos(angle + turn), np.sin(angle + turn), np.zeros_like(angle)], axis=-1)
    assert normal_error_deg(a, b, mask, mask) == pytest.approx(25.0)
    assert np.isnan(normal_error_deg(a, b, mask, ~mask))


def test_normal_error_counts_only_common_pixels() -> None:
    truth = np.zeros((1, 2, 2, 3))
    truth[..., 2] = 1.0
    guess = truth.copy()
    guess[0, 0, 0] = [1.0, 0.0, 0.0]  # 90 degrees off, outside of the true silhouette
    mask = np.ones((1, 2, 2), bool)
    inner = mask.copy()
    inner[0, 0, 0] = False
    assert normal_error_deg(guess, truth, mask, inner) == pytest.approx(0.0)


def test_view_metrics_read_silhouettes_from_normals() -> None:
    color, normal = np.full((6, 16, 16, 3), 0.5), np.zeros((6, 16, 16, 3))
    normal[:, :, :8, 2] = 1.0
    half = normal.copy()
    half[:, 8:] = 0.0
    figures = view_metrics(color, half, color, normal)
    assert figures["silhouette_iou"] == pytest.approx(0.5)
    assert figures["normal_deg"] == pytest.approx(0.0)


def test_chamfer_of_concentric_spheres() -> None:
    truth = trimesh.creation.icosphere(subdivisions=5, radius=1.0)
    mesh = trimesh.creation.icosphere(subdivisions=5, radius=1.3)
    # Longest side 2 becomes 1.  Nearest samples lie a little off the radial direction, hence above.
    assert chamfer(mesh, truth) == pytest.approx(0.15, rel=0.02)
    assert chamfer(mesh, truth) >= 0.15 - 1e-4
    mesh.apply_scale(10.0)
    truth.apply_scale(10.0)
    assert chamfer(mesh, truth) == pytest.approx(0.15, rel=0.02)


def test_chamfer_of_the_truth_itself_is_the_sampling_floor() -> None:
    truth = trimesh.creation.box()
    assert chamfer(truth, truth) == pytest.approx(0.5 * np.sqrt(6 / 10_000), rel=0.1)


def test_surface_points_are_spread_by_area() -> None:
    points = surface_points(box((1.0, 1.0, 3.0), (0.0, 0.0, 0.0)), 4000, seed=0)
    ends = np.isclose(np.abs(points[:, 2]), 1.5)
    assert points.shape == (4000, 3)
    assert ends.mean() == pytest.approx(2 / 14, abs=0.02)


@pytest.mark.parametrize("shift", [(0.5, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.5)])
def test_volume_iou_of_offset_boxes_is_exact(shift: tuple[float, float, float]) -> None:
    # A joint box of 1.5 x 1 x 1 in 48 voxels an axis: half a box is 16 of them.
    assert volume_iou(box((1, 1, 1), shift), box((1, 1, 1), (0, 0, 0))) == pytest.approx(1 / 3)


def test_volume_iou_of_nested_and_distant_boxes() -> None:
    outer = box((1, 1, 1), (0, 0, 0))
    assert volume_iou(box((0.5, 0.5, 0.5), (0, 0, 0)), outer) == pytest.approx(1 / 8)
    assert volume_iou(box((1, 1, 1), (3, 0, 0)), outer) == 0.0
    assert volume_iou(outer, outer) == 1.0


def test_volume_of_a_sphere() -> None:
    sphere = trimesh.creation.icosphere(subdivisions=4)
    inside = inside_voxels(sphere, np.full(3, -1.0), np.full(3, 1.0))
    assert inside.mean() == pytest.approx(np.pi / 6, rel=0.01)


def test_inside_voxels_keep_the_order_of_axes() -> None:
    inside = inside_voxels(box((0.5, 0.25, 0.125), (0.25, 0.125, 0.0625)), np.zeros(3), np.ones(3), 16)
    assert inside.sum() == 8 * 4 * 2
    assert inside[:8, :4, :2].all()


def test_an_open_box_keeps_its_volume() -> None:
    closed = box((1, 1, 1), (0, 0, 0))
    up = closed.face_normals[:, 1] > 0.5
    opened = trimesh.Trimesh(closed.vertices, closed.faces[~up], process=False)
    assert volume_iou(opened, closed) == pytest.approx(1.0)


def test_doubled_faces_do_not_cancel() -> None:
    closed = box((1, 1, 1), (0, 0, 0))
    doubled = trimesh.Trimesh(
        closed.vertices, np.concatenate([closed.faces, closed.faces[:, ::-1]]), process=False
    )
    assert volume_iou(doubled, closed) == pytest.approx(1.0)


def test_a_sheet_has_no_volume_to_compare() -> None:
    sheet = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], [[0, 1, 2], [0, 2, 3]])
    assert np.isnan(volume_iou(box((1, 1, 1), (0, 0, 0)), sheet))


def test_mean_row_skips_what_is_silent() -> None:
    means = mean_row([{"psnr": 10.0, "normal_deg": None}, {"psnr": 20.0, "normal_deg": 30.0}])
    assert means["psnr"] == pytest.approx(15.0)
    assert means["normal_deg"] == pytest.approx(30.0)
    assert means["chamfer"] is None


def test_way_to_ceiling_takes_the_better_baseline_each_column() -> None:
    baselines = [{"psnr": 14.0, "chamfer": 0.10}, {"psnr": 16.0, "chamfer": 0.12}]
    ways = way_to_ceiling({"psnr": 20.0, "chamfer": 0.07}, baselines, {"psnr": 32.0, "chamfer": 0.04})
    assert ways["psnr"] == pytest.approx(25.0)
    assert ways["chamfer"] == pytest.approx(50.0)
    assert ways["ssim"] is None
    assert way_to_ceiling({"psnr": 1.0}, [{"psnr": 9.0}], {"psnr": 9.0})["psnr"] is None


def test_table_drops_empty_columns() -> None:
    table = markdown_table({"model": {"psnr": 21.345, "normal_deg": None}}, {"psnr": 41.6})
    assert table.splitlines()[0] == "| | PSNR dB ↑ |"
    assert "| model | 21.34 |" in table or "| model | 21.35 |" in table
    assert "42 %" in table


def test_record_names_are_flat_and_never_meet(tmp_path: Path) -> None:
    files = [tmp_path / "a.glb", tmp_path / "a.ply", tmp_path / "b" / "model.obj"]
    names = record_names(tmp_path, files)
    assert [names[path] for path in files] == ["a_glb", "a_ply", "b__model"]


def test_summary_names_what_is_left_out_and_what_stands_in() -> None:
    row = {"psnr": 20.0, "chamfer": 0.1, "volume_iou": None}
    record = {
        "rows": {"model": row, "input": row, "ceiling": row},
        "stand_ins": {"input": "no"},
        "seconds": 2,
    }
    settings = {
        "bundle": "b", "profile": "p", "steps": 50, "guidance": 3.0, "seed": 0, "image_px": 256,
    }  # fmt: skip
    summary = summarize(
        {"cup": record, "leaf": {"left_out": "too thin"}}, settings, {"cup": {"category": "tableware"}}
    )
    assert summary["objects"] == 1
    assert "nearest" in summary["left_out_rows"]
    assert summary["stand_ins"]["input"] == ["cup"]
    assert summary["no_volume"] == ["cup"]
    text = markdown(summary)
    assert "object leaf (too thin)" in text and "ellipsoid" in text and "tableware (1)" in text
