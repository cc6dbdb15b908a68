"""Cut an object out of a plain background.

For pictures that bring no alpha: packshots, renders, objects on a table or a sheet.  The
background is modelled from the border as a smooth colour surface; a flood from the border takes
what matches it, soft shadows included; random walks (Grady, "Random walks for image
segmentation") settle what neither side claims; the outline gets fractional alpha from the
two-colour equation `C = alpha F + (1 - alpha) B`.  A busy background is beyond this method: it
says so in its notes, and the mend is an image with alpha.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage.color import rgb2lab
from skimage.segmentation import random_walker

from uc3d_rt.errors import ImageError

ByteArray = NDArray[np.uint8]
Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

ADVICE = "give an image with a transparent background (RGBA) if the object is cut badly"

_OUTPUT_PX = 1024  # longer side of the result; the networks see 512 px at most
_WORK_PX = 256  # longer side on which the regions are found
_DEGREE = 2  # of the polynomial surface through the border colours
_NEAR = 4.0  # CIE Lab distance still counted as background, above the noise
_FAR = 18.0  # CIE Lab distance that no background reaches
_SHADOW_CHROMA = 7.0  # a shadow keeps the background's a, b within this
_SHADOW_DEPTH = 45.0  # and is at most this much darker, in L
_SHADOW_SLOPE = 2.2  # and its L changes by at most this a work pixel
_PLAIN_SPREAD = 6.0  # RMS Lab residual of a border that counts as plain
_RIM_PX = 6  # work pixels next to the background whose side is open
_BAND_PX = 3  # half-width of the outline band, output pixels


@dataclass(frozen=True)
class _Surface:
    """The background: one polynomial in x, y for each Lab channel, and its scatter."""

    coefficients: Array  # (terms, 3)
    spread: float  # RMS Lab residual of the border pixels it explains
    outliers: float  # share of border pixels it does not explain

    def lab(self, height: int, width: int) -> Array:
        """(height, width, 3)."""
        return (_terms(height, width) @ self.coefficients).reshape(height, width, 3)


def cut_out(rgb: ByteArray) -> tuple[ByteArray, list[str]]:
    """Find the object and make the rest transparent.

    Args:
        rgb: (H, W, 3) sRGB.

    Returns:
        `(rgba, doubts)`: (h, w, 4) straight alpha, longer side at most 1024 px, and what the
        user should be told.

    Raises:
        ImageError: nothing stands out from the background.
    """
    rgb = _shrunk(rgb, _OUTPUT_PX)
    work = rgb2lab(_shrunk(rgb, _WORK_PX))
    surface = _border_surface(work)
    solid, shadow = _object_region(work, surface)
    doubts = _doubts(solid, shadow, surface)
    height, width = rgb.shape[:2]
    enlarged = Image.fromarray(solid.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    rgba = _with_soft_outline(rgb, np.asarray(enlarged) > 0.5)
    return rgba, doubts


def _shrunk(rgb: ByteArray, long_px: int) -> ByteArray:
    height, width = rgb.shape[:2]
    scale = long_px / max(height, width)
    if scale >= 1.0:
        return rgb
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BOX))


def _terms(height: int, width: int) -> Array:
    """Polynomial terms at the pixel centres, (height * width, terms)."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    x, y = (x.ravel() + 0.5) / width * 2 - 1, (y.ravel() + 0.5) / height * 2 - 1
    return np.stack([x**i * y**j for i in range(_DEGREE + 1) for j in range(_DEGREE + 1 - i)], axis=1)


def _border_surface(lab: Array) -> _Surface:
    """Robust fit through the border strip: start at its median, keep what agrees, fit again."""
    height, width = lab.shape[:2]
    strip = max(2, round(0.025 * max(height, width)))
    border = np.ones((height, width), bool)
    border[strip:-strip, strip:-strip] = False
    terms, colors = _terms(height, width)[border.ravel()], lab[border]
    median = np.median(colors, axis=0)
    residual = np.linalg.norm(colors - median, axis=1)
    keep = residual <= max(2.5 * float(np.median(residual)), _FAR)
    # Ridge on the slopes only, so that a border half hidden by the object stays tame.
    ridge = np.diag([0.0] + [1e-3 * len(colors)] * (terms.shape[1] - 1))
    coefficients = np.zeros((terms.shape[1], 3))
    for _ in range(5):
        kept, target = terms[keep], colors[keep]
        coefficients = np.linalg.solve(kept.T @ kept + ridge, kept.T @ target)
        residual = np.linalg.norm(colors - terms @ coefficients, axis=1)
        keep = residual <= max(3.0 * float(np.median(residual)), _NEAR)
    spread = float(np.sqrt(np.mean(residual[keep] ** 2)))
    return _Surface(coefficients, spread, float(1.0 - keep.mean()))


