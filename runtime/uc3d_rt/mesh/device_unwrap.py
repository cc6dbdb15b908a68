"""What unwrapping draws, on a device; the rest of `unwrap.py` is the host's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.device import Device, Scope, cleared, uploaded
from uc3d_rt.mesh.device_raster import rasterize_device
from uc3d_rt.mesh.surface import FloatArray


def behind_on_device(
    device: Device, above: FloatArray, below: FloatArray, side_px: int, apart: float
) -> NDArray[np.bool_]:
    """Twin of `unwrap._behind`: faces that share a pixel with one that is more than `apart` above them.

    Args:
        device: where.
        above: (3F, 3) pixel column, row and depth of the faces' corners, seen from above.
        below: the same from below; the depths are those of `above` with the other sign.
        side_px: of the image.
        apart: in units of the depth.

    Returns:
        (F,).

    Raises:
        BackendError: the device failed, for example for want of memory.
    """
    with Scope(device) as scope:
        corners = uploaded(scope, np.arange(len(above), dtype=np.int32).reshape(-1, 3))
        drawn = [rasterize_device(scope, uploaded(scope, seen), corners, side_px) for seen in (above, below)]
        found = cleared(scope, (len(above) // 3,), np.uint8)
        images = [buffer for face, _, depth in drawn for buffer in (face, depth)]
        scope.launch("mark_behind", side_px**2, *images, np.int32(side_px**2), np.float32(apart), found)
        return np.asarray(scope.download(found), np.bool_)
