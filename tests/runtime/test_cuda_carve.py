"""The carving's kernels against `carve.py`, compiled as plain C++ or, with `make test-gpu`, on a GPU."""

from collections.abc import Iterator, Sequence
from dataclasses import fields

import numpy as np
import pytest
from scipy.ndimage import maximum_filter

from tests.runtime import analytic
from tests.runtime.host_device import HostDevice, stage_of, uploaded_pixels
from uc3d_rt.device import Device, Scope, uploaded
from uc3d_rt.errors import BackendError, FitError
from uc3d_rt.neus import carve as twin
from uc3d_rt.neus import fit as fit_twin
from uc3d_rt.neus.device_carve import SOLVER, DeviceCarving, carve, initial_colors
from uc3d_rt.neus.device_fit import DeviceState
from uc3d_rt.neus.device_views import images_on_device
from uc3d_rt.neus.field import near_nodes
from uc3d_rt.neus.fit import fit
from uc3d_rt.neus.fit_plan import FitOptions
from uc3d_rt.neus.hull import hull_sdf
from uc3d_rt.neus.rays import Pixels, Rays, select_pixels, trace_rays
from uc3d_rt.neus.redistance import restore_distance

R, SIZE_PX = 32, 96
ONE = 2.0**32
PER_NODE = (SIZE_PX / R) ** 2