def _object_region(lab: Array, surface: _Surface) -> tuple[Mask, Mask]:
    """`(object, shadow)`, each (h, w), on the working size."""
    height, width = lab.shape[:2]
    difference = lab - surface.lab(height, width)
    distance = np.linalg.norm(difference, axis=-1)
    noise = min(3.0 * surface.spread, 12.0)
    alike = distance <= _NEAR + noise
    flooded = _reached_from_border(alike)
    shadow = _reached_shadow(lab, difference, flooded, noise)
    enclosed = _enclosed_background(lab, distance, alike & ~flooded, surface.spread)
    background = flooded | shadow | enclosed
    sure_object = ndimage.binary_erosion((distance >= _FAR + noise) & ~background)
    # A pale object is what the flood leaves over; random walks then settle its outline.
    sure_object |= ndimage.binary_erosion(~background, iterations=_RIM_PX)
    if not sure_object.any():
        sure_object = ndimage.binary_erosion(~background, iterations=2)
    if sure_object.sum() < 12:
        raise ImageError(f"no object stands out from the background; {ADVICE}")
    # Background stays certain only away from what it might share an edge with.
    sure_background = ndimage.binary_erosion(background, border_value=1)
    labels = np.zeros((height, width), np.int32)
    labels[sure_background], labels[sure_object] = 1, 2
    if (labels == 0).any() and sure_background.any():
        with warnings.catch_warnings():
            # Only the larger of two probabilities is asked for, so a loose solution does.
            warnings.filterwarnings("ignore", "The probability range is outside", UserWarning)
            walked = random_walker(lab, labels, beta=130, mode="cg_j", tol=1e-2, channel_axis=-1)
        solid = walked == 2
    else:
        solid = ~background
    solid = ndimage.binary_opening(solid) | (solid & ndimage.binary_dilation(sure_object))
    return _without_specks(solid), shadow


def _reached_from_border(region: Mask) -> Mask:
    """The components of `region` (h, w) that touch the image border."""
    labels, _ = ndimage.label(region)
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    return np.isin(labels, np.unique(edge[edge > 0]))


def _reached_shadow(lab: Array, difference: Array, flooded: Mask, noise: float) -> Mask:
    """Darker, equally tinted, softly changing pixels next to the flooded background."""
    lightness = ndimage.gaussian_filter(lab[..., 0], 1.0)
    slope = np.hypot(ndimage.sobel(lightness, axis=0), ndimage.sobel(lightness, axis=1)) / 8.0
    chroma = np.hypot(difference[..., 1], difference[..., 2])
    shade = (
        (difference[..., 0] < _NEAR + noise)
        & (difference[..., 0] > -_SHADOW_DEPTH)
        & (chroma < _SHADOW_CHROMA + noise)
        & (slope < _SHADOW_SLOPE)
    )
    # The opening closes gaps in a grey object's outline against a leak.
    passable = ndimage.binary_opening(shade | flooded, iterations=2) | flooded
    labels, _ = ndimage.label(passable)
    reached = np.isin(labels, np.unique(labels[flooded]))
    return reached & ~flooded


def _enclosed_background(lab: Array, distance: Array, candidates: Mask, spread: float) -> Mask:
    """Background seen through the object (a handle, between legs): flat and of the very colour."""
    labels, count = ndimage.label(ndimage.binary_opening(candidates))
    out = np.zeros(labels.shape, bool)
    for index in range(1, count + 1):
        part = labels == index
        core = ndimage.binary_erosion(part)
        if part.sum() < 1e-3 * part.size or not core.any():
            continue
        flat = float(np.linalg.norm(lab[core].std(axis=0))) <= 1.0 + 2.0 * spread
        if flat and float(np.median(distance[core])) <= 2.0 + 2.0 * spread:
            out |= part
    return out


