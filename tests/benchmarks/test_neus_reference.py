"""The networks that the fit is compared with: NeuS' equations, a sphere at first, and a surface at last."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.neus_reference import (
    DistanceNetwork,
    ReferenceModel,
    ReferenceOptions,
    fit_reference,
    loss_of,
    rate_at,
    render,
    sample_ends,
    section_weights,
    target_rays,
)
from tests.conftest import SEMI_AXES, ellipsoid_views

TINY = ReferenceOptions(
    iterations=50,
    rays=128,
    samples=24,
    importance_samples=16,
    width=48,
    layers=4,
    skip=2,
    color_layers=2,
    octaves=2,
    learning_rate=5e-3,
    warm_up=10,
    resolution=40,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_weights_are_those_of_the_equations() -> None:
    """NeuS Eq. 11 to 13 as they stand, in float64, along rays that enter and leave twice."""
    t = np.linspace(0.0, 1.0, 41)
    f = np.stack([0.3 * np.cos(9.0 * t + shift) + 0.05 * shift for shift in (0.0, 1.0, 2.5)])
    inv_s = 30.0
    phi = 1.0 / (1.0 + np.exp(-inv_s * f))
    alpha = np.maximum((phi[:, :-1] - phi[:, 1:]) / phi[:, :-1], 0.0)
    light = np.cumprod(np.concatenate([np.ones((3, 1)), 1.0 - alpha], axis=1), axis=1)[:, :-1]
    ends = torch.from_numpy(f.astype(np.float32))
    found = section_weights(ends[:, :-1], ends[:, 1:], inv_s)
    assert np.abs(found.numpy() - light * alpha).max() < 1e-5
    assert (alpha == 0.0).any() and (light * alpha).max() > 0.1


def test_weights_deep_inside_are_numbers_with_a_gradient() -> None:
    ends = torch.linspace(0.5, -3.0, 30)[None].requires_grad_()
    found = section_weights(ends[:, :-1], ends[:, 1:], torch.tensor(400.0))
    (gradient,) = torch.autograd.grad((found * torch.arange(29.0)).sum(), ends)
    assert found.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0.1


class Wall:
    """Stands for a `ReferenceModel`: all behind the plane n . x = 0.2 is full, in one colour."""

    normal = torch.tensor([0.0, 0.6, 0.8])
    inv_s = torch.tensor(25.0)
    distance: "Wall"

    def __init__(self) -> None:
        self.distance = self

    def with_gradient(self, x: Tensor, keep_graph: bool) -> tuple[Tensor, Tensor, Tensor]:
        return x @ self.normal - 0.2, self.normal.expand(len(x), 3), x

    def color(self, x: Tensor, gradient: Tensor, direction: Tensor, features: Tensor) -> Tensor:
        return torch.tensor([0.9, 0.5, 0.1]).expand(len(x), 3)


def test_a_wall_looks_as_in_closed_form() -> None:
    """A ray into a plane has no section that lets light back: opacity is 1 - Phi(end) / Phi(start)."""
    origin, direction = torch.zeros(2, 3), torch.tensor([[0.0, 0.0, -1.0], [0.0, 0.0, 1.0]])
    t = torch.linspace(-0.9, 0.9, 33).expand(2, -1)
    seen = render(Wall(), origin, direction, t)  # type: ignore[arg-type]
    start, end = (1.0 / (1.0 + np.exp(-25.0 * f)) for f in (0.9 * 0.8 - 0.2, -0.9 * 0.8 - 0.2))
    opacity = 1.0 - end / start
    assert seen.opacity[0].item() == pytest.approx(opacity, abs=1e-6)
    assert seen.opacity[1].item() == 0.0  # it leaves
    assert seen.normal[0].numpy() == pytest.approx(opacity * Wall.normal.numpy(), abs=1e-6)
    colors = np.array([0.9, 0.5, 0.1]) * opacity + 1.0 - opacity
    assert seen.color.numpy() == pytest.approx(np.stack([colors, np.ones(3)]), abs=1e-6)
    assert seen.eikonal.item() == pytest.approx(0.0, abs=1e-6)


def test_importance_samples_gather_at_the_surface() -> None:
    class Plane(Wall):
        def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x @ self.normal - 0.2, x

    origin, direction = torch.zeros(50, 3), torch.tensor([0.0, 0.0, -1.0]).expand(50, 3)
    generator = torch.Generator().manual_seed(0)
    ends = sample_ends(Plane(), origin, direction, ReferenceOptions(), generator)  # type: ignore[arg-type]
    near = (ends + 0.25).abs() < 0.1  # where n . x = 0.2
    assert ends.shape == (50, 128) and (torch.diff(ends) >= 0.0).all()
    assert ends.abs().max() <= 1.0
    assert (near.sum(1) > 50).all() and ((~near).sum(1) >= 55).all()


def test_the_networks_begin_as_a_sphere() -> None:
    torch.manual_seed(0)
    network = DistanceNetwork(ReferenceOptions())
    way = torch.nn.functional.normalize(torch.randn(500, 3), dim=1)
    for radius in (0.25, 0.5, 0.7, 0.9):
        distance, gradient, _ = network.with_gradient(radius * way, keep_graph=False)
        assert distance.mean().item() == pytest.approx(radius - 0.5, abs=0.16)
        assert distance.std() < 0.15 * radius
        assert torch.nn.functional.cosine_similarity(gradient, way).mean() > 0.9
    # The rounded corner of softplus flattens the middle; the random scale of 256 units is left elsewhere.
    assert (gradient * way).sum(1).mean().item() == pytest.approx(1.0, abs=0.3)


def test_a_network_is_given_its_input_again_at_the_skip() -> None:
    options = ReferenceOptions(width=64)
    sizes = [(linear.in_features, linear.out_features) for linear in DistanceNetwork(options).linears]
    assert sizes == [(39, 64), (64, 64), (64, 64), (64, 25), *[(64, 64)] * 4, (64, 65)]


def test_losses_are_those_of_the_views() -> None:
    """Eq. 19 and 20 of rays that show white, nothing and the like, by hand."""
    color, normal = ellipsoid_views(16)
    masks = (normal != 0).any(-1)
    rays = target_rays(color, normal, masks, torch.device("cpu"))
    assert rays.mask.sum() == masks.sum() and (rays.origin.norm(dim=1) < 1.0).all()
    chosen = torch.arange(len(rays.mask))
    shown = type("Shown", (), {})()
    shown.color, shown.opacity, shown.eikonal = rays.color + 0.1, rays.mask * 0.5 + 0.25, torch.tensor(0.2)
    turned = rays.normal.clone()
    turned[::2] *= -3.0
    shown.normal = turned
    no_weights = ReferenceOptions(w_rgb=0.0, w_normal=0.0, w_mask=0.0, w_eikonal=0.0)

    def of(name: str) -> float:
        return loss_of(shown, rays, chosen, replace(no_weights, **{name: 1.0})).item()

    opposite = (rays.mask[::2].sum() / rays.mask.sum()).item()
    assert of("w_rgb") == pytest.approx(0.03, rel=1e-4)
    assert of("w_normal") == pytest.approx(2.0 * opposite, rel=1e-4)
    assert of("w_mask") == pytest.approx(-np.log(0.75), rel=1e-4)
    assert of("w_eikonal") == pytest.approx(0.2)


def test_an_ellipsoid_is_found() -> None:
    """Within 4 % of its size in 50 steps, where the sphere that they begin with is a tenth off and more."""
    color, normal = ellipsoid_views(48)
    found = fit_reference(color, normal, TINY)
    begun, again, other = (
        fit_reference(color, normal, replace(TINY, iterations=1, resolution=24, seed=seed))
        for seed in (0, 0, 1)
    )
    vertices = np.asarray(found.mesh.vertices)
    radius = np.linalg.norm(vertices / SEMI_AXES, axis=1)
    assert np.abs(radius - 1.0).mean() < 0.04
    assert np.abs(np.linalg.norm(np.asarray(begun.mesh.vertices) / SEMI_AXES, axis=1) - 1.0).mean() > 0.1
    assert found.mesh.is_watertight and found.mesh.volume > 0
    outward = vertices / SEMI_AXES**2
    outward /= np.linalg.norm(outward, axis=1, keepdims=True)
    assert (np.asarray(found.mesh.vertex_normals) * outward).sum(1).mean() > 0.98
    assert found.inv_s != begun.inv_s and found.fit_s > 0.0 and found.iterations == TINY.iterations
    assert np.array_equal(begun.field.sdf, again.field.sdf)
    assert not np.array_equal(begun.field.sdf, other.field.sdf)


def test_fitting_leaves_random_numbers_and_precision_alone() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    before = torch.backends.cuda.matmul.allow_tf32
    color, normal = ellipsoid_views(24)
    fit_reference(color, normal, replace(TINY, iterations=1, tf32=True))
    assert torch.equal(torch.rand(3), wanted)
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_the_rate_ramps_up_and_falls_along_a_cosine() -> None:
    options = ReferenceOptions(iterations=110, warm_up=10, final_rate=0.1)
    rates = [rate_at(k, options) for k in (0, 9, 10, 60, 110)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.55, 0.1])


def test_the_deviation_begins_as_asked() -> None:
    assert ReferenceModel(TINY).inv_s.item() == pytest.approx(20.0, rel=1e-5)


@pytest.mark.parametrize(
    "change", [{"rays": 0}, {"skip": 8}, {"width": 39}, {"near_share": 1.5}, {"w_mask": -1.0}]
)
def test_options_that_cannot_work_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        ReferenceOptions(**change)  # type: ignore[arg-type]
