"""Make a field a distance again, away from its zero set, by fast sweeping."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from uc3d_rt.neus.shared import MARGIN

Array = NDArray[np.floating]


@njit(cache=True, fastmath=True)  # type: ignore[untyped-decorator]
def redistance(sdf: Array, frozen: NDArray[np.bool_], sweeps: int) -> None:
    """Solve |grad f| = 1 outside the frozen nodes, in place (Zhao, "A fast sweeping method", 2005).

    Args:
        sdf: (Y, Z, X) in node spacings; signs are kept everywhere, values at the frozen nodes.
        frozen: (Y, Z, X) nodes whose value is trusted: those next to the surface.
        sweeps: of the eight sweep directions how many to run; 8 reaches everywhere.
    """
    rows, slices, columns = sdf.shape
    for sweep in range(sweeps):
        for a in range(rows):
            y = a if sweep & 1 == 0 else rows - 1 - a
            for b in range(slices):
                z = b if sweep & 2 == 0 else slices - 1 - b
                for c in range(columns):
                    x = c if sweep & 4 == 0 else columns - 1 - c
                    if frozen[y, z, x]:
                        continue
                    p = min(abs(sdf[max(y - 1, 0), z, x]), abs(sdf[min(y + 1, rows - 1), z, x]))
                    q = min(abs(sdf[y, max(z - 1, 0), x]), abs(sdf[y, min(z + 1, slices - 1), x]))
                    s = min(abs(sdf[y, z, max(x - 1, 0)]), abs(sdf[y, z, min(x + 1, columns - 1)]))
                    low, high = min(p, q, s), max(p, q, s)
                    mid = p + q + s - low - high
                    d = low + 1.0
                    if d > mid:
                        d = 0.5 * (low + mid + math.sqrt(2.0 - (low - mid) ** 2))
                        if d > high:
                            total = low + mid + high
                            square = total * total - 3.0 * (low * low + mid * mid + high * high - 1.0)
                            d = (total + math.sqrt(max(square, 0.0))) / 3.0
                    old = sdf[y, z, x]
                    if d < abs(old):
                        sdf[y, z, x] = d if old > 0 else -d


def restore_distance(sdf: NDArray[np.float32]) -> None:
    """Rebuild a field (R, R, R), in node spacings, as the distance to its own zero set, in place."""
    negative = sdf < 0
    frozen = np.zeros(sdf.shape, np.bool_)
    for axis in range(3):
        low = [slice(None)] * 3
        high = [slice(None)] * 3
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        changes = negative[tuple(low)] != negative[tuple(high)]
        frozen[tuple(low)] |= changes
        frozen[tuple(high)] |= changes
    if not frozen.any():
        return
    # Only the box around the surface is swept; further out any large distance will do.
    where = np.argwhere(frozen)
    box = tuple(
        slice(max(int(low) - MARGIN, 0), int(high) + MARGIN + 1)
        for low, high in zip(where.min(axis=0), where.max(axis=0), strict=True)
    )
    far = np.float32(MARGIN)
    np.copyto(sdf, np.where(negative, -far, far), where=~frozen)
    redistance(sdf[box], frozen[box], 8)