def _without_specks(solid: Mask) -> Mask:
    """Keep the largest part and what is not tiny beside it; fill pin holes."""
    labels, count = ndimage.label(solid)
    if not count:
        raise ImageError(f"no object stands out from the background; {ADVICE}")
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    kept = np.isin(labels, np.flatnonzero(areas >= 0.03 * areas.max()))
    holes, _ = ndimage.label(~kept)
    hole_areas = np.bincount(holes.ravel())
    small = np.flatnonzero(hole_areas < 1e-3 * solid.size)
    filled: Mask = kept | np.isin(holes, small[small > 0])
    return filled


def _with_soft_outline(rgb: ByteArray, solid: Mask) -> ByteArray:
    """RGBA (h, w, 4): alpha from the two-colour equation in a band, its colour freed of background."""
    height, width = solid.shape
    colors = rgb.astype(np.float64)
    inside = ndimage.distance_transform_edt(np.pad(solid, 1, mode="edge"))[1:-1, 1:-1]
    outside = ndimage.distance_transform_edt(~solid)
    core, far = inside > _BAND_PX, outside > _BAND_PX
    alpha = solid.astype(np.float64)
    band = ~core & ~far
    if core.any() and far.any():
        # F and B: mean colours of the nearest certain pixels on either side.
        fore, back = _nearest_mean(colors, core), _nearest_mean(colors, far)
        axis = fore - back
        contrast = np.einsum("hwc,hwc->hw", axis, axis)
        mixed = np.einsum("hwc,hwc->hw", colors - back, axis) / np.maximum(contrast, 1.0)
        # Where both sides look alike the equation says nothing; fall back to the distance.
        ramp = np.clip(0.5 + (inside - outside) / 2.0, 0.0, 1.0)
        trust = np.clip((np.sqrt(contrast) - 15.0) / 30.0, 0.0, 1.0)
        estimate = trust * np.clip(mixed, 0.0, 1.0) + (1.0 - trust) * ramp
        # Inside, a texture that happens to resemble the background must not turn transparent.
        estimate = np.where(inside > 1.5, np.maximum(estimate, (inside - 1.0) / (_BAND_PX - 1.0)), estimate)
        estimate = np.where(outside > 1.5, np.minimum(estimate, 1.0 - (outside - 1.0) / _BAND_PX), estimate)
        alpha[band] = np.clip(estimate, 0.0, 1.0)[band]
        freed = (colors - (1.0 - alpha[..., None]) * back) / np.maximum(alpha[..., None], 0.1)
        share = np.clip(alpha[..., None] * 2.0 - 0.5, 0.0, 1.0)  # thin pixels: F itself is steadier
        colors[band] = (share * freed + (1.0 - share) * fore)[band]
    out = np.empty((height, width, 4), np.uint8)
    out[..., :3] = np.clip(colors + 0.5, 0, 255)
    out[..., 3] = np.round(alpha * 255)
    return out


def _nearest_mean(colors: Array, region: Mask) -> Array:
    """For each pixel the 3×3 mean colour within `region` around its nearest pixel there."""
    weight = ndimage.uniform_filter(region.astype(np.float64), 3)
    summed = ndimage.uniform_filter(colors * region[..., None], (3, 3, 1))
    mean = summed / np.maximum(weight, 1e-6)[..., None]
    row, column = ndimage.distance_transform_edt(~region, return_distances=False, return_indices=True)
    nearest: Array = mean[row, column]
    return nearest


def _doubts(solid: Mask, shadow: Mask, surface: _Surface) -> list[str]:
    doubts = []
    if surface.spread > _PLAIN_SPREAD or surface.outliers > 0.35:
        doubts.append(f"the background is not plain, so the cut-out is doubtful; {ADVICE}")
    share = float(solid.mean())
    if share < 0.01:
        doubts.append(f"the object found covers only {share:.1%} of the picture; {ADVICE}")
    elif share > 0.9:
        doubts.append(f"the object found covers {share:.0%} of the picture; {ADVICE}")
    rows = np.flatnonzero(solid.any(axis=1))
    middle = (int(rows[0]) + int(rows[-1])) // 2
    if shadow[:middle].sum() > 0.05 * solid.sum():
        doubts.append(f"something taken for a shadow stands high, it may be a part of the object; {ADVICE}")
    parts = int(ndimage.label(solid)[1])
    if parts > 1:
        doubts.append(f"the object found is in {parts} separate parts; {ADVICE}")
    edges = (solid[0], solid[-1], solid[:, 0], solid[:, -1])
    if any(float(edge.mean()) > 0.02 for edge in edges):
        doubts.append(f"the object found touches the image border; {ADVICE}")
    return doubts
