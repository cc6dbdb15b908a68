"""The normal equations of `refine.py`, without their matrix."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

DoubleArray = NDArray[np.float64]


@njit(cache=True)  # type: ignore[untyped-decorator]
def slopes(x: DoubleArray, faces: NDArray[np.int32], target: DoubleArray, out: DoubleArray) -> DoubleArray:
    """Gradient (V, 3) of half the sum of `(target . edge)²` over faces and edges, at positions x (V, 3)."""
    out[:] = 0.0
    for f in range(faces.shape[0]):
        a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
        nx, ny, nz = target[f, 0], target[f, 1], target[f, 2]
        pa = x[a, 0] * nx + x[a, 1] * ny + x[a, 2] * nz
        pb = x[b, 0] * nx + x[b, 1] * ny + x[b, 2] * nz
        pc = x[c, 0] * nx + x[c, 1] * ny + x[c, 2] * nz
        for vertex, slope in ((a, 2 * pa - pb - pc), (b, 2 * pb - pa - pc), (c, 2 * pc - pa - pb)):
            out[vertex, 0] += slope * nx
            out[vertex, 1] += slope * ny
            out[vertex, 2] += slope * nz
    return out
