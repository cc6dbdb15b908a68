"""The surface's kernels against their CPU twins, compiled as plain C++ or, with `make test-gpu`, on a GPU."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from tests.runtime import analytic
from tests.runtime.host_device import HostDevice
from uc3d_rt.device import Device, Scope, uploaded
from uc3d_rt.device_scan import running_sums
from uc3d_rt.errors import BackendError, FitError
from uc3d_rt.mesh.build import MeshOptions, build_mesh
from uc3d_rt.mesh.device_extract import (
    DeviceSurface,
    extract_surface_on_device,
    largest_parts_on_device,
    marching_cubes_on_device,
)
from uc3d_rt.mesh.device_refine import (
    corners_around,
    face_targets_on_device,
    refine_surface_on_device,
    surface_on_device,
)
from uc3d_rt.mesh.extract import extract_surface
from uc3d_rt.mesh.refine import face_targets, refine_surface
from uc3d_rt.mesh.surface import Surface, face_components, is_closed, largest_parts, signed_volumes
from uc3d_rt.neus.field import Field, node_coordinates

R = 48
AXIS = node_coordinates(R)
Y, Z, X = np.meshgrid(AXIS, AXIS, AXIS, indexing="ij")
ORDERS = ((0,), (3, 0, 6, 2, 4, 1, 5), (1, 0))


def field_of(sdf: np.ndarray) -> Field:
    return Field(sdf.astype(np.float32), np.full((*sdf.shape, 3), 0.5, np.float32))


def sphere_sdf(centre: tuple[float, float, float], radius: float) -> np.ndarray:
    return np.sqrt((X - centre[0]) ** 2 + (Y - centre[1]) ** 2 + (Z - centre[2]) ** 2) - radius


def box_sdf(half: tuple[float, float, float]) -> np.ndarray:
    return np.maximum(np.maximum(np.abs(X) - half[0], np.abs(Y) - half[1]), np.abs(Z) - half[2])


def smooth_sdf(seed: int, sigma: float) -> np.ndarray:
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal((R, R, R)), sigma)
    return np.maximum(noise / noise.std() * 0.1, sphere_sdf((0, 0, 0), 0.85))


SHAPES = {
    "sphere": sphere_sdf((0.03, -0.02, 0.01), 0.61),
    "box": box_sdf((0.5, 0.31, 0.42)),
    "plate": np.maximum(box_sdf((0.6, 0.5, 1.0)), np.abs(Z - 1 / R) - 0.7 / R),  # 0.7 node spacings thick
    "turned plate": np.maximum(np.abs(X + Y + 0.7 * Z) - 1.6 / R, sphere_sdf((0, 0, 0), 0.7)),
    "beyond the grid": sphere_sdf((0.9, 0.1, 0), 0.5),
    "everything": -np.ones((R, R, R)),
    "smooth": smooth_sdf(0, 3.0),
    "sponge": smooth_sdf(1, 1.0),
}


def downloaded(device: Device, surface: DeviceSurface) -> Surface:
    return Surface(device.download(surface.vertices), device.download(surface.faces))


def extracted(device: Device, sdf: np.ndarray, min_share: float = 0.05) -> Surface:
    with Scope(device) as scope:
        given = uploaded(scope, sdf.astype(np.float32))
        return downloaded(scope, extract_surface_on_device(scope, given, min_share))


def all_parts(device: Device, sdf: np.ndarray) -> Surface:
    with Scope(device) as scope:
        return downloaded(scope, marching_cubes_on_device(scope, uploaded(scope, sdf.astype(np.float32))))


def areas(surface: Surface) -> np.ndarray:
    a, b, c = (surface.vertices[surface.faces[:, k]].astype(np.float64) for k in range(3))
    return np.asarray(0.5 * np.linalg.norm(np.cross(b - a, c - a), axis=1))


def samples(surface: Surface, seed: int, count: int = 20_000) -> np.ndarray:
    """Points spread evenly over a surface."""
    rng = np.random.default_rng(seed)
    area = areas(surface)
    chosen = surface.vertices[surface.faces[rng.choice(len(area), count, p=area / area.sum())]]
    weights = rng.dirichlet(np.ones(3), count)
    return np.asarray((chosen * weights[..., None]).sum(axis=1))


def chamfer(one: Surface, other: Surface) -> float:
    a, b = samples(one, 0), samples(other, 1)
    return float(0.5 * (cKDTree(a).query(b)[0].mean() + cKDTree(b).query(a)[0].mean()))


def euler(surface: Surface) -> int:
    return len(surface.vertices) - len(surface.faces) // 2


def refined(device: Device, sdf: np.ndarray, normal: np.ndarray, min_share: float) -> Surface:
    with Scope(device) as scope:
        return surface_on_device(scope, uploaded(scope, sdf), normal, min_share)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 8192, 20_000])
def test_running_sums(device: Device, count: int) -> None:
    counts = np.random.default_rng(count).integers(0, 9, (2, count)).astype(np.int32)
    buffer = uploaded(device, counts)
    assert running_sums(device, buffer) == counts.sum(axis=1).tolist()
    np.testing.assert_array_equal(device.download(buffer), np.cumsum(counts, axis=1) - counts)


@pytest.mark.parametrize("shape", SHAPES)
def test_extract_surface(device: Device, shape: str) -> None:
    sdf = SHAPES[shape]
    found, expected = extracted(device, sdf), extract_surface(field_of(sdf), 0.05)
    assert found.vertices.dtype == np.float32 and found.faces.dtype == np.int32
    assert is_closed(found.faces) and np.bincount(found.faces.reshape(-1)).min() >= 3
    assert areas(found).min() > 0
    # Diagonals of quadrilaterals may run the other way.
    assert signed_volumes(found).sum() == pytest.approx(signed_volumes(expected).sum(), rel=0.01)
    assert areas(found).sum() == pytest.approx(areas(expected).sum(), rel=5e-3)
    assert chamfer(found, expected) < 1.02 * chamfer(expected, expected)
    if shape != "sponge":  # its cubes' insides can be joined in several ways
        assert euler(found) == euler(expected)
        assert face_components(found)[0] == face_components(expected)[0]
        assert len(found.vertices) == pytest.approx(len(expected.vertices), rel=1e-3)
        assert cKDTree(expected.vertices).query(found.vertices)[0].max() < 1e-5


def test_a_sphere_and_a_box_are_as_large_as_they_are(device: Device) -> None:
    radius, half = 0.61, (0.5, 0.31, 0.42)
    sphere, box = extracted(device, SHAPES["sphere"]), extracted(device, SHAPES["box"])
    assert areas(sphere).sum() == pytest.approx(4 * np.pi * radius**2, rel=3e-3)
    assert signed_volumes(sphere).sum() == pytest.approx(4 / 3 * np.pi * radius**3, rel=5e-3)
    assert signed_volumes(box).sum() == pytest.approx(8 * np.prod(half), rel=0.01)  # edges are cut
    np.testing.assert_allclose(np.abs(box.vertices).max(axis=0), half, atol=1e-5)
    assert euler(sphere) == euler(box) == 2
    offset = np.linalg.norm(sphere.vertices - np.array([0.03, -0.02, 0.01]), axis=1) - radius
    assert np.abs(offset).max() < 1e-3


@pytest.mark.parametrize("resolution", [2, 3, 31, 33])
def test_the_surface_of_noise_is_closed(device: Device, resolution: int) -> None:
    rng = np.random.default_rng(resolution)
    for _ in range(60 if resolution < 5 else 2):
        sdf = rng.choice([-1, 1], (resolution,) * 3) * rng.uniform(0.0, 1.0, (resolution,) * 3)
        sdf[rng.random(sdf.shape) < 0.02] = 0.0
        sdf.reshape(-1)[0] = -0.5
        surface = all_parts(device, sdf)
        assert is_closed(surface.faces)
        inside = np.pad(sdf < 0, 1)
        crossed = sum(np.count_nonzero(np.diff(inside, axis=axis)) for axis in range(3))
        assert len(surface.vertices) == crossed


def test_all_cases_in_one_grid_are_closed(device: Device) -> None:
    rng = np.random.default_rng(0)
    for _ in range(3):
        sdf = np.full((28, 28, 28), 0.5)
        for case in range(256):  # two nodes apart, magnitudes of all kinds
            y, z, x = 4 * (case // 49) + 1, 4 * (case // 7 % 7) + 1, 4 * (case % 7) + 1
            signs = np.array([-1.0 if case >> k & 1 else 1.0 for k in range(8)]).reshape(2, 2, 2)
            sdf[y : y + 2, z : z + 2, x : x + 2] = signs * rng.uniform(0.01, 1.0, (2, 2, 2))
        assert is_closed(all_parts(device, sdf).faces)


def test_saddles_decide_which_corners_are_joined(device: Device) -> None:
    sdf = np.ones((6, 6, 6), np.float32)
    for inner, parts in ((-3.0, 1), (-0.4, 2)):
        sdf[2, 2, 2] = sdf[2, 3, 3] = inner
        assert face_components(all_parts(device, sdf))[0] == parts


def test_nodes_exactly_on_the_surface(device: Device) -> None:
    sdf = np.round(box_sdf((0.5, 0.5, 0.5)) * R / 2) * (2 / R)
    sdf -= sdf[R // 2, R // 2, 12]
    assert (sdf == 0).sum() > 1000
    found = extracted(device, sdf)
    assert is_closed(found.faces) and areas(found).min() > 0
    assert len(np.unique(found.vertices, axis=0)) == len(found.vertices)


def test_largest_parts(device: Device) -> None:
    both = np.minimum(sphere_sdf((-0.4, 0, 0), 0.4), sphere_sdf((0.5, 0, 0), 0.35))
    stray = np.minimum(both, sphere_sdf((0.0, 0.7, 0.5), 0.06))
    hollow = np.maximum(stray, -sphere_sdf((-0.4, 0, 0), 0.2))
    for sdf in (hollow, SHAPES["sponge"]):
        for min_share in (1e-6, 0.05, 0.8):
            given = all_parts(device, sdf)
            with Scope(device) as scope:
                buffers = DeviceSurface(uploaded(scope, given.vertices), uploaded(scope, given.faces))
                found = downloaded(scope, largest_parts_on_device(scope, buffers, min_share))
            expected = largest_parts(given, min_share)
            np.testing.assert_array_equal(found.vertices, expected.vertices)
            np.testing.assert_array_equal(found.faces, expected.faces)
    assert face_components(extracted(device, hollow))[0] == 2
    assert face_components(extracted(device, hollow, 0.8))[0] == 1


def test_one_long_part_is_one(device: Device) -> None:
    winding = np.full((R, R, R), 0.5)
    for z in range(1, R - 1, 2):  # a wire to and fro through a layer
        winding[R // 2, z, 1:-1] = -0.5
        winding[R // 2, z + 1, (z // 2 % 2) * (R - 3) + 1] = -0.5
    assert face_components(extracted(device, winding))[0] == 1


def test_no_surface_is_an_error(device: Device) -> None:
    with pytest.raises(FitError, match="no volume"):
        extracted(device, np.ones((R, R, R)))
    speck = np.ones((R, R, R))
    speck[20, 20, 20] = -1e-9
    with pytest.raises(FitError, match="cannot be closed"):
        extracted(device, speck)


@pytest.fixture(scope="module")
def rounded() -> tuple[np.ndarray, np.ndarray]:
    """A rounded box, and the normals of one with edges."""
    half, radius = np.array([0.5, 0.35, 0.4]), 0.06
    beyond = np.abs(np.stack([X, Y, Z])) - (half - radius)[:, None, None, None]
    sdf = np.linalg.norm(np.maximum(beyond, 0), axis=0) + np.minimum(beyond.max(axis=0), 0) - radius
    normal = analytic.six_views(analytic.box(tuple(-half), tuple(half)), 128)[1]
    return sdf.astype(np.float32), normal


def test_corners_around(device: Device, rounded: tuple[np.ndarray, np.ndarray]) -> None:
    with Scope(device) as scope:
        surface = extract_surface_on_device(scope, uploaded(scope, rounded[0]), 0.05)
        first, corners = (scope.download(buffer) for buffer in corners_around(scope, surface))
        faces = scope.download(surface.faces).reshape(-1)
    np.testing.assert_array_equal(corners, np.argsort(faces, kind="stable"))
    np.testing.assert_array_equal(np.diff(first[0]), np.bincount(faces))


def test_face_targets_and_refine_surface(device: Device, rounded: tuple[np.ndarray, np.ndarray]) -> None:
    sdf, normal = rounded
    with Scope(device) as scope:
        surface = extract_surface_on_device(scope, uploaded(scope, sdf), 0.05)
        start = downloaded(scope, surface)
        target = scope.download(face_targets_on_device(scope, surface, normal))
        found = scope.download(refine_surface_on_device(scope, surface, normal))
    off = np.abs(target - face_targets(start, normal)).max(axis=1)
    assert (off > 1e-4).mean() < 2e-3  # a middle between two pixels may take either
    expected = refine_surface(start, normal).vertices
    moved = np.abs(expected - start.vertices)
    assert moved.max() > 0.01
    assert np.quantile(np.abs(found - expected), 0.99) < 1e-4 and np.abs(found - expected).max() < 5e-3


def test_the_same_targets_give_the_same_movement(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conjugate gradients alone, of targets that no rounding can change."""
    rng = np.random.default_rng(0)
    with Scope(device) as scope:
        surface = extract_surface_on_device(scope, uploaded(scope, SHAPES["smooth"].astype(np.float32)), 0.05)
        start = downloaded(scope, surface)
        target = rng.standard_normal((len(start.faces), 3))
        target /= np.linalg.norm(target, axis=1, keepdims=True)
        monkeypatch.setattr("uc3d_rt.mesh.refine.face_targets", lambda *_: target)
        monkeypatch.setattr(
            "uc3d_rt.mesh.device_refine.face_targets_on_device", lambda scratch, *_: uploaded(scratch, target)
        )
        normal = np.zeros((6, 8, 8, 3), np.float32)
        found = scope.download(refine_surface_on_device(scope, surface, normal))
    expected = refine_surface(start, normal).vertices
    assert np.abs(expected - start.vertices).max() > 0.05
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.fixture
def orders(machine: Device) -> Iterator[tuple[HostDevice, Sequence[tuple[int, ...]]]]:
    if not isinstance(machine, HostDevice):
        pytest.skip("the stand-in's order can be chosen")
    yield machine, ORDERS
    machine.blocks = (0,)


