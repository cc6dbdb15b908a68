"""What the picture shows, laid into the six views: a guess of where each cell of it lies in space.

From the image tokens of a cell come its position in the world, its normal and its coverage (positions as
in Wang et al., "Normalized Object Coordinate Space", CVPR 2019).  Orthographic cameras say where in each
view a position lies, so what the picture shows there is laid down as Gaussian splats, the nearer over the
farther.  The UNet gets it beside `E(y)`, which lines up with no view.  All of it is differentiable, and
`train.losses.surface_loss` teaches the positions from the rendered ones.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uc3d_rt.views import HALF_WINDOW, TARGET_CAMERAS, camera_axes

SURFACE_CHANNELS = 7
"""Of a cell of the picture: coverage, position (3) and normal (3) in the world."""

SPLAT_CELLS = (0.75, 2.0)
"""Standard deviations of the splats, in cells of a view: one that is sharp, one that fills gaps."""

NEARER = 6.0
"""A point that is nearer to a view's camera by one unit counts exp(this) times as much."""

FACING = 8.0
"""How suddenly a surface that turns away from a view stops being seen there, of the normal's cosine."""

_SPREAD = 2  # cells of a token along each side
_USUAL_SIZE = 0.9  # of the framed object, in units of the window
_LEAST_WEIGHT = 1e-4
_FARTHEST = 1.5  # objects end before it; a wild guess must not overflow


class Lift(nn.Module):
    """Tokens and `E(y)` of the picture to extra input channels of the six views."""

    right: Tensor
    back: Tensor

    def __init__(self, token_dim: int, channels: int) -> None:
        """Begin with a flat object that faces the camera.

        Args:
            channels: learned values that a cell carries, beside its latent, normal and depth.
        """
        super().__init__()
        self.surface = nn.Linear(token_dim, SURFACE_CHANNELS * _SPREAD**2)
        self.value = nn.Linear(token_dim, channels * _SPREAD**2)
        nn.init.zeros_(self.surface.weight)
        nn.init.zeros_(self.surface.bias)
        axes = [camera_axes(camera) for camera in TARGET_CAMERAS]
        right, back = (torch.from_numpy(np.stack([three[k] for three in axes])) for k in (0, 2))
        self.register_buffer("right", right, persistent=False)  # (V, 3)
        self.register_buffer("back", back, persistent=False)

    def forward(self, tokens: Tensor, image_latent: Tensor) -> tuple[Tensor, Tensor]:
        """What each view is told, and the surface that was guessed.

        Args:
            tokens: (b, n^2, token_dim) of n by n patches of the picture; its grid of cells is twice as fine.
            image_latent: `E(y)` (b, c, h, w).

        Returns:
            `(lifted, surface)`: (b, V + 1, lift_channels, h, w), the picture itself last, and
            (b, SURFACE_CHANNELS, grid, grid): the logit of coverage, position, normal of any length.
        """
        kind = "cpu" if tokens.is_meta else tokens.device.type  # shapes alone know no autocast
        with torch.autocast(kind, enabled=False):  # places are no matter for bfloat16
            return self._lifted(tokens.float(), image_latent.float())

    def _lifted(self, tokens: Tensor, image_latent: Tensor) -> tuple[Tensor, Tensor]:
        size = image_latent.shape[-2:]
        surface, value = _cells_of(self.surface(tokens)), _cells_of(self.value(tokens))
        grid = surface.shape[-1]
        surface = surface + _flat(grid, surface)
        latent = image_latent
        if size != (grid, grid):
            latent = F.interpolate(image_latent, (grid, grid), mode="area")
        lifted = self.lay(surface, torch.cat([latent, value], dim=1))
        if lifted.shape[-2:] != size:
            views = lifted.shape[1]
            lifted = F.interpolate(lifted.flatten(0, 1), size, mode="bilinear").unflatten(0, (-1, views))
        return lifted, surface

    def lay(self, surface: Tensor, values: Tensor) -> Tensor:
        """Splats of the picture's cells (b, V + 1, lift_channels, grid, grid), the picture itself last.

        Channels, for each of `SPLAT_CELLS`: the values, the normal, the depth towards the view's camera, and
        how much is covered.

        Args:
            surface: (b, SURFACE_CHANNELS, grid, grid), as `forward` gives it.
            values: (b, n, grid, grid).
        """
        grid = surface.shape[-1]
        cells = _cell_centres(grid, surface)
        coverage, position = surface[:, :1].sigmoid().flatten(2), surface[:, 1:4].flatten(2)
        normal = F.normalize(surface[:, 4:], dim=1, eps=1e-4).flatten(2)
        common = torch.cat([values.flatten(2), normal], dim=1)

        depth = self.back @ position  # (b, V, S)
        nearness = torch.exp(NEARER * depth.clamp(-_FARTHEST, _FARTHEST))
        seen = coverage * torch.sigmoid(FACING * (self.back @ normal)) * nearness
        parts = common[:, None] * seen[:, :, None], (depth * seen)[:, :, None], seen[:, :, None]
        weighted = torch.cat(parts, dim=2)  # (b, V, n + 5, S)
        across, down = self.right @ position, position[:, 1:2]  # elevation 0: up is +Y in every view
        laid = []
        for width in SPLAT_CELLS:
            sigma = width * 2.0 * HALF_WINDOW / grid
            columns = _bell(cells[:, None] - across[:, :, None], sigma)  # (b, V, grid, S)
            rows = _bell(-cells[:, None] - down[:, :, None], sigma).transpose(-1, -2)  # (b, 1, S, grid)
            sums = _laid(weighted, columns, rows)
            mass = _laid(coverage[:, None], columns, rows)
            covered = 1.0 - torch.exp(-mass)
            laid += [sums[:, :, :-1] / (sums[:, :, -1:] + _LEAST_WEIGHT) * covered, covered]
        own = torch.cat([common, position[:, 2:], coverage], dim=1)  # +Z is towards the input's azimuth
        own = torch.cat([own.unflatten(2, (grid, grid))] * len(SPLAT_CELLS), dim=1)
        return torch.cat([torch.cat(laid, dim=2), own[:, None]], dim=1)


