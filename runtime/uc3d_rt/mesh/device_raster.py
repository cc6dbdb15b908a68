"""The rasteriser on a device: `raster.py` with the kernels of `cuda/raster.cu`."""

from __future__ import annotations

import numpy as np

from uc3d_rt.device import Buffer, Device, Scope, cleared


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
            draw_winners(scope, points, faces, size_px, winners)
            images.append(device.empty((size_px, size_px), np.int32))
            images.append(device.empty((size_px, size_px, 3), np.float32))
            images.append(device.empty((size_px, size_px), np.float32))
            device.launch("resolve_pixels", size_px**2, points, faces, winners, np.int32(size_px), *images)
    except BaseException:
        device.free(images)
        raise
    return images[0], images[1], images[2]


def draw_winners(scope: Device, points: Buffer, faces: Buffer, size_px: int, winners: Buffer) -> None:
    """Draw triangles into the `Winner`s of `cuda/raster.cu`.

    Args:
        scope: frees what is needed on the way.
        points: as of `rasterize_device`.
        faces: likewise.
        size_px: side of the image.
        winners: (S, S) uint64, zero where nothing is yet.
    """
    count = faces.shape[0]
    large, large_count = scope.empty((count,), np.int32), cleared(scope, (1,), np.int32)
    size = np.int32(size_px)
    scope.launch("draw_faces", count, points, faces, np.int32(count), size, winners, large, large_count)
    scope.launch("draw_large_faces", 1 << 18, points, faces, size, large, large_count, winners)