Views = tuple[np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def views() -> Views:
    """Colour, normals and silhouettes."""
    color, normal = analytic.six_views(analytic.asymmetric(), SIZE_PX)
    return color, normal, (normal != 0).any(-1)


@pytest.fixture(scope="module")
def pixels(views: Views) -> Pixels:
    return select_pixels(*views, 0)


@pytest.fixture(scope="module")
def hull(views: Views) -> np.ndarray:
    """In node spacings, not yet a distance."""
    return hull_sdf(views[2], R) * np.float32(R / 2)


@pytest.fixture(scope="module")
def sdf(hull: np.ndarray) -> np.ndarray:
    """The hull shrunk, so that some rays miss it, and uneven."""
    y, z, x = np.meshgrid(*[np.arange(R)] * 3, indexing="ij")
    field = hull + np.float32(0.6) + 0.3 * np.sin(1.3 * x + y) * np.cos(0.9 * z)
    field = field.astype(np.float32)
    restore_distance(field)
    return field


@pytest.fixture(scope="module")
def rays(pixels: Pixels) -> tuple[np.ndarray, Rays]:
    """Which pixels' rays the CPU follows, and they."""
    inside = np.flatnonzero(pixels.mask > 0.5)
    found, crosses = trace_rays(pixels, inside, R)
    return inside[crosses], found


@pytest.fixture
def scope(device: Device) -> Iterator[Scope]:
    with Scope(device) as found:
        yield found


def carving_of(scope: Scope, pixels: Pixels) -> DeviceCarving:
    return DeviceCarving(scope, uploaded_pixels(scope, pixels), R, SIZE_PX)


def reordered(pixels: Pixels) -> tuple[np.ndarray, Pixels]:
    order = np.random.default_rng(3).permutation(len(pixels.mask))
    return order, Pixels(
        *(np.ascontiguousarray(getattr(pixels, item.name)[order]) for item in fields(Pixels))
    )


def spread(values: np.ndarray, which: np.ndarray, count: int, other: float) -> np.ndarray:
    """Values of some of the pixels, and another for the rest."""
    out = np.full(count, other, np.float32)
    out[which] = values
    return out


def test_follow_rays(scope: Scope, pixels: Pixels, sdf: np.ndarray, rays: tuple[np.ndarray, Rays]) -> None:
    carving = carving_of(scope, pixels)
    carving.follow(uploaded(scope, sdf))
    carving.mark_covered()
    expected = twin._follow(sdf, rays[1])
    found = [scope.download(buffer) for buffer in (carving.hit, carving.lowest, carving.lowest_at)]
    rest = np.setdiff1d(np.arange(len(pixels.mask)), rays[0])
    assert len(rest) > 1000 and all((a[rest] == b).all() for a, b in zip(found, (-1, 1e6, 0), strict=True))
    for a, b in zip(found, expected, strict=True):  # a ray that grazes the surface may meet it or not
        off = np.abs(a[rays[0]] - b) > 1e-3
        assert off.mean() < 2e-3
    assert (expected[0] >= 0).mean() > 0.5 and (expected[0] < 0).sum() > 50
    np.testing.assert_array_equal(scope.download(carving.covered), found[1] < np.float32(-twin.COVER_DEPTH))


def test_splat_normals_and_node_targets(
    scope: Scope, pixels: Pixels, sdf: np.ndarray, rays: tuple[np.ndarray, Rays]
) -> None:
    which, traced = rays
    hit = twin._follow(sdf, traced)[0]
    seen = hit >= 0
    sums = twin._splat_normals(
        twin._points(traced, hit, seen), pixels.normal[which[seen]], traced.direction[seen], R
    )
    nodes = near_nodes(sdf, twin.BAND)
    target, weight = twin._node_targets(sdf, nodes, sums, twin.ENOUGH_PIXELS * PER_NODE)

    given = spread(hit, which, len(pixels.mask), -1.0)
    order, other = reordered(pixels)
    found = []
    for shown, hits in ((pixels, given), (other, given[order])):
        carving = carving_of(scope, shown)
        scope.upload(hits, carving.hit)
        carving.find_targets(uploaded(scope, sdf))
        found.append([scope.download(b) for b in (carving.sums, carving.target, carving.weight)])
    assert all(a.tobytes() == b.tobytes() for a, b in zip(found[0][::2], found[1][::2], strict=True))
    np.testing.assert_allclose(found[0][0] / ONE, np.moveaxis(sums, 0, -1), atol=2e-5)
    near = np.zeros(R**3, bool)
    near[nodes] = True
    np.testing.assert_array_equal(found[0][2].reshape(-1) > 0, near)
    np.testing.assert_allclose(found[0][2].reshape(-1)[nodes], weight, atol=1e-5)
    # Where opposite normals all but cancel, which way the rest points is anybody's guess.
    off = np.abs(found[0][1].reshape(-1, 3)[nodes] - target).max(axis=1)
    assert np.quantile(off, 0.999) < 1e-4 and weight.max() > 0.8 and weight.min() == twin.UNSEEN_WEIGHT


def test_solve(scope: Scope, pixels: Pixels, sdf: np.ndarray, rays: tuple[np.ndarray, Rays]) -> None:
    which, traced = rays
    _, lowest, lowest_at = twin._follow(sdf, traced)
    uncovered = lowest > -twin.COVER_DEPTH  # as if the hull covered them all
    assert uncovered.sum() > 100
    nodes = near_nodes(sdf, twin.BAND)
    rng = np.random.default_rng(5)
    target = rng.standard_normal((len(nodes), 3)).astype(np.float32)
    weight = rng.uniform(0.05, 1.0, len(nodes)).astype(np.float32)
    points = twin._points(traced, lowest_at, uncovered)
    pull = twin.COVER_WEIGHT / PER_NODE
    expected = twin._solve(sdf, nodes, target.astype(float), weight.astype(float), points, pull)
    known = (np.isin(twin._corners(points, R)[0], nodes)).all(axis=1).sum()

    order, other = reordered(pixels)
    arrays = [
        spread(np.ones(len(which)), which, len(order), 0.0).astype(np.uint8),
        spread(lowest, which, len(order), 1e6),
        spread(lowest_at, which, len(order), 0.0),
    ]
    found = []
    for shown, given in ((pixels, arrays), (other, [a[order] for a in arrays])):
        carving = carving_of(scope, shown)
        for array, buffer in zip(given, (carving.covered, carving.lowest, carving.lowest_at), strict=True):
            scope.upload(np.ascontiguousarray(array), buffer)
        dense = [np.zeros((R**3, c), np.float32) for c in (3, 1)]
        dense[0][nodes], dense[1][nodes, 0] = target, weight
        scope.upload(dense[0].reshape(R, R, R, 3), carving.target)
        scope.upload(dense[1].reshape(R, R, R), carving.weight)
        carving.solve(uploaded(scope, sdf))
        moved, solver = scope.download(carving.moved), scope.download(carving.solver).view(SOLVER)[0]
        assert solver["uncovered"] == known > 50
        assert not scope.download(carving.pulled).any()
        found.append(moved)
    assert found[0].tobytes() == found[1].tobytes()
    moved = found[0].reshape(-1)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(moved[nodes], expected, atol=1e-4 * np.abs(expected).max())
    moved[nodes] = 0.0
    assert not moved.any()


def test_solve_ends_early_as_on_the_cpu_and_with_nothing_to_solve(
    scope: Scope, pixels: Pixels, sdf: np.ndarray
) -> None:
    carving = carving_of(scope, pixels)
    given = uploaded(scope, sdf)
    scope.clear(carving.covered)
    scope.clear(carving.target)
    scope.clear(carving.weight)
    carving.solve(given)
    assert scope.download(carving.solver).view(SOLVER)[0]["done"] == 1
    assert not scope.download(carving.moved).any()
    # Few nodes, so that conjugate gradients are through in fewer steps than there are.
    nodes = near_nodes(sdf, twin.BAND)
    nodes = nodes[np.unravel_index(nodes, sdf.shape)[0] == R // 2][:40]
    weight = np.zeros(R**3, np.float32)
    weight[nodes] = 0.5
    target = np.zeros((len(nodes), 3))
    scope.upload(weight.reshape(sdf.shape), carving.weight)
    carving.solve(given)
    assert scope.download(carving.solver).view(SOLVER)[0]["done"] == 1
    expected = twin._solve(sdf, nodes, target, weight[nodes].astype(float), np.zeros((0, 3)), 1.0)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(scope.download(carving.moved).reshape(-1)[nodes], expected, atol=1e-9)


def test_move_nodes(scope: Scope, pixels: Pixels, sdf: np.ndarray, hull: np.ndarray) -> None:
    carving = carving_of(scope, pixels)
    rng = np.random.default_rng(6)
    nodes = near_nodes(sdf, twin.BAND)
    weight = np.zeros(R**3, np.float32)
    weight[nodes] = rng.uniform(0.05, 1.0, len(nodes))
    moved = rng.normal(0.0, 1.5, R**3)
    scope.upload(weight.reshape(sdf.shape), carving.weight)
    scope.upload(moved.reshape(sdf.shape), carving.moved)
    out = scope.empty(sdf.shape, np.float32)
    carving.move(uploaded(scope, sdf), uploaded(scope, hull), out)
    expected = sdf.copy()
    depth = maximum_filter(-sdf, size=7).reshape(-1)[nodes]
    most = twin.LARGEST_MOVE
    expected.reshape(-1)[nodes] += np.clip(moved[nodes], -most, most) * np.clip(depth - 1.0, 0.0, 1.0)
    np.testing.assert_allclose(scope.download(out), np.maximum(expected, hull), atol=1e-5)


def test_initial_colors(scope: Scope, views: Views, sdf: np.ndarray) -> None:
    color, normal, masks = views
    state = DeviceState(scope, uploaded(scope, sdf), stage_of(sdf.shape[0]))
    scope.upload(sdf, state.sdf)
    initial_colors(state, images_on_device(scope, color, normal))
    expected = fit_twin.initial_colors(sdf, color, masks)
    # A node that projects onto the border of two pixels may take either.
    off = np.abs(scope.download(state.color) - expected).max(axis=-1)
    assert (off > 1e-4).mean() < 0.01 and np.ptp(expected) > 0.4


@pytest.mark.parametrize("steps", [0, 3])
def test_carve(scope: Scope, views: Views, pixels: Pixels, hull: np.ndarray, steps: int) -> None:
    start = hull.copy()
    restore_distance(start)
    expected = twin.carve(start, pixels, SIZE_PX, steps)
    found = []
    for shown in (pixels, reordered(pixels)[1]):
        state = DeviceState(scope, uploaded(scope, hull), stage_of(hull.shape[0]))
        carve(state, uploaded_pixels(scope, shown), SIZE_PX, steps)
        found.append(scope.download(state.sdf))
        np.testing.assert_allclose(scope.download(state.start), start, atol=1e-3)
    assert found[0].tobytes() == found[1].tobytes()
    near = np.abs(expected) < 1.5
    moved = np.abs(expected - start)[near].mean()
    off = np.abs(found[0] - expected)[near]
    assert off.max() < 0.05 and off.mean() < 1e-3
    assert moved > 0.1 or steps == 0


def test_a_fit_of_other_threads_in_another_order_gives_the_same_bytes(machine: Device, views: Views) -> None:
    if not isinstance(machine, HostDevice):
        pytest.skip("the stand-in's order can be chosen")
    options = FitOptions(resolution=64, iterations=(3, 3), blurred_iterations=(2, 2), rays_per_iteration=2000)
    found = []
    try:
        for machine.blocks in ((0,), (3, 0, 6, 2, 4, 1, 5)):
            found.append(fit(*views[:2], options, device=machine))
    finally:
        machine.blocks = (0,)
    assert found[0].sdf.tobytes() == found[1].sdf.tobytes()
    assert found[0].color.tobytes() == found[1].color.tobytes()


class Failing(HostDevice):
    """A device whose memory or kernels fail after some time."""

    def __init__(self, plain: HostDevice, memory: int = 10**6, launches: int = 10**6) -> None:
        self.library, self.live, self.blocks = plain.library, 0, (0,)
        self.memory, self.launches = memory, launches

    def empty(self, shape: Sequence[int], dtype: type[np.generic]) -> np.ndarray:
        self.memory -= 1
        if self.memory < 0:
            raise BackendError("no memory")
        return super().empty(shape, dtype)

    def launch(self, kernel: str, threads: int, *arguments: np.ndarray | np.generic | None) -> None:
        self.launches -= 1
        if self.launches < 0:
            raise BackendError("no more")
        super().launch(kernel, threads, *arguments)


@pytest.mark.parametrize("what", [{"memory": m} for m in (2, 9, 20, 30, 40)] + [{"launches": 60}, {}])
def test_a_fit_that_fails_frees_what_it_took(machine: Device, what: dict[str, int]) -> None:
    if not isinstance(machine, HostDevice):
        pytest.skip("counted on the stand-in")
    color, normal = analytic.six_views(analytic.sphere((0, 0, 0), 0.6), 48)
    if not what:  # no volume that all silhouettes share
        normal[...] = 0.0
        for view in range(6):
            normal[view, 5 + 25 * (view % 3 // 2) : 15 + 25 * (view % 3 // 2), 15:35, 1] = 1.0
    failing = Failing(machine, **what)
    with pytest.raises(BackendError if what else FitError):
        fit(
            color, normal, FitOptions(resolution=32, iterations=(1,), rays_per_iteration=1000), device=failing
        )
    assert failing.live == 0
