"""The losses of Sec. 3 against transcriptions of the paper's sums, loop by loop, in float64."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from train import model as model_module
from train.losses import (
    diffusion_loss,
    mutual_information_loss,
    noisy_latent,
    normal_loss,
    outline_loss,
    predicted_z_0,
    relative_weights,
    variance_loss,
    velocity,
)
from train.model import Batch, MultiviewModel
from train.normal_probe import NormalProbe
from train.presets import TOY, LossWeights, Preset, with_train
from train.vae import Vae
from uc3d_rt.contract import NoiseSchedule
from uc3d_rt.sampler import alpha_bars, step_weights

B, V, C, H, W = 3, 2, 4, 3, 2


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def double(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array)


def latents(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(B, V, C, H, W))


ALPHA_BAR = np.array([0.9, 0.4, 0.02])


def test_eq_6_noisy_latent(rng: np.random.Generator) -> None:
    z_0, eps = latents(rng), latents(rng)
    truth = np.empty_like(z_0)
    for b in range(B):
        for i in np.ndindex(z_0.shape[1:]):
            truth[b][i] = math.sqrt(ALPHA_BAR[b]) * z_0[b][i] + math.sqrt(1 - ALPHA_BAR[b]) * eps[b][i]
    found = noisy_latent(double(z_0), double(eps), double(ALPHA_BAR))
    np.testing.assert_allclose(found.numpy(), truth, rtol=1e-12)


@pytest.mark.parametrize("schedule", [TOY.schedule, NoiseSchedule(beta_curve="scaled_linear")])
def test_eq_5_and_6_alpha_bar_is_the_product_of_one_minus_beta(schedule: NoiseSchedule) -> None:
    alpha_bar = MultiviewModel(replace(TOY, schedule=schedule)).alpha_bar
    np.testing.assert_allclose(alpha_bar.numpy(), alpha_bars(schedule), atol=1e-7)
    if not schedule.zero_terminal_snr:
        product = 1.0
        for t in range(schedule.train_steps):
            a, b = schedule.beta_start**0.5, schedule.beta_end**0.5
            product *= 1.0 - (a + (b - a) * t / (schedule.train_steps - 1)) ** 2
        assert float(alpha_bar[-1]) == pytest.approx(product, rel=1e-5)


def test_v_and_eps_say_the_same(rng: np.random.Generator) -> None:
    z_0, eps, a = double(latents(rng)), double(latents(rng)), double(ALPHA_BAR)
    z_t, v = noisy_latent(z_0, eps, a), velocity(z_0, eps, a)
    np.testing.assert_allclose(predicted_z_0(v, z_t, a, "v"), z_0, atol=1e-12)
    np.testing.assert_allclose(predicted_z_0(eps, z_t, a, "eps"), z_0, atol=1e-12)
    root = a.reshape(-1, 1, 1, 1, 1)
    np.testing.assert_allclose(root.sqrt() * v + (1 - root).sqrt() * z_t, eps, atol=1e-12)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_training_and_sampler_read_a_prediction_alike(rng: np.random.Generator, kind: str) -> None:
    z_t, prediction = (latents(rng).astype(np.float32) for _ in range(2))
    trained = predicted_z_0(double(prediction), double(z_t), double(ALPHA_BAR).float(), kind)
    for b in range(B):
        keep, add = step_weights(float(ALPHA_BAR[b]), 1.0, kind)
        sampled = keep * z_t[b] + add * prediction[b]
        np.testing.assert_allclose(trained[b], sampled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_eq_9_diffusion(rng: np.random.Generator, kind: str) -> None:
    prediction, z_0, eps = latents(rng), latents(rng), latents(rng)
    truth = 0.0
    for i in range(V):  # the sum over views
        for b in range(B):  # the expectation over z_0, t, eps
            for entry in np.ndindex(C, H, W):
                target = eps[b, i][entry]
                if kind == "v":
                    a = ALPHA_BAR[b]
                    target = math.sqrt(a) * eps[b, i][entry] - math.sqrt(1 - a) * z_0[b, i][entry]
                truth += (target - prediction[b, i][entry]) ** 2 / (B * C * H * W)
    found = diffusion_loss(double(prediction), double(z_0), double(eps), double(ALPHA_BAR), kind)
    assert float(found) == pytest.approx(truth, rel=1e-5)


def test_the_error_of_v_is_the_error_of_eps_over_alpha_bar(rng: np.random.Generator) -> None:
    a, z_0, eps, v_hat = double(ALPHA_BAR), *(double(latents(rng)) for _ in range(3))
    root = a.reshape(-1, 1, 1, 1, 1)
    eps_hat = root.sqrt() * v_hat + (1 - root).sqrt() * noisy_latent(z_0, eps, a)
    of_v = (velocity(z_0, eps, a) - v_hat).square().sum(dim=(1, 2, 3, 4))
    of_eps = (eps - eps_hat).square().sum(dim=(1, 2, 3, 4))
    np.testing.assert_allclose(of_v, of_eps / a, rtol=1e-10)


def test_eq_11_to_13_variance(rng: np.random.Generator) -> None:
    objects, draws, views, entries = 2, 3, 4, 5
    f = rng.normal(size=(objects, draws, views, entries))
    truth = 0.0
    for i in range(views):  # Eq. 13
        for b in range(objects):
            mean = sum(f[b, k, i] for k in range(draws)) / draws
            squared = sum(float(((f[b, k, i] - mean) ** 2).sum()) for k in range(draws))
            truth += squared / draws / (objects * entries)  # Eq. 11, as a mean over entries
    assert float(variance_loss(double(f))) == pytest.approx(truth, rel=1e-5)


def test_variance_is_zero_when_draws_agree(rng: np.random.Generator) -> None:
    one = double(rng.normal(size=(2, 1, 3, 5)))
    assert float(variance_loss(one.expand(-1, 4, -1, -1))) == pytest.approx(0.0, abs=1e-12)


def test_eq_16_and_17_mutual_information(rng: np.random.Generator) -> None:
    views, pairs, dim, tau = 3, 4, 5, 0.2
    x, n = rng.normal(size=(2, views, pairs, dim))
    truth = 0.0
    for i in range(views):  # Eq. 17
        for k in range(pairs):

            def similarity(j: int, i: int = i, k: int = k) -> float:
                u, v = x[i, k], n[i, j]
                return float(u @ v / (np.linalg.norm(u) * np.linalg.norm(v)))

            bottom = sum(math.exp(similarity(j) / tau) for j in range(pairs))
            truth -= math.log(math.exp(similarity(k) / tau) / bottom) / pairs  # Eq. 16
    assert float(mutual_information_loss(double(x), double(n), tau)) == pytest.approx(truth, rel=1e-5)


def test_mutual_information_is_least_for_aligned_pairs() -> None:
    codes = torch.eye(6)[None]
    aligned = float(mutual_information_loss(codes, codes, 0.1))
    assert aligned < 1e-2
    for shift in range(1, 6):
        assert float(mutual_information_loss(codes, codes.roll(shift, dims=1), 0.1)) > 5.0
    same = torch.ones(1, 6, 3)
    assert float(mutual_information_loss(same, same, 0.1)) == pytest.approx(math.log(6), rel=1e-5)


def test_similarity_is_not_rounded_under_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    x, n = torch.randn(2, 1, 8, 128, generator=generator)
    exact = mutual_information_loss(x, n, 0.01)
    with torch.autocast("cpu", torch.bfloat16):
        assert float(mutual_information_loss(x, n, 0.01)) == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: diffusion_loss(
            x.reshape(2, 1, 2, 2, 2), *torch.ones(2, 2, 1, 2, 2, 2), torch.tensor([0.3, 0.8]), "v"
        ),
        lambda x: variance_loss(x.reshape(2, 2, 2, 2)),
        lambda x: mutual_information_loss(x[:8].reshape(1, 4, 2), x[8:].reshape(1, 4, 2), 0.5),
    ],
    ids=["diffusion", "variance", "mutual-information"],
)
def test_gradients_against_finite_differences(loss: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x)
    step = 1e-2  # the losses work in float32
    for index in range(16):
        nudge = torch.zeros(16)
        nudge[index] = step
        with torch.no_grad():
            slope = float(loss(x + nudge) - loss(x - nudge)) / (2 * step)
        assert slope == pytest.approx(float(gradient[index]), rel=2e-2, abs=2e-3)


# What `MultiviewModel.forward` feeds them.


def toy(drop_image: float = 0.1, **losses: float) -> Preset:
    return with_train(TOY, drop_image=drop_image, losses=replace(TOY.train.losses, **losses))


def batch_of(b: int, preset: Preset = TOY) -> Batch:
    generator = torch.Generator().manual_seed(2)
    shape = preset.shape

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    side, c = shape.latent_px, shape.latent_channels
    return Batch(
        z_0=normal(b, 6, 2 * c, side, side),
        image=torch.rand((b, 3, shape.image_px, shape.image_px), generator=generator),
        image_latent=normal(b, c, side, side),
        focal=torch.linspace(0.5, 3.0, b),
    )


class Spy:
    """Records what one forward pass of a MultiviewModel hands to the UNet and to the losses."""

    def __init__(self, preset: Preset, b: int, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> None:
        torch.manual_seed(0)
        model, vae = MultiviewModel(preset), Vae(preset.vae).eval().requires_grad_(False)
        self.calls: dict[str, tuple] = {}
        watched = (
            "noisy_latent", "diffusion_loss", "outline_loss", "normal_loss", "variance_loss",
            "mutual_information_loss",
        )  # fmt: skip
        for name in watched:
            monkeypatch.setattr(model_module, name, self.watch(name, getattr(model_module, name)))
        model.contrast = self.watch("contrast", model.contrast)  # type: ignore[method-assign]
        model.unet.register_forward_hook(lambda _m, given, _o: self.calls.__setitem__("unet", given))
        self.batch, self.model = batch_of(b, preset), model
        self.probe = NormalProbe(preset.unet.latent_channels).requires_grad_(False)
        self.losses = model(self.batch, vae, torch.Generator().manual_seed(seed), self.probe)

    def watch(self, name: str, function: Callable) -> Callable:
        def watched(*given: Tensor) -> Tensor:
            self.calls[name] = given
            return function(*given)

        return watched


def test_draws_share_latent_and_timestep_but_not_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    spy, b, group = Spy(toy(var_draws=3), 7, monkeypatch), 7, 4
    z_0, eps, _ = spy.calls["noisy_latent"]
    t = spy.calls["unet"][1]
    assert z_0.shape[0] == t.shape[0] == b + 2 * group
    for draw in (1, 2):
        rows = slice(b + (draw - 1) * group, b + draw * group)
        assert torch.equal(z_0[rows], spy.batch.z_0[:group]) and torch.equal(t[rows], t[:group])
        assert torch.equal(spy.calls["unet"][2][rows], spy.calls["unet"][2][:group])  # tokens
        assert torch.equal(spy.calls["unet"][4][rows], spy.calls["unet"][4][:group])  # f~
    noises = [eps[:group], eps[b : b + group], eps[b + group :]]
    for i in range(3):
        for j in range(i):
            assert (noises[i] - noises[j]).abs().mean() > 0.5
    assert len(set(t[group:b].tolist())) > 1  # the others have timesteps of their own
    features = spy.calls["variance_loss"][0]
    assert features.shape[:3] == (group, 3, 6)


def test_features_of_a_view_stand_with_their_own_object_and_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    spy, b, group = Spy(toy(), 6, monkeypatch), 6, 4
    with torch.no_grad():
        spy.model.unet(*spy.calls["unet"])
    features = spy.model.unet.mid_features.reshape(b + group, 6, -1)
    paired = spy.calls["variance_loss"][0]
    for k in range(group):
        np.testing.assert_allclose(paired[k, 0].detach(), features[k], atol=1e-5)
        np.testing.assert_allclose(paired[k, 1].detach(), features[b + k], atol=1e-5)


@pytest.mark.parametrize("b", [7, 4])
def test_negatives_are_other_objects_at_the_same_t_and_eps(b: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # mi_objects above what a batch of four holds: later draws of the same objects are no negatives.
    spy = Spy(toy(drop_image=0.0, mi_objects=6, var_objects=3), b, monkeypatch)
    z_0, eps, alpha_bar = spy.calls["noisy_latent"]
    prediction, z_t, contrast_alpha_bar = spy.calls["contrast"][:3]
    k = min(6, b)
    assert prediction.shape[0] == z_t.shape[0] == k
    assert torch.equal(z_t, noisy_latent(spy.batch.z_0, eps[:b], alpha_bar[:b])[:k])
    assert torch.equal(contrast_alpha_bar, alpha_bar[:1].expand(k))
    assert all(torch.equal(eps[0], eps[j]) for j in range(k))
    assert all(not torch.equal(z_0[0], z_0[j]) for j in range(1, k))
    color, normal, tau = spy.calls["mutual_information_loss"]
    assert color.shape == normal.shape == (1, k, TOY.heads.embedding_dim)
    assert tau == TOY.train.losses.temperature


def test_contrast_pairs_the_colour_and_normal_of_one_object_and_view(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = toy(drop_image=0.0, mi_views=2)
    spy = Spy(preset, 5, monkeypatch)
    prediction, z_t, alpha_bar, vae, _ = spy.calls["contrast"]
    views = torch.randperm(6, generator=torch.Generator().manual_seed(9))[:2]
    loss = spy.model.contrast(prediction, z_t, alpha_bar, vae, torch.Generator().manual_seed(9))
    color, normal, _ = spy.calls["mutual_information_loss"]
    for i, view in enumerate(views):
        for k in range(4):
            z_0 = predicted_z_0(prediction[k : k + 1], z_t[k : k + 1], alpha_bar[k : k + 1], "v")[:, view]
            pictures = vae.decode(torch.cat([z_0[:, :4], z_0[:, 4:]])).clamp(0, 1)
            x, n = spy.model.heads(pictures[:1], pictures[1:])
            torch.testing.assert_close(color[i, k], x[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(normal[i, k], n[0], atol=1e-5, rtol=1e-4)
    # Two of six views stand for all of them (Eq. 17).
    of_two = mutual_information_loss(color, normal, 0.1)
    assert float(loss.detach()) == pytest.approx(3 * float(of_two.detach()), rel=1e-5)


def test_unconditional_branch_never_touches_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    b, group = 7, 4
    spy = Spy(toy(drop_image=1.0), b, monkeypatch)
    _, _, tokens, image_latent, _ = spy.calls["unet"]
    empty = tokens.abs().sum(dim=(1, 2)) == 0
    assert empty.tolist() == [False] * group + [True] * (b - group) + [False] * group
    # Image tokens and E(y) go together.
    assert torch.equal(image_latent.abs().sum(dim=(1, 2, 3)) == 0, empty)


def test_errors_weighted_by_themselves_count_as_their_logarithms() -> None:
    scale = torch.linspace(0.5, 2.0, 5, dtype=torch.float64).requires_grad_()
    errors = torch.stack([scale.square(), 3 * scale.square() + 1], dim=1)
    every = torch.ones(5, dtype=torch.bool)
    for power in (0.0, 0.5, 1.0):
        weighted = relative_weights(errors, every, power) * errors
        torch.testing.assert_close(weighted.sum(dim=0), errors.sum(dim=0))
    torch.testing.assert_close(relative_weights(errors, every, 0.0), torch.ones_like(errors))
    weighted = (relative_weights(errors, every, 1.0) * errors).mean()
    (found,) = torch.autograd.grad(weighted, scale, retain_graph=True)
    (truth,) = torch.autograd.grad((errors.log().mean(dim=0) * errors.detach().mean(dim=0)).mean(), scale)
    torch.testing.assert_close(found, truth)
    some = torch.tensor([True, False, True, False, False])
    weights = relative_weights(errors, some, 1.0)
    assert (weights[~some] == 1).all() and weights[0, 0] > 1 > weights[2, 0]
    # One that is all but right already does not take the whole gradient, and none at all is no error.
    assert relative_weights(torch.tensor([[1e-9], [1.0]]), every[:2], 1.0).max() < 30
    assert (relative_weights(errors, ~every, 1.0) == 1).all()


def test_diffusion_loss_weights_colours_and_normals_of_the_samples_named(rng: np.random.Generator) -> None:
    z_0, eps, guess = latents(rng), latents(rng), latents(rng)
    where, power = torch.tensor([True, False, True]), 0.7
    error = np.zeros((B, 2))
    for b, v, c, y, x in np.ndindex(z_0.shape):
        target = math.sqrt(ALPHA_BAR[b]) * eps[b, v, c, y, x]
        target -= math.sqrt(1 - ALPHA_BAR[b]) * z_0[b, v, c, y, x]
        error[b, c // (C // 2)] += (guess[b, v, c, y, x] - target) ** 2 / (V * C // 2 * H * W)
    truth = error.copy()
    for half in range(2):
        weights = error[[0, 2], half] ** -power
        weights *= error[[0, 2], half].sum() / (weights * error[[0, 2], half]).sum()
        truth[[0, 2], half] *= weights
    arguments = double(guess), double(z_0), double(eps), double(ALPHA_BAR), "v"
    found = diffusion_loss(*arguments, (where, power))
    assert float(found) == pytest.approx(V * truth.mean(), rel=1e-6)
    assert float(diffusion_loss(*arguments, (where, 0.0))) == pytest.approx(float(diffusion_loss(*arguments)))


def test_outline_loss_is_one_minus_intersection_over_union(rng: np.random.Generator) -> None:
    mask, truth = rng.random((2, B, V, 5, 5)) > 0.5
    lost = np.zeros(B)
    for b, v in np.ndindex(B, V):
        lost[b] += 1 - (mask[b, v] & truth[b, v]).sum() / (mask[b, v] | truth[b, v]).sum()
    logits = double(np.where(mask, 60.0, -60.0))
    every = torch.ones(B, dtype=torch.bool)
    found = outline_loss(logits, double(truth.astype(float)), every)
    assert float(found) == pytest.approx(lost.mean(), rel=1e-5)
    some = torch.tensor([False, True, True])
    found = outline_loss(logits, double(truth.astype(float)), some)
    assert float(found) == pytest.approx(lost[1:].mean(), rel=1e-5)
    assert float(outline_loss(logits, double(truth.astype(float)), ~every)) == 0
    soft, cover = double(rng.normal(size=(B, V, 5, 5))), double(rng.random((B, V, 5, 5)))
    p, q = 1 / (1 + np.exp(-soft.numpy())), cover.numpy()
    ratio = (p * q).sum((2, 3)) / (p + q - p * q).sum((2, 3))
    assert float(outline_loss(soft, cover, every)) == pytest.approx((1 - ratio).sum(1).mean(), rel=1e-5)


def test_normal_loss_is_the_mean_angle_within_the_silhouette(rng: np.random.Generator) -> None:
    truth = rng.normal(size=(B, V, 3, 5, 5))
    axis = np.cross(truth, rng.normal(size=truth.shape), axis=2)
    angle = rng.uniform(0, 0.4, (B, V, 1, 5, 5))  # a chord is an angle up to there
    unit, side = (v / np.linalg.norm(v, axis=2, keepdims=True) for v in (truth, axis))
    turned = unit * np.cos(angle) + side * np.sin(angle)
    cover = rng.random((B, V, 5, 5)) * (rng.random((B, V, 5, 5)) > 0.3)
    soft = np.sqrt(angle[:, :, 0] ** 2 + 0.1**2) - 0.1
    means = ((soft * cover).sum((2, 3)) / cover.sum((2, 3))).sum(1)
    some = torch.tensor([False, True, True])
    lengths = rng.uniform(0.2, 3, (B, V, 1, 5, 5))  # tell nothing
    found = normal_loss(double(turned * lengths), double(truth), double(cover), some)
    assert float(found) == pytest.approx(means[1:].mean(), rel=0.01)
    assert float(normal_loss(double(truth), double(truth), double(cover), ~some)) == pytest.approx(
        0, abs=1e-4
    )
    assert float(normal_loss(double(turned), double(truth), double(cover), some & ~some)) == 0
    same = double(truth).requires_grad_()
    normal_loss(same, double(truth), double(cover), some).backward()
    assert same.grad is not None and torch.isfinite(same.grad).all()


def test_terms_at_the_last_timestep_see_its_samples_with_their_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    preset = with_train(
        toy(relative_power=0.5, lambda_outline=0.3, lambda_normal=0.2, drop_image=0.5), last_share=0.6
    )
    spy = Spy(preset, 12, monkeypatch)
    t, tokens = spy.calls["unet"][1], spy.calls["unet"][2]
    wanted = (t == TOY.schedule.train_steps - 1) & (tokens.abs().sum(dim=(1, 2)) > 0)
    assert 0 < wanted.sum() < len(wanted)
    assert torch.equal(spy.calls["diffusion_loss"][5][0], wanted) and spy.calls["diffusion_loss"][5][1] == 0.5
    logits, truth, where = spy.calls["outline_loss"]
    assert torch.equal(where, wanted) and logits.shape == truth.shape == (len(wanted), 6, 16, 16)
    normals = spy.calls["noisy_latent"][0][:, :, 4:]
    cells = torch.stack([spy.probe(view) for view in normals])
    torch.testing.assert_close(truth, cells[:, :, 0].sigmoid())
    normal, true_normal, coverage, where = spy.calls["normal_loss"]
    assert torch.equal(where, wanted) and normal.shape == true_normal.shape == (len(wanted), 6, 3, 16, 16)
    torch.testing.assert_close(true_normal, cells[:, :, 1:])
    assert coverage is truth
    losses = spy.losses
    total = losses["diffusion"] + 0.01 * losses["var"] + 0.05 * losses["mi"]
    total = total + 0.3 * losses["outline"] + 0.2 * losses["normal"]
    torch.testing.assert_close(losses["total"], total)


def test_eq_18_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = Spy(toy(lambda_var=0.3, lambda_mi=0.7), 6, monkeypatch).losses
    total = losses["diffusion"] + 0.3 * losses["var"] + 0.7 * losses["mi"]
    torch.testing.assert_close(losses["total"], total)
    assert (LossWeights().lambda_var, LossWeights().lambda_mi) == (0.01, 0.05)  # Sec. 4.1.3


@pytest.mark.parametrize(
    "off", [{"lambda_var": 0.0}, {"lambda_mi": 0.0}, {"lambda_var": 0.0, "lambda_mi": 0.0}]
)
def test_a_term_of_weight_zero_costs_nothing(off: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(toy(**off), 6, monkeypatch)
    assert ("var" in spy.losses) == ("lambda_var" not in off)
    assert ("mi" in spy.losses) == ("lambda_mi" not in off)
    # K draws are made for L_Var alone.
    assert spy.calls["unet"][1].shape[0] == (6 if "lambda_var" in off else 10)
    if len(off) == 2:
        assert torch.equal(spy.losses["total"], spy.losses["diffusion"])
        assert len(set(spy.calls["unet"][1].tolist())) > 1


def test_every_parameter_learns_and_the_autoencoder_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = toy(drop_image=0.5)
    spy = Spy(with_train(preset, drop_focal=0.5), 8, monkeypatch)
    spy.losses["total"].backward()
    silent = [name for name, p in spy.model.named_parameters() if p.grad is None or not p.grad.any()]
    # Row-wise attention starts as zero: its output layer learns first, then the rest.
    waiting = (".attn_row.", ".norm_row.", "focal_embedding.0")
    assert all(any(part in name for part in waiting) for name in silent)
    assert spy.model.unet.mid_features is None  # would keep the graph alive between steps
