"""A bundle of random weights: figures of speed and memory want no others, and no checkpoint of that size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from export.networks import modules_of
from export.onnx_bundle import export_network, network_file
from train.checkpoint import build_vae
from train.model import MultiviewModel
from train.multiview_unet import MultiviewUNet
from train.presets import Preset
from uc3d_rt.contract import NETWORK_NAMES, Manifest, save_manifest


def random_bundle(preset: Preset, folder: Path, device: str, timed: Callable[[str], None]) -> MultiviewUNet:
    """Write a bundle in fp32, unchecked.

    Args:
        preset: sizes of the networks.
        folder: empty.
        device: where networks are made and traced: "cuda" is far faster for large ones.
        timed: told of each thing as it is done.

    Returns:
        The UNet, float32, on the device; its weights are numbers that fp16 has.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = MultiviewModel(preset, MultiviewUNet(preset.unet)).to(device)
        vae = build_vae(preset)
    with torch.no_grad():
        for parameter in (*model.parameters(), *vae.parameters()):
            if not parameter.any():
                parameter.normal_(std=0.02)  # what starts as zero would hide
            parameter.copy_(parameter.half())
    count = sum(parameter.numel() for parameter in model.unet.parameters())
    timed(f"networks with random weights made, {count / 1e6:.0f} M parameters in the UNet")
    networks, files = modules_of(model, vae), {}
    for name in NETWORK_NAMES:
        export_network(preset, name, networks[name], folder / f"{name}.onnx", device)
        files[name] = network_file(folder / f"{name}.onnx")
        timed(f"{name} exported, {files[name].total_bytes / 2**20:.0f} MiB")
    training = {"weights": "random"}
    save_manifest(
        Manifest(preset.name, preset.shape, preset.schedule, preset.sampling, files, training), folder
    )
    return model.unet
