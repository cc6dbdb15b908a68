"""A small network that tells the silhouette and the normals which a latent of a normal map would decode to.

The losses on decoded views (`outline_loss` and `normal_loss` of `train.losses`) want them of every view at
every step; the autoencoder's decoder tells them too, but at full resolution and for many times the work.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from train.cache import Cache
from train.checkpoint import load_weights
from train.presets import Preset

FILE = "normal_probe.safetensors"
"""Name of its weights in the folder of a run."""

SETS, SET_OBJECTS = 8, 16
"""Batches of the cache that it learns from, and objects of each."""

STEPS, BATCH = 400, 128
"""Of its training."""


class NormalProbe(nn.Module):
    """Latents of normal maps (n, c, h, w) to cells (n, 4, 2h, 2w).

    First the logit of how much of the cell is covered, then a vector along its mean normal.
    """

    def __init__(self, latent_channels: int, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(latent_channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 16, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def forward(self, latent: Tensor) -> Tensor:
        """See the class."""
        cells: Tensor = self.net(latent)
        return cells


@torch.no_grad()
def decoded_cells(latent: Tensor, vae: nn.Module) -> tuple[Tensor, Tensor]:
    """What a probe is to tell, by the decoder itself.

    Args:
        latent: scaled latents of normal maps (n, c, h, w).
        vae: decodes them.

    Returns:
        The share (n, 1, 2h, 2w) of each cell where the decoded normal is longer than 0.5, which is the
        silhouette, and the mean (n, 3, 2h, 2w) of the unit normals there times that share.
    """
    vectors = torch.cat([vae.decode(part).float() for part in latent.split(64)]) * 2.0 - 1.0
    length = vectors.norm(dim=1, keepdim=True)
    mask = (length > 0.5).float()
    cell = mask.shape[-1] // (2 * latent.shape[-1])
    return F.avg_pool2d(mask, cell), F.avg_pool2d(mask * vectors / length.clamp_min(1e-6), cell)


def fit_probe(preset: Preset, cache: Cache, vae: nn.Module, seed: int, steps: int) -> NormalProbe:
    """Train a probe on latents of the cache and on mixtures of them, as an undecided network gives them."""
    device = cache.device
    generator = torch.Generator(device).manual_seed(seed)
    c = preset.unet.latent_channels
    latents, coverages, normals = [], [], []
    for _ in range(SETS):
        z = cache.draw(SET_OBJECTS, generator).z_0[:, :, c:].flatten(0, 1)
        other = z[torch.randperm(len(z), device=device, generator=generator)]
        share = torch.rand((len(z), 1, 1, 1), device=device, generator=generator)
        noise = torch.randn(z.shape, device=device, generator=generator)
        mixed = torch.cat([z, share * z + (1.0 - share) * other, z + 0.3 * share * noise])
        coverage, normal = decoded_cells(mixed, vae)
        latents.append(mixed)
        coverages.append(coverage)
        normals.append(normal)
    latent, covered, direction = torch.cat(latents), torch.cat(coverages), torch.cat(normals)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = NormalProbe(c).to(device)
    optimizer = torch.optim.Adam(probe.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(latent), (BATCH,), device=device, generator=generator)
        cells = probe(latent[rows])
        loss = F.binary_cross_entropy_with_logits(cells[:, :1], covered[rows])
        # Weighted by the length of the cell's mean normal: by its coverage, and by how much it agrees.
        aligned = (F.normalize(cells[:, 1:], dim=1) * direction[rows]).sum(dim=1, keepdim=True)
        loss = loss + (direction[rows].norm(dim=1, keepdim=True) - aligned).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return probe.eval().requires_grad_(False)


def probe_of_run(
    folder: Path, preset: Preset, cache: Cache, vae: nn.Module, seed: int, *, keep: bool
) -> NormalProbe:
    """The probe of a run, which stands in its folder, so that a run that goes on goes on with the same.

    Args:
        folder: of the run.
        preset: for the latents' size.
        cache: what a new one learns from.
        vae: the run's autoencoder.
        seed: of a new one.
        keep: take the one that is there, if there is one; else it is made anew.

    Raises:
        CheckpointError: the file there is none of this profile's.
    """
    path = folder / FILE
    if keep and path.is_file():
        probe = NormalProbe(preset.unet.latent_channels)
        load_weights(probe, path, "remove it: it is made anew")
        return probe.to(cache.device).eval().requires_grad_(False)
    probe = fit_probe(preset, cache, vae, seed, STEPS)
    temporary = path.with_suffix(".tmp")
    save_file({name: value.contiguous() for name, value in probe.state_dict().items()}, temporary)
    temporary.replace(path)
    return probe
