"""DDIM and guidance against an independent transcription and against diffusers."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from uc3d_rt.contract import NoiseSchedule
from uc3d_rt.sampler import (
    Denoiser,
    after_first_step,
    alpha_bars,
    ddim_steps,
    guided,
    run_steps,
    step_weights,
    trailing_timesteps,
)

SCHEDULES = {
    "eps-linear": NoiseSchedule(),
    "eps-scaled": NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_curve="scaled_linear"),
    "v-zero-snr": NoiseSchedule(
        beta_start=0.00085, beta_end=0.012, beta_curve="scaled_linear", zero_terminal_snr=True, prediction="v"
    ),
}


def ddim(denoise: Denoiser, z_T: np.ndarray, schedule: NoiseSchedule, **options: Any) -> np.ndarray:
    """All steps of a plan with these options of `ddim_steps`."""
    on_step = options.pop("on_step", None)
    plan = ddim_steps(schedule, options.pop("steps"), **options)
    return run_steps(denoise, z_T, plan, options.get("guidance", 3.0), on_step=on_step)


def toy_network(z_t: np.ndarray, t: float) -> np.ndarray:
    return np.tanh(0.7 * z_t + 0.001 * t).astype(z_t.dtype)


def diffusers_scheduler(schedule: NoiseSchedule):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers")
        return diffusers.DDIMScheduler(
            num_train_timesteps=schedule.train_steps,
            beta_start=schedule.beta_start,
            beta_end=schedule.beta_end,
            beta_schedule=schedule.beta_curve,
            prediction_type="v_prediction" if schedule.prediction == "v" else "epsilon",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=schedule.zero_terminal_snr,
            clip_sample=False,
            set_alpha_to_one=True,
        )


@pytest.mark.parametrize("name", SCHEDULES)
def test_alpha_bars_match_diffusers(name: str) -> None:
    scheduler = diffusers_scheduler(SCHEDULES[name])
    np.testing.assert_allclose(alpha_bars(SCHEDULES[name]), scheduler.alphas_cumprod.numpy(), atol=2e-6)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 5, 50])
def test_ddim_matches_diffusers(name: str, steps: int) -> None:
    torch = pytest.importorskip("torch")
    schedule = SCHEDULES[name]
    z_T = np.random.default_rng(0).standard_normal((6, 8, 4, 4), dtype=np.float32)
    ours = ddim(lambda z, t, _: (toy_network(z, t), None), z_T, schedule, steps=steps, guidance=1.0)

    scheduler = diffusers_scheduler(schedule)
    scheduler.set_timesteps(steps)
    np.testing.assert_array_equal(scheduler.timesteps.numpy(), trailing_timesteps(1000, steps))
    z_t = torch.from_numpy(z_T)
    for t in scheduler.timesteps:
        prediction = torch.from_numpy(toy_network(z_t.numpy(), float(t)))
        z_t = scheduler.step(prediction, int(t), z_t, eta=0.0).prev_sample
    # eps at alpha_bar = 4e-5 multiplies rounding by 158 a step; hence relative to the values' size.
    np.testing.assert_allclose(ours, z_t.numpy(), rtol=2e-3, atol=2e-4 * float(np.abs(ours).max()))


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_ddim_matches_the_paper_in_float64(prediction: str) -> None:
    """Eq. 5-6 and DDIM with eta = 0, written out scalar by scalar."""
    schedule = NoiseSchedule(train_steps=40, beta_start=1e-3, beta_end=0.05, prediction=prediction)
    z_T = np.random.default_rng(1).standard_normal((2, 3), dtype=np.float32)
    ours = ddim(lambda z, t, _: (toy_network(z, t), None), z_T, schedule, steps=8, guidance=1.0)

    alpha_bar, product = [], 1.0
    for t in range(40):
        product *= 1.0 - (1e-3 + (0.05 - 1e-3) * t / 39)
        alpha_bar.append(product)
    z = z_T.astype(np.float64)
    for t in range(39, -1, -5):
        a = alpha_bar[t]
        out = toy_network(z, float(t))
        if prediction == "v":
            eps, z_0 = a**0.5 * out + (1 - a) ** 0.5 * z, a**0.5 * z - (1 - a) ** 0.5 * out
        else:
            eps, z_0 = out, (z - (1 - a) ** 0.5 * out) / a**0.5
        before = alpha_bar[t - 5] if t >= 5 else 1.0
        z = before**0.5 * z_0 + (1 - before) ** 0.5 * eps
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("previous", [0.0, 0.6, 1.0])
def test_a_step_goes_where_ddim_goes(previous: float) -> None:
    rng = np.random.default_rng(2)
    z_0, eps = rng.standard_normal((2, 4, 5))
    a = 0.37
    z_t, v = a**0.5 * z_0 + (1 - a) ** 0.5 * eps, a**0.5 * eps - (1 - a) ** 0.5 * z_0
    wanted = previous**0.5 * z_0 + (1 - previous) ** 0.5 * eps
    for prediction, kind in ((eps, "eps"), (v, "v")):
        keep, add = step_weights(a, previous, kind)
        np.testing.assert_allclose(keep * z_t + add * prediction, wanted, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 4])
def test_after_the_first_step_stands_what_ddim_has_there(name: str, steps: int) -> None:
    """From the z_0 that the network's answer amounts to, instead of from the answer."""
    schedule, plan = SCHEDULES[name], ddim_steps(SCHEDULES[name], steps, guidance=1.0, first_step_to=0.3)
    z_T = np.random.default_rng(3).standard_normal((6, 8, 4, 4), dtype=np.float32)
    network = lambda z, t, _: (toy_network(z, t), None)  # noqa: E731
    z_0 = run_steps(network, z_T, ddim_steps(schedule, 1, guidance=1.0), 1.0)
    wanted = run_steps(network, z_T, plan[:1], 1.0)
    np.testing.assert_allclose(after_first_step(z_0, z_T, schedule, plan), wanted, rtol=1e-4, atol=1e-4)


