"""How much memory of a device a fit takes, and which resolution fits into what is free."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np

from uc3d_rt.counting_device import CountingDevice, NoDevice
from uc3d_rt.device import Device, Scope
from uc3d_rt.neus.device_fit import empty_field, fit_images
from uc3d_rt.neus.device_views import DeviceImages
from uc3d_rt.neus.fit import check_views
from uc3d_rt.neus.fit_plan import MIN_NODES
from uc3d_rt.neus.rays import select_pixels
from uc3d_rt.views import NUM_VIEWS

if TYPE_CHECKING:
    from uc3d_rt.neus.fit import FloatArray
    from uc3d_rt.neus.fit_plan import FitOptions

SPARE = 64 * 2**20
"""Bytes that must stay free: the driver gives memory in blocks of 2 MiB, and kernels have code and stacks."""


def fit_bytes(size_px: int, pixels: int, options: FitOptions) -> int:
    """Bytes of all arrays that a fit holds on a device when it holds most.

    The fit itself is gone through, on a device that has no memory and computes nothing; every stage takes
    its arrays before the first iteration and keeps them, so one iteration a stage shows all of them.

    Args:
        size_px: side of the views.
        pixels: that the fit looks at, as `select_pixels` chooses them.
        options: of the fit.
    """
    counting = CountingDevice(NoDevice(pixels))
    blurred, sharp = (min(count, 1) for count in options.blurred_iterations)
    short = replace(
        options,
        iterations=(1,) * len(options.iterations),
        blurred_iterations=(blurred, sharp),
        carve_steps=min(options.carve_steps, 1),
    )
    shape = NUM_VIEWS, size_px, size_px
    with Scope(cast(Device, counting)) as scope:
        field = empty_field(scope, short)
        color, normal = (scope.empty((*shape, 3), np.float32) for _ in range(2))
        images = DeviceImages(size_px, color, normal, scope.empty(shape, np.uint8))
        fit_images(scope, images, short, field, lambda done, total: None)
    return counting.most


def largest_resolution(
    color: FloatArray, normal: FloatArray, options: FitOptions, free: int
) -> tuple[int, int] | None:
    """The largest resolution below that of a fit which would fit, and the bytes of its arrays.

    Only those are looked at whose grid can be halved for every stage.

    Args:
        color: (6, H, H, 3) of the views.
        normal: (6, H, H, 3) unit world normals, zero = background.
        options: of the fit that did not fit.
        free: bytes of the device.

    Returns:
        `(nodes along an axis, bytes)`; None if no fit would.

    Raises:
        FitError: the views hold no object.
    """
    color, normal, masks = check_views(color, normal)
    pixels = len(select_pixels(color, normal, masks, options.seed).mask)
    step = 2 ** (len(options.iterations) - 1)
    found, low, high = None, -(-MIN_NODES // step), (options.resolution - 1) // step
    while low <= high:  # bisection: more nodes take more memory
        middle = (low + high) // 2
        needed = fit_bytes(color.shape[1], pixels, replace(options, resolution=middle * step))
        if needed + SPARE <= free:
            found, low = (middle * step, needed), middle + 1
        else:
            high = middle - 1
    return found