@pytest.mark.parametrize("shape", ["sponge", "turned plate"])
def test_other_threads_in_another_order_give_the_same_bytes(
    orders: tuple[HostDevice, Sequence[tuple[int, ...]]], rounded: tuple[np.ndarray, np.ndarray], shape: str
) -> None:
    machine, blocks = orders
    found = []
    for machine.blocks in blocks:
        surface = refined(machine, SHAPES[shape].astype(np.float32), rounded[1], 0.01)
        found.append(surface.vertices.tobytes() + surface.faces.tobytes())
    assert len(set(found)) == 1


def test_a_gpu_gives_the_same_bytes_again(device: Device, rounded: tuple[np.ndarray, np.ndarray]) -> None:
    surfaces = [refined(device, *rounded, 0.05) for _ in range(3)]
    assert len({s.vertices.tobytes() + s.faces.tobytes() for s in surfaces}) == 1
    assert is_closed(surfaces[0].faces)


class Failing(HostDevice):
    """A device whose memory fails after some time."""

    def __init__(self, plain: HostDevice, memory: int) -> None:
        self.library, self.live, self.blocks, self.memory = plain.library, 0, (0,), memory

    def empty(self, shape: Sequence[int], dtype: type[np.generic]) -> np.ndarray:
        self.memory -= 1
        if self.memory < 0:
            raise BackendError("no memory")
        return super().empty(shape, dtype)


