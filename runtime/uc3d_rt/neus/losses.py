"""Losses of rendered pixels, each with its gradient (Eq. 19-21 and the mask term).

Every loss is a mean over the P rays given; a `keep` weight of 0 takes a ray out (robust trimming).
All functions are NumPy and keep the dtype of their input.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def rgb_loss(rendered: Array, target: Array) -> tuple[Array, Array]:
    """Squared colour error of each ray (Eq. 19), and its gradient.

    Args:
        rendered: (P, 3).
        target: (P, 3).

    Returns:
        `(loss (P,), gradient (P, 3))` of the single rays.
    """
    difference = rendered - target
    return (difference * difference).sum(axis=1), 2.0 * difference


def normal_loss(summed: Array, target: Array) -> tuple[Array, Array]:
    """`1 - cos` between the rendered SDF gradient and the normal map of each ray (Eq. 20).

    Args:
        summed: (P, 3) weighted sum of SDF gradients, not normalised.
        target: (P, 3) unit normals; a zero vector (background) costs nothing.

    Returns:
        `(loss (P,), gradient (P, 3))`.
    """
    length = np.maximum(np.sqrt((summed * summed).sum(axis=1, keepdims=True)), 1e-3)
    unit = summed / length
    cosine = (unit * target).sum(axis=1, keepdims=True)
    known = (target != 0).any(axis=1, keepdims=True)
    gradient = np.where(known, (cosine * unit - target) / length, 0.0)
    return np.where(known, 1.0 - cosine, 0.0)[:, 0], gradient.astype(summed.dtype)


def mask_loss(opacity: Array, target: Array) -> tuple[Array, Array]:
    """Binary cross entropy between opacity (P,) and silhouette (P,), and its gradient (P,).

    Opacity is kept 0.02 away from 0 and 1, which bounds the pull of a pixel that contradicts the rest.
    """
    safe = np.clip(opacity, 0.02, 0.98)
    loss = -(target * np.log(safe) + (1.0 - target) * np.log(1.0 - safe))
    gradient = (safe - target) / (safe * (1.0 - safe))
    # At the clip the gradient stays one-sided, so that a wrong pixel can still come back.
    settled = np.abs(opacity - target) <= 0.02
    return loss, np.where(settled, 0.0, gradient).astype(opacity.dtype)


def keep_best(loss: Array, considered: NDArray[np.bool_], share: float) -> NDArray[np.bool_]:
    """Which of the considered rays (P,) to keep: all but the worst `1 - share` of them.

    Generated views contradict each other in places; their largest residuals say nothing of the shape.
    """
    if share >= 1.0 or not considered.any():
        return considered
    limit = np.quantile(loss[considered], share)
    return considered & (loss <= limit)
