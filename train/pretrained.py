"""SDXL's UNet and autoencoder from a local diffusers folder, as the networks of the `sdxl` preset.

    FOLDER/unet/config.json, FOLDER/unet/*.safetensors
    FOLDER/vae/config.json,  FOLDER/vae/*.safetensors

Nothing is downloaded and nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from train.checkpoint import CheckpointError
from train.multiview_unet import build_unet, widen_unet
from train.presets import KlVaeSpec, UNetSpec

REPLACED = (
    "sample_size",
    "in_channels",
    "out_channels",
    "class_embed_type",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)
"""Settings of a text-to-image UNet that widening changes or that only its text needs."""


class KlVae(nn.Module):
    """A diffusers AutoencoderKL behind the methods of `Vae`; latents are the posterior's mode."""

    def __init__(self, spec: KlVaeSpec, net: AutoencoderKL | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.net = net if net is not None else build_kl(spec)

    def encode(self, image: Tensor) -> Tensor:
        """Image (n, 3, H, W) in [0, 1] to a scaled latent (n, c, H/8, W/8)."""
        return self.net.encode(image * 2.0 - 1.0).latent_dist.mode() * self.spec.scaling_factor

    def decode(self, latent: Tensor) -> Tensor:
        """Scaled latent (n, c, h, w) to an image (n, 3, 8h, 8w); about [0, 1], not clipped."""
        return (self.net.decode(latent / self.spec.scaling_factor, return_dict=False)[0] + 1.0) * 0.5


def build_kl(spec: KlVaeSpec) -> AutoencoderKL:
    """An AutoencoderKL with random weights, sizes from the spec."""
    levels = len(spec.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=spec.channels,
        layers_per_block=spec.layers_per_block,
        latent_channels=spec.latent_channels,
        norm_num_groups=spec.norm_groups,
        scaling_factor=spec.scaling_factor,
    )


def load_sdxl_unet(folder: Path, spec: UNetSpec) -> UNet2DConditionModel:
    """The UNet of a diffusers folder, widened to `[z_t; E(y)] -> 8 channels`, float32, on the CPU.

    Raises:
        FileNotFoundError: the folder has no `unet/`.
        CheckpointError: it holds no safetensors, or a UNet of other sizes than the preset's.
    """
    unet = _load(UNet2DConditionModel, folder, "unet")
    with torch.device("meta"):
        expected = build_unet(spec)
    _check_config(folder / "unet", unet.config, expected.config, REPLACED)
    return widen_unet(unet, spec.latent_channels, spec.token_dim)


def load_sdxl_vae(folder: Path, spec: KlVaeSpec) -> KlVae:
    """The autoencoder of a diffusers folder, frozen, float32, on the CPU; errors as `load_sdxl_unet`."""
    net = _load(AutoencoderKL, folder, "vae")
    with torch.device("meta"):
        expected = build_kl(spec)
    _check_config(folder / "vae", net.config, expected.config, ("sample_size", "force_upcast"))
    return KlVae(spec, net).eval().requires_grad_(False)


def _load(kind: Any, folder: Path, part: str) -> Any:
    if not (folder / part / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no {part}/config.json; --pretrained wants the folder of a diffusers model, "
            "with unet/ and vae/ in it"
        )
    try:
        return kind.from_pretrained(
            folder / part, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32
        )
    except OSError as error:
        raise CheckpointError(
            f"{folder / part} holds no diffusion_pytorch_model.safetensors; "
            "convert its weights to safetensors, other files are not read"
        ) from error


def _check_config(
    folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any], ignored: tuple[str, ...]
) -> None:
    """A checkpoint rebuilds the network from the preset, so every setting must be the preset's."""

    def plain(value: Any) -> Any:
        value = tuple(value) if isinstance(value, list | tuple) else value
        return None if value is False else value

    wrong = [
        f"{key} is {found[key]}, not {value}"
        for key, value in expected.items()
        if not key.startswith("_")
        and key not in ignored
        and key in found
        and plain(found[key]) != plain(value)
    ]
    if wrong:
        raise CheckpointError(
            f"{folder} does not fit the preset: {'; '.join(wrong)}; change train/presets.py"
        )