def _cells_of(values: Tensor) -> Tensor:
    """(b, tokens, n * spread^2) to (b, n, grid, grid): a token's cells are its own."""
    side = math.isqrt(values.shape[1])
    return F.pixel_shuffle(values.transpose(1, 2).unflatten(2, (side, side)), _SPREAD)


def _cell_centres(grid: int, like: Tensor) -> Tensor:
    """From left to right, in units of the window (grid,)."""
    at = torch.arange(grid, device=like.device, dtype=like.dtype)
    return ((at + 0.5) * (2.0 / grid) - 1.0) * HALF_WINDOW


def _flat(grid: int, like: Tensor) -> Tensor:
    """The surface of a flat object that faces the camera (SURFACE_CHANNELS, grid, grid)."""
    across = (_cell_centres(grid, like) * _USUAL_SIZE).repeat(grid, 1)
    none, one = torch.zeros_like(across), torch.ones_like(across)
    return torch.stack([none, across, -across.T, none, none, none, one])


def _bell(distance: Tensor, sigma: float) -> Tensor:
    """`exp(-distance^2 / (2 sigma^2))`; the distance is scaled first, which half precision can hold."""
    return torch.exp(-0.5 * (distance * (1.0 / sigma)).square())


def _laid(values: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """Sums of splats (b, V, n, grid, grid) of values (b, V or 1, n, S)."""
    spread = columns[:, :, None] * values[:, :, :, None]  # (b, V, n, grid: x, S)
    return (spread.flatten(2, 3) @ rows).unflatten(2, spread.shape[2:4]).transpose(-1, -2)


def pooled_surface(truth: Tensor, grid: int) -> Tensor:
    """A rendered surface (b, SURFACE_CHANNELS, h, w) on a coarser grid, cells weighted by their coverage."""
    return divided(F.interpolate(multiplied(truth), (grid, grid), mode="area"))


def multiplied(surface: Tensor) -> Tensor:
    """Positions and normals times the coverage, the first channel: what may be averaged."""
    surface = surface.float()
    return torch.cat([surface[:, :1], surface[:, 1:] * surface[:, :1]], dim=1)


def divided(surface: Tensor) -> Tensor:
    """The inverse of `multiplied`, zero where nothing is covered."""
    return torch.cat([surface[:, :1], surface[:, 1:] / surface[:, :1].clamp_min(1e-6)], dim=1)


def lift_channels(latent_channels: int, channels: int) -> int:
    """Extra input channels of the UNet; none where nothing is lifted."""
    return len(SPLAT_CELLS) * (latent_channels + 3 + 1 + channels + 1) if channels else 0
