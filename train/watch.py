"""Objects kept out of training, rendered once, to look at while training runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.trainer import Watch
from train.truth import ground_truth
from uc3d_rt.contract import FOCAL_UNKNOWN
from uc3d_rt.preprocess import frame_object
from uc3d_rt.views import decode_normals


def watched(objects: Sequence[Path], device: str, image_px: int) -> Watch:
    """One random input view of each object and its six true views; focal lengths stay unknown."""
    samples = [ground_truth(path, device=device, image_px=image_px) for path in objects]
    normals, masks = zip(*(decode_normals(sample.normal / 255.0) for sample in samples), strict=True)
    return Watch(
        picture=np.stack([frame_object(sample.input_rgba, image_px) for sample in samples]),
        focal=np.full(len(samples), FOCAL_UNKNOWN, dtype=np.float32),
        color=np.stack([sample.color.astype(np.float32) / 255.0 for sample in samples]),
        normal=np.stack(normals),
        mask=np.stack(masks),
    )
