"""Adam on the grid nodes near the surface only."""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from uc3d_rt.neus.shared import BETA_1, BETA_2

Array = NDArray[np.floating]
IndexArray = NDArray[np.int64]

BLOCK = 1024
"""Nodes worked on together; fixed, so that vectorised loops round alike for any number of threads."""


@njit(cache=True, fastmath=True, forceinline=True)  # type: ignore[untyped-decorator]
def _adam_block(values, gradient, mean, square, nodes, correct_1, correct_2, learning_rate, epsilon):  # type: ignore[no-untyped-def]
    for n in nodes:
        for c in range(values.shape[1]):
            g = gradient[n, c]
            gradient[n, c] = 0.0
            m = BETA_1 * mean[n, c] + (1.0 - BETA_1) * g
            v = BETA_2 * square[n, c] + (1.0 - BETA_2) * g * g
            mean[n, c] = m
            square[n, c] = v
            values[n, c] -= learning_rate * m * correct_1 / (math.sqrt(v * correct_2) + epsilon)


@njit(cache=True, fastmath=True, parallel=True)  # type: ignore[untyped-decorator]
def adam_step(
    values: Array,
    gradient: Array,
    mean: Array,
    square: Array,
    nodes: IndexArray,
    step: int,
    learning_rate: float,
    epsilon: float,
) -> None:
    """One Adam step (Kingma and Ba, Algorithm 1) on some rows of an array; clears their gradient.

    Args:
        values: (M, C), updated.
        gradient: (M, C), set to zero at `nodes`.
        mean: (M, C) first moment, updated.
        square: (M, C) second moment, updated.
        nodes: (N,) rows to update.
        step: 1 for the first step.
        learning_rate: largest change of a value in a step, about.
        epsilon: gradients well below this move a value less than in proportion to their sign.
    """
    correct_1 = 1.0 / (1.0 - BETA_1**step)
    correct_2 = 1.0 / (1.0 - BETA_2**step)
    for block in prange((nodes.shape[0] + BLOCK - 1) // BLOCK):
        part = nodes[block * BLOCK : (block + 1) * BLOCK]
        _adam_block(values, gradient, mean, square, part, correct_1, correct_2, learning_rate, epsilon)
