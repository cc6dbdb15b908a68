"""Framing on the device: the same as the runtime's `frame_object`, to the rounding of one byte."""

import numpy as np
import pytest
import torch

from train.framing import framed
from train.render import ImageTensors
from uc3d_rt.preprocess import frame_object


def views(size_px: int) -> ImageTensors:
    """Noise within ellipses of several places and shapes; the last view shows nothing."""
    rng = np.random.default_rng(size_px)
    y, x = np.mgrid[:size_px, :size_px] / size_px
    alpha = []
    for cx, cy, rx, ry in [
        (0.5, 0.5, 0.48, 0.3),
        (0.5, 0.48, 0.1, 0.47),
        (0.2, 0.7, 0.2, 0.15),
        (0.9, 0.9, 0.3, 0.2),
    ]:
        inside = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2
        alpha.append(np.clip((1.05 - inside) * 1500, 0, 255).astype(np.uint8))
    alpha.append(np.full((size_px, size_px), 100, np.uint8))
    color = rng.integers(0, 256, (5, size_px, size_px, 3), dtype=np.uint8)
    return ImageTensors(*(torch.from_numpy(a) for a in (color, np.zeros_like(color), np.stack(alpha))))


@pytest.mark.parametrize(("source_px", "image_px"), [(288, 256), (36, 32), (72, 64)])
def test_framed_is_frame_object(source_px: int, image_px: int) -> None:
    images = views(source_px)
    pictures, seen = framed(images, image_px)
    assert seen == [True] * 4 + [False] and pictures.dtype == torch.uint8
    rgba = torch.cat([images.color, images.alpha[..., None]], dim=-1).numpy()
    for k in range(4):
        difference = np.abs(pictures[k].numpy().astype(int) - frame_object(rgba[k], image_px))
        assert difference.max() <= 1 and (difference > 0).mean() < 0.02
