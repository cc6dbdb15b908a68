"""Which sampler settings suit a checkpoint: a table over guidance, where it acts, and the start noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import torch

from train.checkpoint import load_vae, load_weights, preset_of
from train.metrics import normal_error_deg, psnr, silhouette_iou
from train.model import MultiviewModel
from train.sampling import sample_views
from train.watch import Watch
from uc3d_rt.contract import SamplingDefaults

_WHOLE = SamplingDefaults()  # 50 steps, guidance 3 over the whole interval
_LATE = replace(_WHOLE, guidance_interval=(0.7, 1.0))

SETTINGS: tuple[SamplingDefaults, ...] = (
    _WHOLE,
    replace(_WHOLE, guidance=1.0),
    replace(_WHOLE, guidance=2.0),
    replace(_WHOLE, guidance_rescale=0.7),
    replace(_WHOLE, guidance_interval=(0.0, 0.5)),
    replace(_WHOLE, guidance_interval=(0.5, 1.0)),
    _LATE,
    replace(_LATE, guidance=2.0),
    replace(_LATE, noise_scale=0.7),
    replace(_LATE, noise_scale=0.5),
    replace(_LATE, noise_scale=0.3),
    replace(_LATE, noise_scale=0.0),
    replace(_LATE, noise_scale=0.5, first_step_to=0.8),
    replace(_LATE, noise_scale=0.5, first_step_to=0.6),
    replace(_LATE, noise_scale=0.5, first_step_to=0.4),
    replace(_LATE, steps=20, noise_scale=0.5),
    replace(_LATE, steps=10, noise_scale=0.5),
    replace(_WHOLE, steps=4, guidance=1.0),
    replace(_WHOLE, steps=1, guidance=1.0),
)


def sweep(
    checkpoint: Path,
    watch: Watch,
    device: str,
    settings: Sequence[SamplingDefaults] = SETTINGS,
) -> str:
    """Sample the watched objects with every setting; returns a Markdown table."""
    preset = preset_of(checkpoint)
    model = MultiviewModel(preset).to(device).eval()
    load_weights(model, checkpoint / "ema.safetensors", "give the folder of a checkpoint")
    vae = load_vae(checkpoint, preset).to(device)
    picture = torch.from_numpy(watch.picture).to(device).permute(0, 3, 1, 2).float() / 255.0
    focal = torch.from_numpy(watch.focal).to(device)
    lines = [
        "| steps | guidance | interval | rescale | noise | first step to | mirror | PSNR | IoU | normals ° |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for sampling in settings:
        color, normal, mask = sample_views(model, vae, picture, focal, sampling)
        p = np.mean([psnr(a, b) for a, b in zip(color, watch.color, strict=True)])
        iou = np.mean([silhouette_iou(a, b) for a, b in zip(mask, watch.mask, strict=True)])
        pairs = zip(normal, watch.normal, mask, watch.mask, strict=True)
        angle = np.nanmean([normal_error_deg(*pair) for pair in pairs])
        chosen = " | ".join(str(value) for value in astuple(sampling))
        lines.append(f"| {chosen} | {p:.2f} | {iou:.3f} | {angle:.1f} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)
