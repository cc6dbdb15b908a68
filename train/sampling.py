"""Views sampled from the torch networks, through the runtime's own sampler."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.model import MultiviewModel
from train.vae import Vae
from uc3d_rt.contract import SamplingDefaults
from uc3d_rt.sampler import ddim
from uc3d_rt.views import decode_views


@torch.no_grad()
def sample_views(
    model: MultiviewModel,
    vae: Vae,
    image: Tensor,  # (b, 3, H, W) in [0, 1]
    focal: Tensor,  # (b,)
    sampling: SamplingDefaults,
    seed: int = 0,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """Sample the six views of every input.

    Every object starts from the same noise, as `Pipeline` with this seed would.

    Returns:
        `(color, normal, mask)`: (b, 6, H, W, 3) in [0, 1], unit normals, silhouettes (b, 6, H, W).
    """
    images = decode_pairs(vae, sample_latents(model, vae, image, focal, sampling, seed))
    color, normal = images.reshape(2, image.shape[0], -1, *images.shape[1:])
    return decode_views(color, normal)


@torch.no_grad()
def sample_latents(
    model: MultiviewModel, vae: Vae, image: Tensor, focal: Tensor, sampling: SamplingDefaults, seed: int = 0
) -> Tensor:
    """The latents (6b, 8, h, w) of `sample_views`, views varying fastest."""
    preset, device, b = model.preset, image.device, image.shape[0]
    v, c, side = preset.unet.views, preset.unet.latent_channels, preset.unet.latent_px
    half = device.type == "cuda"
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        tokens, image_latent = model.encoder(image).float(), vae.encode(image).float()

    def denoise(
        z_t: NDArray[np.float32], t: float, guided: bool
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        z = torch.from_numpy(z_t).to(device)
        copies = 2 if guided else 1
        keep = torch.ones(copies * b, device=device)
        keep[b:] = 0.0
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            out = model.unet(
                z.repeat(copies, 1, 1, 1),
                torch.full((copies * b,), t, device=device),
                tokens.repeat(copies, 1, 1) * keep[:, None, None],
                image_latent.repeat(copies, 1, 1, 1) * keep[:, None, None, None],
                focal.repeat(copies),
            )
        parts = out.float().cpu().numpy().reshape(copies, *z_t.shape)
        return parts[0], parts[1] if guided else None

    noise = np.random.default_rng(seed).standard_normal((v, 2 * c, side, side), dtype=np.float32)
    z_0 = ddim(
        denoise,
        np.tile(noise * np.float32(sampling.noise_scale), (b, 1, 1, 1)),
        preset.schedule,
        steps=sampling.steps,
        guidance=sampling.guidance,
        guidance_interval=sampling.guidance_interval,
        guidance_rescale=sampling.guidance_rescale,
        first_step_to=sampling.first_step_to,
    )
    return torch.from_numpy(z_0).to(device)


@torch.no_grad()
def decode_pairs(vae: Vae, z_0: Tensor) -> NDArray[np.float32]:
    """Latent pairs (n, 8, h, w) to images (2n, H, W, 3) in [0, 1]: all colours, then all normals."""
    latents = torch.cat(z_0.chunk(2, dim=1))
    half = latents.device.type == "cuda"
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=half):
        images = torch.cat([vae.decode(part).float() for part in latents.split(96)])
    array: NDArray[np.float32] = images.clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    return array
