"""The mirror image of six views, and of their latents.

A picture and its mirror image show the same thing twice, and a network is not the same on both: what it
gets wrong of one is partly right of the other.  The mean of both answers is nearer to the truth.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.views import NUM_VIEWS

FloatArray = NDArray[np.float32]


def mirrored_picture(image: FloatArray) -> FloatArray:
    """A picture (..., H, W) in its mirror: left and right change places."""
    return np.ascontiguousarray(image[..., ::-1])


def mirrored_pairs(color: FloatArray, normal: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Views (6n, 3, H, W) in [0, 1] of n objects as of each mirrored at x = 0, and their encoded normals.

    The camera at azimuth a sees what that at -a saw, left and right changed: views change their order, for
    they stand at 30, 90 … 330 degrees.  Normals are of the world, so that x turns its sign; the background,
    mid-grey, stays as it is.
    """
    color, normal = (
        mirrored_picture(views.reshape(-1, NUM_VIEWS, *views.shape[1:])[:, ::-1]).reshape(views.shape)
        for views in (color, normal)
    )
    normal[:, 0] = 1.0 - normal[:, 0]
    return color, normal


def mirrored_latents(
    z_0: FloatArray,
    decode: Callable[[FloatArray], FloatArray],
    encode: Callable[[FloatArray], FloatArray],
) -> FloatArray:
    """Latents (6n, 2c, h, w) of the colour and normal views of n objects as of the mirrored objects.

    Turning a latent's pixels is not enough: a normal that points left looks different from one that points
    right, and latents mean nothing in a mirror.  Hence the way through the images.

    Args:
        decode: latents (m, c, h, w) to images (m, 3, H, W) in [0, 1].
        encode: the way back.
    """
    c = z_0.shape[1] // 2
    images = decode(np.concatenate([z_0[:, :c], z_0[:, c:]]))
    color, normal = mirrored_pairs(images[: len(z_0)], images[len(z_0) :])
    latents = encode(np.concatenate([color, normal]))
    return np.concatenate([latents[: len(z_0)], latents[len(z_0) :]], axis=1)