def test_the_steps_of_a_run() -> None:
    schedule = NoiseSchedule(zero_terminal_snr=True, prediction="v")
    plan = ddim_steps(schedule, 5, guidance_interval=(0.4, 0.5), first_step_to=0.5)
    assert [(step.t, step.guided) for step in plan] == [
        (999, False), (499, True), (374, False), (249, False), (124, False)
    ]  # fmt: skip
    after = alpha_bars(schedule)[499]
    # At zero SNR the prediction is -z_0, and z_t is all noise.
    assert (plan[0].keep, plan[0].add) == pytest.approx(((1 - after) ** 0.5, -(after**0.5)))
    assert not any(step.guided for step in ddim_steps(schedule, 5, guidance=1.0))


def test_guidance_formula_and_rescale() -> None:
    c, u = np.array([[1.0, 3.0]], np.float32), np.array([[0.0, 1.0]], np.float32)
    np.testing.assert_allclose(guided(c, u, 3.0), [[3.0, 7.0]])
    np.testing.assert_allclose(guided(c, u, 1.0), c)
    np.testing.assert_allclose(guided(c, u, 3.0, rescale=1.0).std(), c.std(), rtol=1e-6)


def test_guidance_acts_only_in_its_interval() -> None:
    asked = []

    def denoise(z, t, acts):
        asked.append((t, acts))
        return np.zeros_like(z), np.zeros_like(z) if acts else None

    z_T = np.ones((1, 2), np.float32)
    ddim(denoise, z_T, NoiseSchedule(), steps=4, guidance=3.0, guidance_interval=(0.3, 0.8))
    assert asked == [(999.0, False), (749.0, True), (499.0, True), (249.0, False)]
    asked.clear()
    ddim(denoise, z_T, NoiseSchedule(), steps=2, guidance=1.0)
    assert [acts for _, acts in asked] == [False, False]


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range(steps: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 1000"):
        trailing_timesteps(1000, steps)


@pytest.mark.parametrize("steps", [1, 3, 7, 30, 999, 1000])
def test_trailing_timesteps_fall_from_the_last(steps: int) -> None:
    t = trailing_timesteps(1000, steps)
    assert len(t) == steps and t[0] == 999 and (np.diff(t) < 0).all() and t[-1] >= 0


@pytest.mark.parametrize(("steps", "share"), [(2, 0.5), (10, 0.4), (50, 0.5), (501, 0.5)])
def test_a_long_first_step(steps: int, share: float) -> None:
    """T - 1, then the trailing timesteps of a schedule that ends at the share of T."""
    t = trailing_timesteps(1000, steps, share)
    assert len(t) == steps and t[0] == 999 and t[1] == share * 1000 - 1 and (np.diff(t) < 0).all()
    np.testing.assert_array_equal(t[1:], trailing_timesteps(int(share * 1000), steps - 1))
    assert trailing_timesteps(1000, 1, share).tolist() == [999]


def test_a_long_first_step_leaves_too_few() -> None:
    with pytest.raises(ValueError, match=r"501 steps do not fit below t = 500; take fewer steps"):
        trailing_timesteps(1000, 502, 0.5)


def test_the_first_step_keeps_what_the_network_knows_at_T() -> None:
    """At T the answer is the mean; with no noise to start from, the next input is that mean alone."""
    seen = []
    mean = np.full((1, 2), 0.7, np.float32)

    def denoise(z: np.ndarray, t: float, acts: bool) -> tuple[np.ndarray, None]:
        seen.append((t, z.copy()))
        return -mean, None  # v = -z_0 at alpha_bar = 0

    schedule = NoiseSchedule(zero_terminal_snr=True, prediction="v")
    ddim(denoise, np.zeros((1, 2), np.float32), schedule, steps=3, guidance=1.0, first_step_to=0.5)
    alpha_bar = alpha_bars(schedule)
    assert [t for t, _ in seen] == [999.0, 499.0, 249.0]
    np.testing.assert_allclose(seen[1][1], np.sqrt(alpha_bar[499]) * mean, rtol=1e-6)


def test_on_step_counts() -> None:
    seen = []
    z_T = np.ones((1, 1), np.float32)
    ddim(lambda z, t, _: (z, None), z_T, NoiseSchedule(), steps=3, guidance=1.0,
         on_step=lambda done, total: seen.append((done, total)))  # fmt: skip
    assert seen == [(1, 3), (2, 3), (3, 3)]
