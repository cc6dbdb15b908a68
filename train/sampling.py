"""Views sampled from the torch networks, through the runtime's own sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.model import MultiviewModel
from train.vae import Vae
from uc3d_rt.contract import SamplingDefaults
from uc3d_rt.mirror import mirrored_latents
from uc3d_rt.sampler import Denoiser, Step, after_first_step, run_steps, sampling_steps
from uc3d_rt.views import decode_views

FloatArray = NDArray[np.float32]


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
    preset, b = model.preset, image.shape[0]
    v, c, side = preset.unet.views, preset.unet.latent_channels, preset.unet.latent_px
    noise = np.random.default_rng(seed).standard_normal((v, 2 * c, side, side), dtype=np.float32)
    z_T = np.tile(noise * np.float32(sampling.noise_scale), (b, 1, 1, 1))
    plan = sampling_steps(preset.schedule, sampling)

    def run(denoise: Denoiser, z_t: FloatArray, steps: Sequence[Step]) -> FloatArray:
        return run_steps(denoise, z_t, steps, sampling.guidance, sampling.guidance_rescale)

    own = _denoiser(model, vae, image, focal)
    if not sampling.mirror:
        return torch.from_numpy(run(own, z_T, plan)).to(image.device)

    def decode(latents: FloatArray) -> FloatArray:
        return _autoencoded(vae.decode, latents, image.device).clip(0.0, 1.0)

    def encode(images: FloatArray) -> FloatArray:
        return _autoencoded(vae.encode, images, image.device)

    # As `uc3d_rt.generation`: the first step goes to z_0, for the picture and for its mirror image.
    at_once = sampling_steps(preset.schedule, replace(sampling, steps=1))
    mirrored = run(_denoiser(model, vae, image.flip(-1), focal), z_T, at_once)
    z_0 = (run(own, z_T, at_once) + mirrored_latents(mirrored, decode, encode)) / np.float32(2.0)
    z_0 = run(own, after_first_step(z_0, z_T, preset.schedule, plan), plan[1:])
    return torch.from_numpy(z_0).to(image.device)


def _denoiser(model: MultiviewModel, vae: Vae, image: Tensor, focal: Tensor) -> Denoiser:
    """The UNet, told of these pictures (b, 3, H, W)."""
    device, b = image.device, image.shape[0]
    half = device.type == "cuda"
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        tokens, image_latent = model.encoder(image).float(), vae.encode(image).float()

    def denoise(z_t: FloatArray, t: float, guided: bool) -> tuple[FloatArray, FloatArray | None]:
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

    return denoise


@torch.no_grad()
def decode_pairs(vae: Vae, z_0: Tensor) -> FloatArray:
    """Latent pairs (n, 8, h, w) to images (2n, H, W, 3) in [0, 1]: all colours, then all normals."""
    images = _autoencoded(vae.decode, torch.cat(z_0.chunk(2, dim=1)), z_0.device)
    return np.ascontiguousarray(images.clip(0.0, 1.0).transpose(0, 2, 3, 1))


def _autoencoded(
    part: Callable[[Tensor], Tensor], values: Tensor | FloatArray, device: torch.device
) -> FloatArray:
    """What a half of the autoencoder makes of images or latents, a chunk at a time."""
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        parts = [part(chunk.to(device)).float() for chunk in torch.as_tensor(values).split(96)]
    array: FloatArray = torch.cat(parts).cpu().numpy()
    return array
