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

from train.lift import divided, multiplied

TURN_DEG = 4.0
SCALE = 0.06  # of the logarithm
SHIFT = 0.02  # of the picture's side
GAMMA = 0.15  # of the logarithm

_BLUR = (0.25, 0.5, 0.25)


def augmented_pictures(
    image: Tensor, surface: Tensor | None, generator: torch.Generator, share: float
) -> tuple[Tensor, Tensor | None]:
    """Pictures (b, 3, H, W) in [0, 1] on white, that share of them changed at random; white stays white.

    Each is turned by up to `TURN_DEG`, scaled by up to exp(`SCALE`) either way and moved by up to `SHIFT`;
    raised to a power of up to exp(`GAMMA`) either way; and blurred by up to a binomial kernel of 3 x 3.

    Args:
        surface: (b, 7, h, w) of what the pictures show, as `train.lift` has it: it is moved with them.
        generator: on the pictures' device; 6 b numbers are drawn.
    """
    with torch.autocast(image.device.type, enabled=False):  # places are no matter for bfloat16
        return _changed(image.float(), surface, generator, share)


def _changed(
    image: Tensor, surface: Tensor | None, generator: torch.Generator, share: float
) -> tuple[Tensor, Tensor | None]:
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
    theta, chosen = torch.stack(rows).permute(2, 0, 1), changed[:, None, None, None]
    dark = (1.0 - image).clamp(0.0, 1.0)  # zero beyond the border: white
    dark = torch.where(chosen, _moved(dark, theta), dark)
    if surface is not None:
        surface = torch.where(chosen, divided(_moved(multiplied(surface), theta)), surface)

    line = torch.tensor(_BLUR, device=device)
    kernel = (line[:, None] * line[None, :]).expand(3, 1, 3, 3)
    dark = torch.lerp(dark, F.conv2d(dark, kernel, padding=1, groups=3), blur)
    return (1.0 - dark).clamp(0.0, 1.0) ** gamma[:, None, None, None], surface


def _moved(layers: Tensor, theta: Tensor) -> Tensor:
    grid = F.affine_grid(theta, list(layers.shape), align_corners=False)
    return F.grid_sample(layers, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
