"""Small changes of the input pictures, made anew at every step.

A cached variant is met several times, always by one of the same few pictures; what the pictures are known by
is then soon learned by heart.  Here each is turned, scaled, moved, brightened and blurred a little as it is
drawn, by no more than what leaves the six views as they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

TURN_DEG = 4.0
SCALE = 0.06  # of the logarithm
SHIFT = 0.02  # of the picture's side
GAMMA = 0.15  # of the logarithm

_BLUR = (0.25, 0.5, 0.25)


def augmented_pictures(image: Tensor, generator: torch.Generator, share: float) -> Tensor:
    """Pictures (b, 3, H, W) in [0, 1] on white, that share of them changed at random; white stays white.

    Each is turned by up to `TURN_DEG`, scaled by up to exp(`SCALE`) either way and moved by up to `SHIFT`;
    raised to a power of up to exp(`GAMMA`) either way; and blurred by up to a binomial kernel of 3 x 3.

    Args:
        generator: on the pictures' device; 6 b numbers are drawn.
    """
    with torch.autocast(image.device.type, enabled=False):  # places are no matter for bfloat16
        return _changed(image.float(), generator, share)


def _changed(image: Tensor, generator: torch.Generator, share: float) -> Tensor:
    b, device = image.shape[0], image.device
    drawn = torch.rand((6, b), device=device, generator=generator, dtype=torch.float32)
    changed = drawn[0] < share
    turn, scale, right, down = (drawn[1:5] * 2.0 - 1.0) * changed
    turn, scale = turn * math.radians(TURN_DEG), torch.exp(-scale * SCALE)
    # Among those changed the first number is uniform again, below the share.
    gamma = torch.exp((drawn[0] / max(share, 1e-12) * 2.0 - 1.0) * GAMMA * changed)
    blur = (drawn[5] * changed)[:, None, None, None]

    cos, sin = torch.cos(turn) * scale, torch.sin(turn) * scale
    # Pixels are half a unit of [-1, 1] for half of the side, hence twice the shift.
    rows = [torch.stack([cos, -sin, 2.0 * SHIFT * right]), torch.stack([sin, cos, 2.0 * SHIFT * down])]
    grid = F.affine_grid(torch.stack(rows).permute(2, 0, 1), list(image.shape), align_corners=False)
    dark = (1.0 - image).clamp(0.0, 1.0)  # zero beyond the border: white
    moved = F.grid_sample(dark, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    dark = torch.where(changed[:, None, None, None], moved, dark)

    line = torch.tensor(_BLUR, device=device)
    kernel = (line[:, None] * line[None, :]).expand(3, 1, 3, 3)
    dark = torch.lerp(dark, F.conv2d(dark, kernel, padding=1, groups=3), blur)
    return (1.0 - dark).clamp(0.0, 1.0) ** gamma[:, None, None, None]
