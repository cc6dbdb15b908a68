"""Eikonal and smoothness terms on the grid nodes near the surface, with their gradients."""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

Array = NDArray[np.floating]
IndexArray = NDArray[np.int64]


BLOCK = 1024
"""Nodes worked on together; fixed, so that vectorised loops round alike for any number of threads."""


@njit(cache=True, fastmath=True, forceinline=True)  # type: ignore[untyped-decorator]
def _laplace(f, nodes, w_smooth, ey, ez, laplacian):  # type: ignore[no-untyped-def]
    ex = 1
    for k in range(nodes.shape[0]):
        n = nodes[k]
        laplacian[n] = w_smooth[k] * (
            f[n - ex] + f[n + ex] + f[n - ey] + f[n + ey] + f[n - ez] + f[n + ez] - 6 * f[n]
        )


@njit(cache=True, fastmath=True, forceinline=True)  # type: ignore[untyped-decorator]
def _gather(f, nodes, ey, ez, w_eikonal, laplacian, out):  # type: ignore[no-untyped-def]
    ex = 1
    for n in nodes:
        total = 0.0
        for cell in range(4):  # the cells whose forward differences hold node n
            c = n
            if cell == 1:
                c = n - ex
            elif cell == 2:
                c = n - ey
            elif cell == 3:
                c = n - ez
            gx = f[c + ex] - f[c]
            gy = f[c + ey] - f[c]
            gz = f[c + ez] - f[c]
            size = math.sqrt(gx * gx + gy * gy + gz * gz) + 1e-9
            excess = (size - 1.0) / size
            if cell == 0:
                total -= excess * (gx + gy + gz)
            elif cell == 1:
                total += excess * gx
            elif cell == 2:
                total += excess * gy
            else:
                total += excess * gz
        bend = (
            laplacian[n - ex] + laplacian[n + ex] + laplacian[n - ey] + laplacian[n + ey]
            + laplacian[n - ez] + laplacian[n + ez] - 6 * laplacian[n]
        )  # fmt: skip
        out[n] += w_eikonal * total + bend


@njit(cache=True, fastmath=True, parallel=True)  # type: ignore[untyped-decorator]
def regularize(
    sdf: Array, nodes: IndexArray, w_eikonal: float, w_smooth: Array, laplacian: Array, d_sdf: Array
) -> None:
    """Add the gradient of the eikonal and smoothness energies at `nodes` to `d_sdf`.

    Eikonal: sum of (|grad f| - 1)² / 2 over nodes, forward differences.  Smoothness: sum of
    w (laplace f)² / 2 over nodes, a bending energy that leaves planes alone.  Each thread gathers for
    the nodes it owns, so the result does not depend on their number.

    Args:
        sdf: (R, R, R) in node spacings.
        nodes: (N,) flat indices of the nodes that count, none on the outermost two layers.
        w_eikonal: weight.
        w_smooth: (N,) weight of each node's bending.
        laplacian: (R³,) scratch; must be zero outside `nodes`.
        d_sdf: (R, R, R), added to.
    """
    r = sdf.shape[0]
    f = sdf.reshape(-1)
    out = d_sdf.reshape(-1)
    blocks = (nodes.shape[0] + BLOCK - 1) // BLOCK
    for block in prange(blocks):
        low, high = block * BLOCK, (block + 1) * BLOCK
        _laplace(f, nodes[low:high], w_smooth[low:high], r * r, r, laplacian)
    for block in prange(blocks):
        _gather(f, nodes[block * BLOCK : (block + 1) * BLOCK], r * r, r, w_eikonal, laplacian, out)
