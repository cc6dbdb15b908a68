"""Framing on the device: the same as the runtime's `frame_object`, to the rounding of one byte."""

import numpy as np
import pytest
import torch

from train.framing import framed
from train.render import ImageTensors
from uc3d_rt.preprocess import SOLID, frame_object, frame_of_box


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
    place = np.broadcast_to(np.stack([x, y, x * 0.0], axis=-1), (5, size_px, size_px, 3)).astype(np.float32)
    normal = np.broadcast_to(np.uint8([255, 128, 128]), color.shape).copy()
    return ImageTensors(*(torch.from_numpy(a.copy()) for a in (color, normal, np.stack(alpha), place)))


@pytest.mark.parametrize(("source_px", "image_px"), [(288, 256), (36, 32), (72, 64)])
def test_framed_is_frame_object(source_px: int, image_px: int) -> None:
    images = views(source_px)
    pictures, _, seen = framed(images, image_px, 8)
    assert seen == [True] * 4 + [False] and pictures.dtype == torch.uint8
    rgba = torch.cat([images.color, images.alpha[..., None]], dim=-1).numpy()
    for k in range(4):
        difference = np.abs(pictures[k].numpy().astype(int) - frame_object(rgba[k], image_px))
        assert difference.max() <= 1 and (difference > 0).mean() < 0.02


@pytest.mark.parametrize("cells", [32, 64])
def test_the_surface_is_framed_as_the_picture(cells: int) -> None:
    images = views(288)
    pictures, surface, _ = framed(images, 256, cells)
    assert surface.shape == (5, 7, cells, cells) and surface.dtype == torch.float16
    # Where a cell lies in the picture as rendered, from the frame that the runtime's code takes.
    for k in range(4):
        rows, columns = np.nonzero(images.alpha[k].numpy() > SOLID)
        frame = frame_of_box(columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        middle = (np.arange(cells) + 0.5) / cells * frame.side
        x, y = (frame.left + middle - 0.5) / 288, (frame.top + middle - 0.5) / 288
        whole = surface[k, 0] > 0.999
        assert whole.any()
        assert np.abs(surface[k, 1].numpy() - x)[whole].max() < 2e-3
        assert np.abs(surface[k, 2].numpy() - y[:, None])[whole].max() < 2e-3
        torch.testing.assert_close(
            surface[k, 4][whole].float(), torch.ones(int(whole.sum())), atol=0.01, rtol=0
        )
        # As much of a cell is covered as the alpha of the same frame says.
        rgba = torch.cat([torch.zeros_like(images.color[k]), images.alpha[k][..., None]], dim=-1).numpy()
        dark = 1.0 - frame_object(rgba, cells)[..., 0] / 255.0
        assert np.abs(surface[k, 0].numpy() - dark).max() < 0.02
