"""The five networks as modules whose inputs and outputs are the tensor contract's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from export.example_inputs import example_inputs
from train.checkpoint import load_vae, load_weights, preset_of
from train.model import MultiviewModel
from train.presets import Preset
from train.vae import Vae

if TYPE_CHECKING:
    from train.pretrained import KlVae


class _Encode(nn.Module):
    def __init__(self, vae: Vae) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor) -> Tensor:
        return self.vae.encode(image)


class _Decode(nn.Module):
    def __init__(self, vae: Vae) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent: Tensor) -> Tensor:
        return self.vae.decode(latent).clamp(0.0, 1.0)


def load_networks(checkpoint: Path) -> tuple[Preset, dict[str, nn.Module]]:
    """The averaged weights of a checkpoint as the contract's five modules, float32, on the CPU."""
    preset = preset_of(checkpoint)
    model = MultiviewModel(preset)
    load_weights(model, checkpoint / "ema.safetensors", "give the folder of a whole checkpoint")
    return preset, modules_of(model, load_vae(checkpoint, preset))


def modules_of(model: MultiviewModel, vae: Vae | KlVae) -> dict[str, nn.Module]:
    """The contract's five modules, ready to be exported."""
    networks: dict[str, nn.Module] = {
        "image_encoder": model.encoder,
        "vae_encoder": _Encode(vae),
        "unet": model.unet,
        "vae_decoder": _Decode(vae),
        "projection_heads": model.heads,
    }
    for network in networks.values():
        network.eval().requires_grad_(False)
    return networks


def example_tensors(preset: Preset, name: str, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    """`example_inputs` of a network as torch tensors, in the order of the contract."""
    return tuple(torch.from_numpy(x) for x in example_inputs(preset.shape, name, batch, seed).values())
