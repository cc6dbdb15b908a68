"""The rendering op and the grid losses against float64 finite differences."""

import numpy as np
import pytest

from uc3d_rt.neus.losses import keep_best, mask_loss, normal_loss, rgb_loss

R, N = 8, 24


@pytest.fixture
def scene() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    axis = np.arange(R) - (R - 1) / 2
    y, z, x = np.meshgrid(axis, axis, axis, indexing="ij")
    sdf = np.sqrt(x * x + y * y + z * z) - 2.3 + 0.1 * rng.standard_normal((R, R, R))
    slab = np.sort(rng.integers(1, R - 2, N)).astype(np.int32)
    angle = rng.random(N) * 2 * np.pi
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    middle = (R - 1) / 2 + rng.uniform(-0.8, 0.8, (N, 2))
    return {
        "sdf": sdf,
        "color": rng.random((R, R, R, 3)),
        "start": np.searchsorted(slab, np.arange(R)).astype(np.int32),
        "weight_y": rng.random(N),
        "entry": middle - 2.6 * direction,
        "direction": direction,
        "length": np.full(N, 5.2),
        "offset": rng.random(N),
    }


def rendered(scene: dict[str, np.ndarray], inv_s: float) -> np.ndarray:
    from uc3d_rt.neus.render import render_rays

    out = np.empty((N, 7))
    rays = [scene[k] for k in ("start", "weight_y", "entry", "direction", "length", "offset")]
    render_rays(scene["sdf"], scene["color"], inv_s, *rays, 0.45, 1e9, 0.0, out)
    return out


def test_gradient_of_render_rays(scene: dict[str, np.ndarray]) -> None:
    from uc3d_rt.neus.render import render_rays_backward

    rng = np.random.default_rng(0)
    d_out = rng.standard_normal((N, 7))
    d_sdf, d_color = np.zeros_like(scene["sdf"]), np.zeros_like(scene["color"])
    d_inv_s = np.zeros(R - 1)
    rays = [scene[k] for k in ("start", "weight_y", "entry", "direction", "length", "offset")]
    how = (0.45, 1e9, 0.0)
    render_rays_backward(scene["sdf"], scene["color"], 1.7, *rays, *how, d_out, d_sdf, d_color, d_inv_s)

    def loss(inv_s: float = 1.7) -> float:
        return float((rendered(scene, inv_s) * d_out).sum())

    step = 1e-6
    assert d_inv_s.sum() == pytest.approx((loss(1.7 + step) - loss(1.7 - step)) / (2 * step), rel=1e-5)
    for name, gradient in (("sdf", d_sdf), ("color", d_color)):
        flat, expected = scene[name].reshape(-1), gradient.reshape(-1)
        strong = np.argsort(-np.abs(expected))[:40]
        for index in [*strong, *rng.integers(0, flat.size, 20)]:
            kept = flat[index]
            flat[index] = kept + step
            up = loss()
            flat[index] = kept - step
            down = loss()
            flat[index] = kept
            assert expected[index] == pytest.approx((up - down) / (2 * step), rel=2e-5, abs=1e-7), name


def test_opacity_and_colour_of_render_rays(scene: dict[str, np.ndarray]) -> None:
    scene["color"][...] = (0.2, 0.4, 0.6)
    out = rendered(scene, 20.0)
    opacity = out[:, 6]
    assert opacity.max() > 0.99 and opacity.min() >= 0.0
    expected = opacity[:, None] * (0.2, 0.4, 0.6) + (1 - opacity[:, None])
    np.testing.assert_allclose(out[:, :3], expected, atol=1e-9)


@pytest.mark.parametrize("which", ["rgb", "normal", "mask"])
def test_gradient_of_ray_losses(which: str) -> None:
    rng = np.random.default_rng(1)
    if which == "mask":
        value, target = rng.uniform(0.05, 0.95, 30), (rng.random(30) > 0.5).astype(float)
        function = mask_loss
    else:
        value, target = rng.standard_normal((30, 3)), rng.standard_normal((30, 3))
        target /= np.linalg.norm(target, axis=1, keepdims=True)
        target[:4] = 0.0  # background
        function = rgb_loss if which == "rgb" else normal_loss
    gradient = function(value, target)[1]
    for index in np.ndindex(value.shape):
        up, down = value.copy(), value.copy()
        up[index] += 1e-6
        down[index] -= 1e-6
        slope = (function(up, target)[0].sum() - function(down, target)[0].sum()) / 2e-6
        assert gradient[index] == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_gradient_of_regularize() -> None:
    from uc3d_rt.neus.regularize import regularize

    rng = np.random.default_rng(2)
    r = 8
    sdf = rng.standard_normal((r, r, r))
    inner = np.zeros((r, r, r), bool)
    inner[2:-2, 2:-2, 2:-2] = True
    nodes = np.flatnonzero(inner)
    weight = rng.random(len(nodes))

    def energies(f: np.ndarray) -> tuple[float, float]:
        gy, gz, gx = (np.diff(f, axis=a) for a in range(3))
        gradient = np.sqrt(gx[:-1, :-1] ** 2 + gy[:, :-1, :-1] ** 2 + gz[:-1, :, :-1] ** 2)
        eikonal = 0.5 * ((gradient - 1) ** 2).sum()
        laplace = -6 * f
        for axis in range(3):
            laplace = laplace + np.roll(f, 1, axis) + np.roll(f, -1, axis)
        return float(eikonal), float(0.5 * (weight * laplace[inner] ** 2).sum())

    gradient = np.zeros_like(sdf)
    regularize(sdf, nodes, 0.7, weight, np.zeros(r**3), gradient)
    for index in rng.choice(nodes, 25, replace=False):
        moved = []
        for step in (1e-6, -1e-6):
            f = sdf.copy()
            f.reshape(-1)[index] += step
            eikonal, smooth = energies(f)
            moved.append(0.7 * eikonal + smooth)
        assert gradient.reshape(-1)[index] == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=1e-5, abs=1e-6)


def test_keep_best_drops_the_worst_of_those_considered() -> None:
    loss = np.array([5.0, 1.0, 2.0, 3.0, 9.0])
    kept = keep_best(loss, np.array([True, True, True, True, False]), 0.75)
    assert kept.tolist() == [False, True, True, True, False]
