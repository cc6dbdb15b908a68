"""The viewpoint protocol's geometry: true views of one object from several azimuths agree with each other."""

from dataclasses import replace

import numpy as np
import pytest
import trimesh

from tests.train.shapes import thing
from train.baselines import placed
from train.evaluator import true_pair
from train.metrics import view_metrics
from train.objects import Object
from train.truth import EvalSample
from train.viewpoint import (
    between,
    coinciding,
    input_azimuths,
    mean_and_spread,
    mesh_agreement,
    samples_around,
    view_agreement,
)

PX = 96


@pytest.fixture(scope="module")
def handed() -> Object:
    """A post with an arm to one side and a longer one to another: no turn or mirror maps it to itself."""
    parts = [
        trimesh.creation.box((0.3, 1.2, 0.3)),
        trimesh.creation.box((0.7, 0.25, 0.25)).apply_translation((0.45, 0.3, 0.0)),
        trimesh.creation.box((0.2, 0.2, 0.9)).apply_translation((0.0, -0.2, 0.5)),
    ]
    colors = np.repeat(np.array([[230, 50, 25], [25, 100, 230], [50, 200, 75]], np.uint8), 8, axis=0)
    return replace(thing(trimesh.util.concatenate(parts), colors=colors), name="post")


@pytest.fixture(scope="module")
def around(handed: Object) -> list[EvalSample]:
    return list(samples_around(handed, 0, 6, PX))


def test_which_inputs_share_target_cameras() -> None:
    assert input_azimuths(4) == (0.0, 90.0, 180.0, 270.0)
    assert coinciding(4) == [(0, 2, 3), (1, 3, 3)]  # opposite inputs alone
    assert coinciding(3) == [(0, 1, 2), (0, 2, 4), (1, 2, 2)]
    assert len(coinciding(6)) == 15 and len(coinciding(16)) == 8 and len(coinciding(12)) == 30
    assert coinciding(5) == []


def test_true_views_of_all_inputs_agree(around: list[EvalSample]) -> None:
    """As rendered; what is left is sampling where the frames' scales differ."""
    views, placements = [true_pair(s) for s in around], [s.object_to_world for s in around]
    assert np.ptp([np.cbrt(np.linalg.det(p[:, :3])) for p in placements]) > 1e-3  # so views are resampled
    found = view_agreement(views, placements, lambda a, b: view_metrics(*a, *b))
    assert found["psnr"] > 27 and found["silhouette_iou"] > 0.95 and found["normal_deg"] < 4


@pytest.mark.parametrize("wrong", ["order", "normals"])
def test_views_in_a_wrong_frame_do_not(around: list[EvalSample], wrong: str) -> None:
    opposite = around[0], around[3]
    views, placements = [true_pair(s) for s in opposite], [s.object_to_world for s in opposite]
    color, normal = views[0]
    if wrong == "order":  # the targets turned on by a step
        views[0] = np.roll(color, 1, axis=0), np.roll(normal, 1, axis=0)
    else:
        views[0] = color, normal * np.array([-1.0, 1.0, 1.0], np.float32)
    found = view_agreement(views, placements, lambda a, b: view_metrics(*a, *b))
    assert found["normal_deg"] > 20
    assert (found["psnr"] < 20) == (wrong == "order")


def test_light_goes_with_the_camera(handed: Object) -> None:
    """A post that turns under it looks different, a ball the same."""
    first, second = samples_around(handed, 3, 2, PX)
    assert first.focal_mm is None and first.elevation_deg == 0.0
    assert (first.input_rgba != second.input_rgba).any()
    ball = replace(thing(trimesh.creation.icosphere(subdivisions=3)), name="ball")
    front, back = samples_around(ball, 3, 2, PX)
    assert np.abs(front.input_rgba.astype(int) - back.input_rgba).mean() < 2


def test_meshes_are_compared_in_one_frame(handed: Object, around: list[EvalSample]) -> None:
    start = around[0].object_to_world
    truth = placed(handed, start)
    turned = [
        placed(placed(handed, s.object_to_world), between(s.object_to_world, start)) for s in around[:3]
    ]
    for mesh in turned:
        assert np.allclose(mesh.vertices, truth.vertices, atol=1e-5)
    found = mesh_agreement(turned, truth)
    assert found["chamfer"] < 0.02 and found["volume_iou"] == 1.0
    left = [placed(handed, s.object_to_world) for s in around[:3]]
    apart = mesh_agreement(left, truth)
    assert apart["chamfer"] > 0.05 and apart["volume_iou"] < 0.8


def test_mean_and_spread_pass_over_what_is_missing() -> None:
    rows = [{"psnr": 10.0, "chamfer": None}, {"psnr": 14.0, "chamfer": 0.1}, {"psnr": float("nan")}]
    mean, spread = mean_and_spread(rows)
    assert mean == {"psnr": 12.0, "chamfer": 0.1} and spread == {"psnr": 2.0, "chamfer": 0.0}
    assert mean_and_spread([{"chamfer": None}]) == ({"chamfer": None}, {"chamfer": None})
