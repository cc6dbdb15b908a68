"""Random variations: what they promise to keep, and that the same generator gives the same draw."""

import colorsys
import math

import numpy as np
import pytest

from tests.train.shapes import cone
from train.augment import (
    MIRROR_SHARE,
    hue_matrix,
    normalizing_placement,
    random_albedo,
    random_input_camera,
    random_light,
    random_placement,
    random_variation,
    saturation_matrix,
    tight_window,
    yaw_matrix,
)
from train.render import Scene, View
from uc3d_rt.views import BOUNDING_RADIUS, FOCAL_LENGTHS_MM, Camera, camera_axes, project


def moved(vertices: np.ndarray, placement: np.ndarray) -> np.ndarray:
    return vertices @ placement[:, :3].T + placement[:, 3]


def test_placements_are_normalised_and_mirror_about_half() -> None:
    vertices = cone().vertices
    rng = np.random.default_rng(1)
    mirrored = 0
    for _ in range(300):
        placement = random_placement(vertices, rng)
        world = moved(vertices, placement)
        assert world.max(axis=0) == pytest.approx(-world.min(axis=0), abs=1e-5)
        assert np.linalg.norm(world, axis=1).max() == pytest.approx(BOUNDING_RADIUS, abs=1e-5)
        # only turns about +Y: up stays up
        assert placement[1, 0] == placement[1, 2] == placement[0, 1] == placement[2, 1] == 0.0
        mirrored += np.linalg.det(placement[:, :3]) < 0
    assert mirrored / 300 == pytest.approx(MIRROR_SHARE, abs=0.1)


def test_yaw_turns_the_front_to_its_azimuth() -> None:
    for yaw in (0.0, 30.0, 200.0):
        _, _, back = camera_axes(Camera(yaw))
        assert yaw_matrix(yaw) @ np.array([0.0, 0.0, 1.0]) == pytest.approx(back, abs=1e-6)


def test_input_view_is_centred_left_to_right() -> None:
    vertices = cone().vertices
    placement = normalizing_placement(vertices, yaw_matrix(33.0))
    u = project(moved(vertices, placement), Camera(0.0, 25.0))[:, 0]
    assert u.max() == pytest.approx(-u.min(), abs=1e-5)


def test_hue_matrix_keeps_greys_and_luminance_and_turns_hues() -> None:
    matrix = hue_matrix(40.0)
    assert matrix @ np.ones(3) == pytest.approx(np.ones(3))
    luminance = np.array([0.2126, 0.7152, 0.0722])
    color = np.array([0.5, 0.3, 0.25])
    assert luminance @ (matrix @ color) == pytest.approx(luminance @ color)
    assert hue_matrix(-40.0) @ matrix == pytest.approx(np.eye(3), abs=1e-9)
    before, after = colorsys.rgb_to_hsv(*color)[0], colorsys.rgb_to_hsv(*(matrix @ color))[0]
    assert (after - before) * 360 == pytest.approx(40.0, abs=12.0)  # HSV hue is a hexagon's


def test_a_third_of_a_turn_swaps_the_channels_in_the_picture() -> None:
    """Red turned by 120 degrees is green, but for the luminance that is kept."""
    red = cone((0.3, 0.0, 0.0))
    shift = hue_matrix(120.0)
    assert np.argmax(shift @ np.array([0.3, 0.0, 0.0])) == 1
    with Scene(red) as scene:
        plain, turned = scene.render(
            [View(Camera(0.0)), View(Camera(0.0), color_matrix=shift.astype(np.float32))], 32
        ).color[:, 16, 16]
    assert np.argmax(plain) == 0 and np.argmax(turned) == 1


def test_saturation() -> None:
    color = np.array([0.6, 0.2, 0.1])
    assert saturation_matrix(1.0) @ color == pytest.approx(color)
    assert np.ptp(saturation_matrix(0.0) @ color) == pytest.approx(0.0)


def test_some_albedos_stay_as_they_are() -> None:
    rng = np.random.default_rng(0)
    draws = [random_albedo(rng) for _ in range(400)]
    plain = [m for m, b in draws if b == 1.0 and (m == np.eye(3)).all()]
    assert len(plain) / 400 == pytest.approx(0.3, abs=0.08)
    assert all(m.sum(axis=1) == pytest.approx(np.ones(3), abs=1e-5) for m, _ in draws)  # greys stay grey


def test_lights_come_from_above_and_rather_from_the_camera() -> None:
    rng = np.random.default_rng(0)
    camera = Camera(0.0, 10.0)
    lights = [random_light(rng, camera) for _ in range(300)]
    directions = np.array([light.direction for light in lights])
    assert (directions[:, 1] > 0).all()
    assert 0.6 < (directions[:, 2] > 0).mean() < 0.95
    for light in lights:
        assert 0.35 <= light.ambient <= 0.9 and 0.0 <= light.wrap <= 1.0 and 0.8 <= light.exposure <= 1.2
        assert light.ambient + light.key == pytest.approx(1.0)


def test_input_cameras() -> None:
    rng = np.random.default_rng(0)
    cameras = [random_input_camera(rng) for _ in range(500)]
    assert {c.azimuth_deg for c in cameras} == {0.0}
    assert {c.focal_mm for c in cameras} == {None, *FOCAL_LENGTHS_MM}
    assert np.mean([c.focal_mm is None for c in cameras]) == pytest.approx(0.4, abs=0.08)
    elevations = [c.elevation_deg for c in cameras]
    assert -20.0 <= min(elevations) < -15.0 and 35.0 < max(elevations) <= 40.0


@pytest.mark.parametrize("camera", [Camera(0.0, 30.0), Camera(0.0, -10.0, 35.0)])
def test_tight_window_fits_the_rendered_silhouette(camera: Camera) -> None:
    obj = cone()
    placement = normalizing_placement(obj.vertices, yaw_matrix(20.0) * np.array([0.3, 1.0, 0.3]))
    view = View(camera, placement, window=tight_window(obj.vertices, placement, camera, fill=0.8))
    with Scene(obj) as scene:
        alpha = scene.render([view], 200).alpha[0]
    rows, columns = np.flatnonzero(alpha.any(axis=1)), np.flatnonzero(alpha.any(axis=0))
    assert len(rows) == pytest.approx(160, abs=2)  # the taller side fills 0.8 of 200
    assert rows.min() + rows.max() == pytest.approx(199, abs=2)
    assert columns.min() + columns.max() == pytest.approx(199, abs=2)


def test_the_same_generator_draws_the_same() -> None:
    vertices = cone().vertices
    one, two = (random_variation(vertices, np.random.default_rng([1, 2])) for _ in range(2))
    assert (one.object_to_world == two.object_to_world).all()
    assert (one.color_matrix == two.color_matrix).all() and one.brightness == two.brightness
    other = random_variation(vertices, np.random.default_rng([1, 3]))
    assert not math.isclose(one.object_to_world[0, 0], other.object_to_world[0, 0])
