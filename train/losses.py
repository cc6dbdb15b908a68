"""The losses of Sec. 3, one function each, symbols as in the paper.

Shapes: V views, K draws or pairs, `(..., c, h, w)` latents.  Sums over views follow the paper;
sums over the entries of a feature or latent are means here, so that the weights do not depend on
the resolution (`LossWeights` says where that matters).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

RELATIVE_FLOOR = 0.1
"""Of an error's share of the mean error in `relative_weights`: no sample counts without limit."""

NORMAL_SOFTNESS = 0.1
"""In `normal_loss`, radians: errors well below it count by their square."""


def noisy_latent(z_0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """Eq. 6: `z_t = sqrt(alpha_bar) z_0 + sqrt(1 - alpha_bar) eps`.

    Args:
        z_0: latents (b, V, c, h, w).
        eps: noise of the same shape.
        alpha_bar: (b,), of each sample's timestep.
    """
    a = alpha_bar.reshape(-1, *[1] * (z_0.dim() - 1))
    return a.sqrt() * z_0 + (1.0 - a).sqrt() * eps


def velocity(z_0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """`v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) z_0`, shapes as in `noisy_latent`."""
    a = alpha_bar.reshape(-1, *[1] * (z_0.dim() - 1))
    return a.sqrt() * eps - (1.0 - a).sqrt() * z_0


def predicted_z_0(prediction: Tensor, z_t: Tensor, alpha_bar: Tensor, kind: str) -> Tensor:
    """The clean latent that a prediction of `eps` or `v` implies at `z_t`."""
    a = alpha_bar.reshape(-1, *[1] * (z_t.dim() - 1))
    if kind == "v":
        return a.sqrt() * z_t - (1.0 - a).sqrt() * prediction
    return (z_t - (1.0 - a).sqrt() * prediction) / a.sqrt()


def relative_weights(error: Tensor, where: Tensor, power: float) -> Tensor:
    """Weights of samples by their own error, `e^-power`, which leave the sum of errors as it is.

    With power 1 every sample adds alike: the gradient is that of the mean logarithm, as of a mean PSNR.
    With 0 those that are wrong most count most, as in Eq. 9.

    Args:
        error: (b, d) mean squared errors; no gradient goes through the weights.
        where: (b,) samples that are weighted; the others get 1.
    """
    e = error.detach()
    kept = where[:, None].to(e.dtype)
    mean = (e * kept).sum(dim=0) / kept.sum(dim=0).clamp_min(1.0)
    weights = (e / mean.clamp_min(1e-12)).clamp_min(RELATIVE_FLOOR) ** -power
    weights = weights * (e * kept).sum(dim=0) / (weights * e * kept).sum(dim=0).clamp_min(1e-12)
    return torch.where(where[:, None], weights, 1.0)


def diffusion_loss(
    prediction: Tensor, z_0: Tensor, eps: Tensor, alpha_bar: Tensor, kind: str,
    relative: tuple[Tensor, float] | None = None,
) -> Tensor:  # fmt: skip
    """Eq. 9, summed over views, mean over batch and latent entries.

    With `kind="v"` the squared error is that of `v`, which is Eq. 9 weighted by `1 / alpha_bar`:
    `||v - v^||^2 = ||eps - eps^||^2 / alpha_bar` for the eps that v implies at the same `z_t`.

    Args:
        prediction: network output (b, V, 2c, h, w).
        relative: which samples (b,) are weighted by their own error, and the power of `relative_weights`;
            colours and normals, the two halves of the channels, each by theirs.
    """
    target = velocity(z_0, eps, alpha_bar) if kind == "v" else eps
    squares = (prediction.float() - target.float()).square()
    error = squares.unflatten(2, (2, -1)).mean(dim=(3, 4, 5))  # (b, V, 2)
    if relative is not None:
        error = error * relative_weights(error.mean(dim=1), *relative)[:, None]
    return error.mean(dim=(0, 2)).sum()


def outline_loss(logits: Tensor, truth: Tensor, where: Tensor) -> Tensor:
    """One minus the soft intersection over union of silhouettes, summed over views, mean over samples.

    Args:
        logits: (b, V, h, w) of the coverage of each cell.
        truth: (b, V, h, w) coverage in [0, 1].
        where: (b,) samples that count.
    """
    covered = logits.float().sigmoid()
    both = (covered * truth).sum(dim=(2, 3))
    either = (covered + truth - covered * truth).sum(dim=(2, 3))
    lost = (1.0 - both / either.clamp_min(1e-6)).sum(dim=1)  # (b,)
    return (lost * where).sum() / where.sum().clamp_min(1.0)


def normal_loss(normal: Tensor, truth: Tensor, coverage: Tensor, where: Tensor) -> Tensor:
    """Mean angle between normals within the true silhouette, summed over views, mean over samples.

    The angle in radians is taken as the chord `|n - n^|` of unit normals, which is smooth, and has no kink
    where both agree: `sqrt(|n - n^|^2 + s^2) - s` with `s = NORMAL_SOFTNESS`.

    Args:
        normal: (b, V, 3, h, w) of any length.
        truth: as `normal`.
        coverage: (b, V, h, w) true coverage of each cell in [0, 1]; its weight.
        where: (b,) samples that count.
    """
    cosine = F.cosine_similarity(normal.float(), truth.float(), dim=2)
    squared = (2.0 - 2.0 * cosine).clamp_min(0.0)
    angle = (squared + NORMAL_SOFTNESS**2).sqrt() - NORMAL_SOFTNESS
    mean = (angle * coverage).sum(dim=(2, 3)) / coverage.sum(dim=(2, 3)).clamp_min(1e-6)
    return (mean.sum(dim=1) * where).sum() / where.sum().clamp_min(1.0)


def variance_loss(features: Tensor) -> Tensor:
    """Eq. 11-13: variance of bottleneck features over noise draws, summed over views.

    Args:
        features: (b, K, V, D): objects, draws of the same z_0 at the same t, views, entries.

    Returns:
        Scalar: mean over objects and entries (the paper sums over entries), sum over views.
    """
    f = features.float()
    mu = f.mean(dim=1, keepdim=True)  # mu_f of Eq. 11
    variance = (f - mu).square().mean(dim=1)  # (b, V, D)
    return variance.mean(dim=(0, 2)).sum()  # Eq. 13


def mutual_information_loss(color: Tensor, normal: Tensor, temperature: float) -> Tensor:
    """Eq. 16-17: InfoNCE between colour and normal embeddings, summed over views.

    Args:
        color: embeddings (V, K, D) of K colour images a view, from different objects.
        normal: those of their normal maps; pair k is positive, every other is negative.
        temperature: tau.
    """
    # Not a matrix product: autocast would round it to bfloat16, and tau multiplies that error.
    similarity = F.cosine_similarity(color.float()[:, :, None], normal.float()[:, None], dim=-1)
    logits = similarity / temperature  # (V, K, K)
    target = torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape[:-1])
    return F.cross_entropy(logits.flatten(0, 1), target.flatten()) * logits.shape[0]
