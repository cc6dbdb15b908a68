"""The rasteriser's kernels against `raster.py`, compiled as plain C++ or, with `make test-gpu`, on a GPU."""

from collections.abc import Iterator

import numpy as np
import pytest

from tests.runtime.host_device import HostDevice
from uc3d_rt.device import Device, Scope, uploaded
from uc3d_rt.errors import BackendError
from uc3d_rt.mesh.device_raster import rasterize_device
from uc3d_rt.mesh.raster import rasterize_pixels

Images = tuple[np.ndarray, ...]
ORDERS = ((0,), (3, 0, 6, 2, 4, 1, 5))
SIZE_PX = 96


@pytest.fixture(params=ORDERS)
def ordered(machine: Device, request: pytest.FixtureRequest) -> Iterator[Device]:
    """Also with other threads in another order, where that can be chosen."""
    if isinstance(machine, HostDevice):
        machine.blocks = request.param
        yield machine
        machine.blocks = (0,)
    elif request.param == ORDERS[0]:
        yield machine
    else:
        pytest.skip("the stand-in's order can be chosen")


def drawn(device: Device, points: np.ndarray, faces: np.ndarray, size_px: int = SIZE_PX) -> Images:
    with Scope(device) as scope:
        given = uploaded(scope, points.astype(np.float32)), uploaded(scope, faces.astype(np.int32))
        return tuple(scope.download(image) for image in rasterize_device(scope, *given, size_px))


def soup(extent_px: float, count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Triangles of about that extent, some beyond the image, some without area, depths of both signs."""
    rng = np.random.default_rng(int(extent_px))
    middle = rng.uniform(-0.2 * SIZE_PX, 1.2 * SIZE_PX, (count, 1, 2))
    corners = middle + rng.normal(0.0, extent_px, (count, 3, 2))
    corners[::50, 1] = corners[::50, 0]
    depth = rng.normal(0.0, 1.0, (count, 3, 1))
    points = np.concatenate([corners, depth], axis=2).reshape(-1, 3)
    return points.astype(np.float32), rng.permutation(3 * count).reshape(-1, 3).astype(np.int32)


def same(found: Images, expected: Images) -> bool:
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("extent_px", [1.0, 6.0, 60.0, 2000.0])
def test_rasterize(ordered: Device, extent_px: float) -> None:
    points, faces = soup(extent_px)
    faces = np.arange(len(points), dtype=np.int32).reshape(-1, 3) if extent_px < 50 else faces
    expected = rasterize_pixels(points, faces, SIZE_PX)
    assert (expected[0] >= 0).any() and (expected[2] < 0).any()
    assert same(drawn(ordered, points, faces), expected)


def test_ties_go_to_the_first_face(ordered: Device) -> None:
    rng = np.random.default_rng(0)
    points = np.column_stack([rng.uniform(0, SIZE_PX, (60, 2)), np.repeat([0.0, -0.0, 0.5], 20)])
    faces = rng.integers(0, 60, (300, 3))
    faces = np.concatenate([faces, faces[::-1, [1, 2, 0]], faces])
    expected = rasterize_pixels(points, faces, SIZE_PX)
    found = drawn(ordered, points, faces)
    assert same(found, expected)
    assert 300 < found[0].max() < 600  # turned, a face has depths of other roundings


def test_centres_on_edges_and_at_the_border(ordered: Device) -> None:
    grid = np.stack(np.meshgrid(*[np.linspace(0.0, SIZE_PX, 2 * SIZE_PX // 8 + 1)] * 2), axis=-1)
    side = len(grid)
    points = np.column_stack([grid.reshape(-1, 2) + 0.5, np.ones(side**2)])
    first = (np.arange(side - 1)[:, None] * side + np.arange(side - 1)).reshape(-1)
    faces = np.concatenate(
        [first[:, None] + [0, 1, side], first[:, None] + [1, side + 1, side]]  # every centre, no gap
    )
    found = drawn(ordered, points, faces)
    assert same(found, rasterize_pixels(points, faces, SIZE_PX))
    assert (found[0] >= 0).all() and np.allclose(found[1].sum(axis=-1), 1.0, atol=1e-5)


def test_nothing_and_what_is_not_a_number(ordered: Device) -> None:
    points = np.array([[0, 0, 1], [np.nan, 9, 1], [9, 0, 1], [0, 9, np.nan], [9, 9, 1], [1e12, 5, 1]])
    faces = np.array([[0, 1, 2], [0, 3, 2], [0, 2, 2]])
    for chosen in (faces, faces[:0]):
        found = drawn(ordered, points, chosen)
        assert (found[0] == -1).all() and not found[1].any() and np.isinf(found[2]).all()
    far = drawn(ordered, points, np.array([[0, 5, 4], [5, 5, 5]]))
    assert (far[0] == 0).any()
    beyond = np.array([[1e12, 0, 1], [1e12, 9, 1], [2e12, 9, 1]])
    for sign in (1, -1):
        assert (drawn(ordered, sign * beyond, np.array([[0, 1, 2]]))[0] == -1).all()


def test_memory_is_given_back(machine: Device) -> None:
    if not isinstance(machine, HostDevice):
        pytest.skip("counted on the stand-in")
    points, faces = soup(6.0)

    class Small(HostDevice):
        def __init__(self, allocations: int) -> None:
            self.library, self.live, self.blocks, self.left = machine.library, 0, (0,), allocations

        def empty(self, *what: object) -> np.ndarray:
            self.left -= 1
            if self.left < 0:
                raise BackendError("no memory")
            return super().empty(*what)  # type: ignore[arg-type]

    for allocations in range(9):
        device = Small(allocations)
        given = points, faces
        try:
            images = rasterize_device(device, *given, SIZE_PX)
        except BackendError:
            assert device.live == 0 and allocations < 6
        else:
            assert device.live == 3
            device.free(images)
