"""Image metrics of the six views, on NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Mask = NDArray[np.bool_]
Row = Mapping[str, float | None]
"""One object's figures by column; None where a column says nothing of that object."""

WITHIN_DEG: tuple[float, ...] = (11.25, 22.5, 30.0)
"""Angles below which the share of normals is counted, as is usual since Fouhey et al. 2013."""

MISSED_DEG = 90.0
"""Error of a pixel of the true silhouette that has no normal: of no direction, as far from any as from its
opposite."""


def view_metrics(color: Array, normal: Array, true_color: Array, true_normal: Array) -> dict[str, float]:
    """All image metrics of one object's views, by name.

    Args:
        color: (V, H, W, 3) in [0, 1].
        normal: (V, H, W, 3) unit normals, zero outside of the silhouette.
        true_color: as `color`.
        true_normal: as `normal`.
    """
    mask, true_mask = silhouette(normal), silhouette(true_normal)
    return {
        "psnr": psnr(color, true_color),
        "ssim": ssim(color, true_color),
        "silhouette_iou": silhouette_iou(mask, true_mask),
        "normal_deg": normal_error_deg(normal, true_normal, mask, true_mask),
    }


def psnr(image: Array, truth: Array) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1], over all entries given."""
    error = float(np.mean((np.asarray(image, np.float64) - np.asarray(truth, np.float64)) ** 2))
    return float(-10.0 * np.log10(max(error, 1e-12)))


def ssim(image: Array, truth: Array) -> float:
    """Mean SSIM (Wang et al. 2004: Gaussian window of sigma 1.5) of views (V, H, W, 3) in [0, 1]."""
    from skimage.metrics import structural_similarity

    values = [
        structural_similarity(
            a,
            b,
            data_range=1.0,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(image, truth, strict=True)
    ]
    return float(np.mean(values))


def silhouette_iou(mask: Mask, truth: Mask) -> float:
    """Mean over views of intersection over union of silhouettes (V, H, W)."""
    both = (mask & truth).sum(axis=(1, 2))
    either = (mask | truth).sum(axis=(1, 2))
    return float(np.mean(np.where(either > 0, both / np.maximum(either, 1), 1.0)))


def normal_error_deg(normal: Array, truth: Array, mask: Mask, truth_mask: Mask) -> float:
    """Mean angle in degrees between unit normals (V, H, W, 3) where both silhouettes hold.

    NaN when the silhouettes never meet.
    """
    both = mask & truth_mask
    if not both.any():
        return float("nan")
    return float(_angles_deg(normal[both], truth[both]).mean())


def silhouette(normal: Array) -> Mask:
    """(V, H, W) where unit normals (V, H, W, 3) are given."""
    return np.asarray((normal != 0).any(axis=-1))


def normal_metrics(normal: Array, truth: Array) -> dict[str, float]:
    """Angles between normal maps (V, H, W, 3), zero outside of the silhouette (the paper's Table 5).

    `normal_…` is taken where both silhouettes hold, and NaN when they never meet; `normal_true_…` over
    all of the true silhouette, where a missing normal counts as `MISSED_DEG`.  Each: the mean (`deg`), the
    median (`median_deg`), and the share in percent below each of `WITHIN_DEG` (`within_11` and so on).
    """
    true_mask = silhouette(truth)
    both = silhouette(normal) & true_mask
    missed = np.full(int((true_mask & ~both).sum()), MISSED_DEG)
    common = _angles_deg(normal[both], truth[both])
    figures = _angle_figures("normal", common)
    return figures | _angle_figures("normal_true", np.concatenate([common, missed]))


def _angles_deg(a: Array, b: Array) -> Array:
    cosine = np.clip((np.asarray(a, np.float64) * b).sum(axis=-1), -1.0, 1.0)
    return np.asarray(np.degrees(np.arccos(cosine)))


def _angle_figures(name: str, angles: Array) -> dict[str, float]:
    some = len(angles) > 0
    figures = {f"{name}_deg": float(angles.mean()) if some else float("nan")}
    figures[f"{name}_median_deg"] = float(np.median(angles)) if some else float("nan")
    for limit in WITHIN_DEG:
        share = 100.0 * float((angles < limit).mean()) if some else float("nan")
        figures[f"{name}_within_{int(limit)}"] = share
    return figures
