"""The rasteriser on a device: `raster.py` with the kernels of `cuda/raster.cu`."""

from __future__ import annotations

import numpy as np

from uc3d_rt.device import Buffer, Device, Scope, cleared

LARGE_THREADS = 1 << 18
"""For the faces that one thread would be too slow for; the host does not know how many there are."""


def rasterize_device(
    device: Device, points: Buffer, faces: Buffer, size_px: int
) -> tuple[Buffer, Buffer, Buffer]:
    """Draw triangles into fresh square images; twin of `raster.rasterize_pixels`.

    The smallest depth wins and ties go to the first face, whatever the order of threads.

    Args:
        device: where; the images are the caller's to free.
        points: (V, 3) float32, pixel column, pixel row (centres at half-integers), depth.
        faces: (F, 3) int32.
        size_px: side of the images.

    Returns:
        `(face_id (S, S) int32, weights (S, S, 3) float32, depth (S, S) float32)`; where nothing is, -1,
        zeros and infinity.

    Raises:
        BackendError: the device failed, for example for want of memory.
    """
    images: list[Buffer] = []
    try:
        with Scope(device) as scope:
            winners = cleared(scope, (size_px, size_px), np.uint64)
            draw_winners(scope, points, faces, winners)
            images.append(device.empty((size_px, size_px), np.int32))
            images.append(device.empty((size_px, size_px, 3), np.float32))
            images.append(device.empty((size_px, size_px), np.float32))
            device.launch("resolve_pixels", size_px**2, points, faces, winners, np.int32(size_px), *images)
    except BaseException:
        device.free(images)
        raise
    return images[0], images[1], images[2]


def draw_winners(scope: Device, points: Buffer, faces: Buffer, winners: Buffer) -> None:
    """Draw triangles into the `Winner`s of `cuda/raster.cu`, for one image or several.

    Args:
        scope: frees what is needed on the way.
        points: (V, 3) as of `rasterize_device`, or (images, V, 3).
        faces: (F, 3).
        winners: (S, S) or (images, S, S) uint64, zero where nothing is yet.
    """
    images = 1 if len(points.shape) == 2 else points.shape[0]
    count, size = faces.shape[0], np.int32(winners.shape[-1])
    large, large_count = scope.empty((images * count,), np.int32), cleared(scope, (1,), np.int32)
    given = points, np.int32(points.shape[-2]), faces, np.int32(count)
    scope.launch("draw_faces", images * count, *given, np.int32(images), size, winners, large, large_count)
    scope.launch("draw_large_faces", LARGE_THREADS, *given, size, large, large_count, winners)
