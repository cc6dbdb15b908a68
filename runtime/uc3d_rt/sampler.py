"""DDIM and classifier-free guidance, as functions on NumPy arrays.

Symbols follow the paper: `alpha_bar` (Eq. 6), `eps`, `z_t`.  A UNet may predict `eps` or
`v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) z_0`.  Deterministic DDIM is linear in `z_t` and in the
prediction, so a step is two numbers, known before the network is first called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.contract import NoiseSchedule, SamplingDefaults

FloatArray = NDArray[np.float32]
Denoiser = Callable[[FloatArray, float, bool], tuple[FloatArray, FloatArray | None]]
"""`(z_t, t, guided) -> (conditional, unconditional)` predictions; the second is None unless guided."""


def alpha_bars(schedule: NoiseSchedule) -> NDArray[np.float64]:
    """`alpha_bar_t` for t = 0 … T-1 (Eq. 6), shape (T,), float64.

    With `zero_terminal_snr` the square roots are shifted and scaled so that the last is 0 and the
    first unchanged (Lin et al., "Common diffusion noise schedules and sample steps are flawed").
    """
    if schedule.beta_curve == "linear":
        betas = np.linspace(schedule.beta_start, schedule.beta_end, schedule.train_steps)
    else:
        betas = np.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, schedule.train_steps) ** 2
    alpha_bar = np.cumprod(1.0 - betas)
    if schedule.zero_terminal_snr and schedule.train_steps > 1:
        root = np.sqrt(alpha_bar)
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        alpha_bar = root**2
    return np.asarray(alpha_bar, np.float64)


def trailing_timesteps(train_steps: int, steps: int, first_step_to: float = 1.0) -> NDArray[np.int64]:
    """The DDIM timesteps, high to low, "trailing" spacing: the first is always T-1, shape (steps,).

    With `first_step_to` below 1 the second is `first_step_to * T - 1` and the rest are spaced below
    it.  At T nothing but the picture is known, and the network answers with the mean of all that it
    may show: a long first step keeps that mean's layout and leaves the detail to be sampled.
    """
    if not 1 <= steps <= train_steps:
        raise ValueError(f"steps must be between 1 and {train_steps}, got {steps}")
    if first_step_to >= 1.0 or steps == 1:
        return np.round(np.arange(train_steps, 0, -train_steps / steps)).astype(np.int64)[:steps] - 1
    rest = round(first_step_to * train_steps)
    if rest < steps - 1:
        raise ValueError(
            f"{steps - 1} steps do not fit below t = {rest}; take fewer steps, or a larger first_step_to"
        )
    return np.concatenate([[train_steps - 1], trailing_timesteps(rest, steps - 1)])


def step_weights(alpha_bar: float, previous: float, kind: str) -> tuple[float, float]:
    """`(keep, add)` of a DDIM step: `z_previous = keep z_t + add prediction`.

    That is `sqrt(previous) z_0 + sqrt(1 - previous) eps` of the `(z_0, eps)` that the prediction implies.

    Args:
        alpha_bar: at z_t.
        previous: alpha_bar after the step; 1 gives z_0, 0 gives eps.
        kind: "eps" or "v", what is predicted.
    """
    signal, noise = alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5
    to_z_0, to_eps = previous**0.5, (1.0 - previous) ** 0.5
    if kind == "v":  # z_0 = signal z_t - noise v, eps = signal v + noise z_t
        return to_z_0 * signal + to_eps * noise, to_eps * signal - to_z_0 * noise
    return to_z_0 / signal, to_eps - to_z_0 * noise / signal  # z_0 = (z_t - noise eps) / signal


@dataclass(frozen=True)
class Step:
    """One call of the network and what becomes of `z_t`."""

    t: int
    guided: bool
    keep: float  # of z_t
    add: float  # of the prediction


def sampling_steps(schedule: NoiseSchedule, sampling: SamplingDefaults) -> tuple[Step, ...]:
    """The steps of `ddim_steps`, as these settings have them."""
    return ddim_steps(
        schedule,
        sampling.steps,
        guidance=sampling.guidance,
        guidance_interval=sampling.guidance_interval,
        first_step_to=sampling.first_step_to,
    )


def ddim_steps(
    schedule: NoiseSchedule,
    steps: int,
    *,
    guidance: float = 3.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    first_step_to: float = 1.0,
) -> tuple[Step, ...]:
    """All steps of deterministic DDIM (eta = 0), trailing timesteps.

    Args:
        guidance: scale; 1 turns guidance off.
        guidance_interval: guidance acts where `lo <= (t + 1) / T <= hi`; outside it the
            conditional prediction alone is used (Kynkäänniemi et al., "Applying guidance in a
            limited interval").
        first_step_to: see `trailing_timesteps`.
    """
    alpha_bar = alpha_bars(schedule)
    timesteps = [int(t) for t in trailing_timesteps(schedule.train_steps, steps, first_step_to)]
    low, high = guidance_interval
    plan = []
    for t, after in zip(timesteps, [*timesteps[1:], None], strict=True):
        acts = guidance != 1.0 and low <= (t + 1) / schedule.train_steps <= high
        previous = 1.0 if after is None else float(alpha_bar[after])
        plan.append(Step(t, acts, *step_weights(float(alpha_bar[t]), previous, schedule.prediction)))
    return tuple(plan)


def after_first_step(
    z_0: FloatArray, z_T: FloatArray, schedule: NoiseSchedule, plan: Sequence[Step]
) -> FloatArray:
    """What the first step of a plan makes of z_T where the network's answer amounts to this z_0."""
    alpha_bar = alpha_bars(schedule)
    a = float(alpha_bar[plan[0].t])
    previous = 1.0 if len(plan) == 1 else float(alpha_bar[plan[1].t])
    eps = (z_T - np.float32(a**0.5) * z_0) / np.float32((1.0 - a) ** 0.5)
    z_t = np.float32(previous**0.5) * z_0 + np.float32((1.0 - previous) ** 0.5) * eps
    return z_t.astype(np.float32)


def guided(
    conditional: FloatArray, unconditional: FloatArray, scale: float, rescale: float = 0.0
) -> FloatArray:
    """Classifier-free guidance: `u + scale (c - u)`, optionally with its spread pulled to `c`'s.

    `rescale` in [0, 1] mixes in the result scaled to the standard deviation of the conditional
    prediction (Lin et al., Eq. 15-16); 0 is plain guidance.
    """
    out = unconditional + np.float32(scale) * (conditional - unconditional)
    if rescale > 0.0:
        axes = tuple(range(1, out.ndim))
        ratio = conditional.std(axis=axes, keepdims=True) / np.maximum(
            out.std(axis=axes, keepdims=True), 1e-8
        )
        out = out * (np.float32(rescale) * ratio + np.float32(1.0 - rescale))
    return out.astype(np.float32)


def run_steps(
    denoise: Denoiser,
    z_T: FloatArray,
    plan: Sequence[Step],
    guidance: float,
    guidance_rescale: float = 0.0,
    on_step: Callable[[int, int], None] | None = None,
) -> FloatArray:
    """All steps of a plan, from `z_T` (views, channels, h, w) to `z_0`, of the same shape.

    Args:
        denoise: the network; asked for the unconditional branch only where guidance acts.
        guidance: scale that the plan was made for.
        guidance_rescale: see `guided`.
        on_step: told `(done, steps)` after each step.
    """
    z_t = z_T
    for done, step in enumerate(plan, start=1):
        conditional, unconditional = denoise(z_t, float(step.t), step.guided)
        prediction = conditional
        if step.guided:
            assert unconditional is not None
            prediction = guided(conditional, unconditional, guidance, guidance_rescale)
        z_t = np.float32(step.keep) * z_t + np.float32(step.add) * prediction
        if on_step is not None:
            on_step(done, len(plan))
    return z_t
