"""What the fit takes from the views on a device: images, outlines, pixels; twins of functions on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.device import Buffer, Device, Scope, cleared, uploaded
from uc3d_rt.device_scan import running_sums
from uc3d_rt.neus.hull import BLUR_PX, OPPOSITE
from uc3d_rt.neus.rays import MARGIN_PX
from uc3d_rt.views import NUM_VIEWS, TARGET_CAMERAS, camera_axes

FloatArray = NDArray[np.float32]

BLUR_REACH = 3
"""Pixels, as in `cuda/silhouettes.cu`: four standard deviations."""


@dataclass(frozen=True)
class DeviceImages:
    """The six views on a device."""

    size_px: int
    color: Buffer  # (6, H, H, 3)
    normal: Buffer  # (6, H, H, 3), unit length, zero = background
    mask: Buffer  # (6, H, H), bytes

    @property
    def count(self) -> int:
        """Pixels of all views."""
        return NUM_VIEWS * self.size_px**2


@dataclass(frozen=True)
class DevicePixels:
    """Twin of `rays.Pixels`, each in an array of its own."""

    count: int
    rays: tuple[Buffer, Buffer]  # origin (N, 3), direction (N, 2)
    targets: tuple[Buffer, Buffer, Buffer]  # colour (N, 3), normal (N, 3), mask (N,)

    @property
    def normal(self) -> Buffer:
        """Of the targets."""
        return self.targets[1]

    @property
    def mask(self) -> Buffer:
        """Of the targets."""
        return self.targets[2]


def images_on_device(device: Device, color: FloatArray, normal: FloatArray) -> DeviceImages:
    """Twin of `fit.check_views`; arguments and errors as there.

    Raises:
        BackendError: the device failed, for example for want of memory.
    """
    from uc3d_rt.neus.fit import check_content, check_shapes

    check_shapes(color, normal)
    given = [uploaded(device, np.ascontiguousarray(image, np.float32)) for image in (color, normal)]
    unit = device.empty(color.shape, np.float32)
    mask = device.empty(color.shape[:3], np.uint8)
    images = DeviceImages(color.shape[1], given[0], unit, mask)
    with Scope(device) as scratch:
        found = cleared(scratch, (2,), np.int32)
        device.launch("unit_normals", images.count, *given, np.int32(images.count), unit, mask, found)
        foreground, bad = (int(value) for value in scratch.download(found))
    device.free([given[1]])
    check_content(not bad, foreground)
    return images


def outlines_on_device(device: Device, images: DeviceImages) -> tuple[Buffer, Buffer]:
    """How far pixels are from the outlines of the silhouettes.

    Returns:
        `(distance (6, H, H), near (6, H, H))`: in pixels, negative inside, twin of `silhouette_distance`;
        and which are at most `MARGIN_PX` (at 256 px) from the object, bytes.
    """
    size = images.size_px
    shape = NUM_VIEWS, size, size
    distance, near = device.empty(shape, np.float32), device.empty(shape, np.uint8)
    views = np.int32(NUM_VIEWS), np.int32(size)
    weights = np.exp(-0.5 * (np.arange(-BLUR_REACH, BLUR_REACH + 1) / BLUR_PX) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)[BLUR_REACH:]
    with Scope(device) as scratch:
        rows = scratch.empty((*shape, 2), np.int16)
        blurred = scratch.empty(shape, np.float32)
        device.launch("row_distances", images.count, images.mask, *views, rows)
        margin = np.float32(MARGIN_PX * size / 256.0)
        device.launch("outline_distances", images.count, images.mask, rows, *views, margin, distance, near)
        for along_rows, source, target in ((0, distance, blurred), (1, blurred, distance)):
            device.launch("blur", images.count, source, *views, np.int32(along_rows), *weights, target)
    return distance, near


def merged_on_device(device: Device, distance: Buffer) -> tuple[Buffer, Buffer]:
    """Twin of `hull.pair_distances`, of distances (6, H, H): two times (3, H, H)."""
    _, size, _ = distance.shape
    mean, joined = (device.empty((OPPOSITE, size, size), np.float32) for _ in range(2))
    device.launch(
        "merge_opposite", OPPOSITE * size**2, distance, np.int32(OPPOSITE), np.int32(size), mean, joined
    )
    return mean, joined


def pixels_on_device(device: Device, images: DeviceImages, near: Buffer) -> DevicePixels:
    """Twin of `rays.select_pixels`: the same pixels, row after row, in their order.

    Every `stride`-th of them is a regular sample of all rows, where the CPU shuffles the pixels of a row.

    Args:
        device: where; the result is the caller's to free.
        images: the views.
        near: as of `outlines_on_device`.
    """
    axes = np.stack([np.stack(camera_axes(camera)) for camera in TARGET_CAMERAS])
    views = np.int32(NUM_VIEWS), np.int32(images.size_px)
    with Scope(device) as scratch:
        place = scratch.empty((1, images.count), np.int32)
        device.launch("count_near", images.count, near, *views, place)
        (count,) = running_sums(scratch, place)
        arrays = [
            device.empty(shape, np.float32)
            for shape in ((count, 3), (count, 2), (count, 3), (count, 3), (count,))
        ]
        device.launch(
            "gather_pixels", images.count, near, place, images.color, images.normal, images.mask,
            uploaded(scratch, axes), *views, *arrays,
        )  # fmt: skip
    origin, direction, *targets = arrays
    return DevicePixels(count, (origin, direction), (targets[0], targets[1], targets[2]))
