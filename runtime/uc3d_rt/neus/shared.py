"""Numbers that the CPU's functions and the device's kernels share; nothing is compiled here."""

from __future__ import annotations

BETA_1 = 0.9
BETA_2 = 0.98
"""Of Adam's moments."""

MARGIN = 8
"""Node spacings around the surface within which distances are exact; skipping rays needs no more."""

BAND = 3.0
"""Node spacings around the surface within which the field is solved for."""

STAY = 0.003
"""Weight of a node's value against its slopes: a step reaches some 1 / sqrt(STAY) = 18 nodes."""

UNSEEN_WEIGHT = 0.05
"""Weight of the slope that a node has where the views see nothing of it, against 1 where they do."""

ENOUGH_PIXELS = 0.1
"""Share of the pixels that a node covers front on that make a node count as half seen."""

COVER_WEIGHT = 60.0
COVER_DEPTH = 0.3
"""A pixel of a silhouette should meet the object this deep (node spacings) at least, with this weight."""

LARGEST_MOVE = 2.0
"""Node spacings that the surface may move in one step: beyond, it has left the band."""

SOLVER_STEPS = 60
"""Of conjugate gradients."""

SOLVER_TOLERANCE = 1e-3
"""2-norm of the residual against the first one's that ends them sooner."""