def test_memory_is_given_back(machine: Device, rounded: tuple[np.ndarray, np.ndarray]) -> None:
    if not isinstance(machine, HostDevice):
        pytest.skip("counted on the stand-in")
    sdf, normal = rounded
    stray = np.minimum(sdf, sphere_sdf((0, 0.8, 0), 0.08)).astype(np.float32)
    before = machine.live
    refined(machine, stray, normal, 0.05)
    assert machine.live == before
    for memory in range(0, 40, 3):
        failing = Failing(machine, memory)
        try:
            refined(failing, stray, normal, 0.05)
        except BackendError:
            assert memory < 36
        assert failing.live == 0
    speck = np.ones_like(sdf)
    speck[20, 20, 20] = -1e-9
    for bad in (np.ones_like(sdf), speck):
        failing = Failing(machine, 1000)
        with pytest.raises(FitError):
            refined(failing, bad.astype(np.float32), normal, 0.05)
        assert failing.live == 0


def test_build_mesh_on_a_device(machine: Device) -> None:
    color, normal = analytic.six_views(analytic.asymmetric(), 96)
    field = field_of(np.minimum(box_sdf((0.4, 0.5, 0.4)), sphere_sdf((0.5, 0, 0), 0.3)))
    options = MeshOptions(texture="vertex", faces=2000)
    found, expected = (build_mesh(field, color, normal, options, device=d) for d in (machine, None))
    assert found.is_watertight and found.is_winding_consistent
    assert found.volume == pytest.approx(expected.volume, rel=5e-3)
    assert len(found.faces) == pytest.approx(len(expected.faces), rel=0.05)
