"""Rendered input views, framed on the device that rendered them.

`uc3d_rt.preprocess.frame_object` defines what is right and a test compares the two, to the rounding of
one byte.  There it is Pillow's code, picture by picture; here it is two matrix products for all pictures,
which takes the host no time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.render import ImageTensors
from uc3d_rt.preprocess import SOLID, frame_of_box


def framed(images: ImageTensors, image_px: int) -> tuple[Tensor, list[bool]]:
    """Views of straight alpha as `frame_object` gives them.

    Returns:
        Pictures (N, image_px, image_px, 3) uint8 on the device; and of each view whether it shows
        anything to frame.
    """
    start, side, seen = _frames(images.alpha)
    alpha = images.alpha[..., None].int()
    product = images.color.int() * alpha + 128  # premultiplied, in Pillow's integers
    layers = torch.cat([((product >> 8) + product) >> 8, alpha], dim=-1)
    square = _resampled(layers.float(), start, side, image_px)
    pictures = (square[..., :3] + (255.0 - square[..., 3:])).clamp(0.0, 255.0)
    return pictures.byte(), seen


def _frames(alpha: Tensor) -> tuple[Tensor, Tensor, list[bool]]:
    """Left upper corners (N, 2: x, y) and sides (N,) of the frames of alpha (N, H, W), in pixels.

    A view in which nothing is solid gets the frame of the whole picture.
    """
    solid = alpha > SOLID
    edges = [solid.flatten(1).any(dim=1).int()]
    for dim in (1, 2):
        line = solid.any(dim=dim).int()
        edges += [line.argmax(dim=1), line.shape[1] - line.flip(1).argmax(dim=1)]
    boxes = torch.stack(edges, dim=1).tolist()
    frames = [frame_of_box(left, top, right, bottom) for _, left, right, top, bottom in boxes]
    table = torch.tensor([(f.left, f.top, f.side) for f in frames], dtype=torch.float64).to(alpha.device)
    return table[:, :2], table[:, 2], [bool(some) for some, *_ in boxes]


def _resampled(layers: Tensor, start: Tensor, side: Tensor, size_px: int) -> Tensor:
    """Layers (N, H, H, C), zero beyond their border, as whole numbers (N, size_px, size_px, C)."""
    across, down = _weights(start, side, layers.shape[1], size_px).unbind(dim=1)
    rows = (layers.permute(0, 3, 1, 2) @ across[:, None].mT + 0.5).floor()  # Pillow rounds in between too
    return (down[:, None] @ rows + 0.5).floor().permute(0, 2, 3, 1)


def _weights(start: Tensor, side: Tensor, source_px: int, size_px: int) -> Tensor:
    """(N, 2: along x, y, size_px, source_px): what each pixel gives to each pixel of the frame."""
    beyond = source_px // 4  # more than a frame and its last pixel's kernel reach over the border
    scale = (side / size_px)[:, None, None, None]
    pixel = torch.arange(-beyond, source_px + beyond, device=start.device, dtype=torch.float64) + 0.5
    middle = torch.arange(size_px, device=start.device, dtype=torch.float64)[:, None] + 0.5
    distance = (pixel - (start[:, :, None, None] + middle * scale)).float()
    x = distance / scale.clamp_min(1.0).float()
    weights = torch.sinc(x) * (0.54 + 0.46 * torch.cos(torch.pi * x)) * (x.abs() < 1.0)  # Hamming
    return (weights / weights.sum(dim=-1, keepdim=True))[..., beyond : beyond + source_px]
