"""Training of the autoencoder, on pictures that lie on the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from train.average import update_average
from train.checkpoint import save_vae
from train.presets import Preset
from train.schedule import Planner, learning_rate, step_generator
from train.vae import Vae, vae_loss


def train_vae(
    preset: Preset,
    images: Tensor,
    out: Path,
    *,
    steps: int,
    minutes: float | None,
    batch: int,
    lr: float,
    seed: int,
) -> Vae:
    """Train the autoencoder on images (n, H, W, 3) uint8 that lie on this process's device."""
    accelerator = Accelerator(mixed_precision="bf16" if images.is_cuda else "no")
    torch.manual_seed(seed)
    vae = Vae(preset.vae).to(accelerator.device)
    if images.is_cuda:
        vae = vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    step_of = accelerator.prepare_model(_VaeStep(vae)) if accelerator.num_processes > 1 else _VaeStep(vae)
    planner = Planner(steps, minutes)
    progress = tqdm(total=steps, desc="vae", disable=not accelerator.is_main_process, mininterval=5)
    average: dict[str, Tensor] = {}
    step = 0
    while step < planner.total:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, planner.total, min(200, planner.total // 5), lr, lr * 0.02)
        generator = step_generator(accelerator.device, seed, accelerator.process_index, step)
        rows = torch.randint(images.shape[0], (batch,), device=images.device, generator=generator)
        picture = images[rows].permute(0, 3, 1, 2).float() / 255.0
        with accelerator.autocast():
            loss = step_of(picture, generator)
        accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_average(average, vae, min(0.999, (1 + step) / (10 + step)))
        step += 1
        planner.update(step, accelerator)
        progress.total = planner.total
        progress.update()
        if step % 200 == 0:
            progress.set_postfix(loss=f"{float(loss.detach()):.4f}")
    progress.close()
    vae.load_state_dict(average | {k: v for k, v in vae.state_dict().items() if k not in average})
    vae.eval().requires_grad_(False)
    generator = step_generator(accelerator.device, seed, 0, 1 << 30)
    rows = torch.randint(images.shape[0], (2048,), device=images.device, generator=generator)
    picture = images[rows].permute(0, 3, 1, 2).float() / 255.0
    vae.normalize_latents(picture)
    if accelerator.is_main_process:
        with torch.no_grad():
            decoded = torch.cat(
                [vae.decode(vae.encode(part)).clamp(0, 1) for part in picture[:512].split(64)]
            )
        error = (decoded - picture[:512]).square().mean(dim=(1, 2, 3)).cpu().numpy()
        quality = float(np.mean(-10 * np.log10(error)))
        print(f"vae: {step} steps, mean PSNR {quality:.2f} dB on training images", flush=True)
        if not quality >= 15.0:
            raise FloatingPointError(
                f"the autoencoder collapsed ({quality:.1f} dB); lower the learning rate, or train longer"
            )
        save_vae(vae, out)
    accelerator.wait_for_everyone()
    return vae


class _VaeStep(torch.nn.Module):
    """The loss as a forward pass, for the distributed wrapper."""

    def __init__(self, vae: Vae) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, picture: Tensor, generator: torch.Generator) -> Tensor:
        return vae_loss(self.vae, picture, generator=generator)
