"""Image metrics of the six views, on NumPy arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


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


def silhouette_iou(mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Mean over views of intersection over union of silhouettes (V, H, W)."""
    both = (mask & truth).sum(axis=(1, 2))
    either = (mask | truth).sum(axis=(1, 2))
    return float(np.mean(np.where(either > 0, both / np.maximum(either, 1), 1.0)))


def normal_error_deg(
    normal: Array, truth: Array, mask: NDArray[np.bool_], truth_mask: NDArray[np.bool_]
) -> float:
    """Mean angle in degrees between unit normals (V, H, W, 3) where both silhouettes hold.

    NaN when the silhouettes never meet.
    """
    both = mask & truth_mask
    if not both.any():
        return float("nan")
    cosine = np.clip((normal[both] * truth[both]).sum(axis=-1), -1.0, 1.0)
    return float(np.degrees(np.arccos(cosine)).mean())
