"""How consistent generated views are: what L_var and L_MI aim at, measured on finished weights.

`latent_variance` is L_var itself (Eq. 11-13).  The others look at pictures alone, so that they say
something of a model trained without L_MI as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.cache import LatentCache
from train.losses import mutual_information_loss, noisy_latent, variance_loss
from train.model import Batch, MultiviewModel
from train.presets import Preset
from train.projection_heads import ProjectionHeads
from train.schedule import step_generator

Array = NDArray[np.floating]

NOISE_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Timesteps at which features are compared, as shares of T."""

WHITE_BELOW = 0.1
"""A colour pixel is background where no channel is darker than white by more than this."""


@torch.no_grad()
def latent_variance(
    model: MultiviewModel, batch: Batch, draws: int = 4, seed: int = 0
) -> tuple[float, float]:
    """L_var over draws of noise, mean over `NOISE_SHARES`, and its share of the features' mean square.

    The share tells features that agree from features that shrank.

    Args:
        batch: objects not trained on; each draw of noise is one for all of them, as in training.
    """
    device, (b, views) = batch.z_0.device, batch.z_0.shape[:2]
    generator = torch.Generator(device=device).manual_seed(seed)
    tokens = model.encoder(batch.image)
    variance, power = 0.0, 0.0
    for share in NOISE_SHARES:
        t = torch.full((b,), round(share * (model.alpha_bar.numel() - 1)), device=device)
        features = []
        for _ in range(draws):
            eps = torch.randn((1, *batch.z_0.shape[1:]), device=device, generator=generator)
            z_t = noisy_latent(batch.z_0, eps.expand_as(batch.z_0), model.alpha_bar[t])
            model.unet(z_t.flatten(0, 1), t.float(), tokens, batch.image_latent, batch.focal)
            kept, model.unet.mid_features = model.unet.mid_features, None
            assert kept is not None
            features.append(kept.float().reshape(b, views, -1))
        drawn = torch.stack(features, dim=1)  # (b, K, V, D)
        variance += float(variance_loss(drawn)) / len(NOISE_SHARES)
        power += float(drawn.square().mean(dim=(0, 1, 3)).sum()) / len(NOISE_SHARES)
    return variance, variance / power


def outline_agreement(color: Array, mask: NDArray[np.bool_]) -> float:
    """Mean over views of the intersection over union of the colours' and the normals' silhouettes.

    Args:
        color: (V, H, W, 3) in [0, 1], on white, not cut out by `mask`.
        mask: (V, H, W), silhouettes of the normal maps.
    """
    shown = (1.0 - np.asarray(color)).max(axis=-1) > WHITE_BELOW
    both, either = (shown & mask).sum(axis=(1, 2)), (shown | mask).sum(axis=(1, 2))
    return float(np.mean(np.where(either > 0, both / np.maximum(either, 1), 1.0)))


def edge_agreement(color: Array, normal: Array) -> float:
    """Mean over views of the correlation between the edges of colour images and of normal maps.

    Args:
        color: (V, H, W, 3) in [0, 1].
        normal: normal maps as images, likewise.
    """
    values = []
    for pair in zip(_edges(color), _edges(normal), strict=True):
        a, b = (edges.ravel() - edges.mean() for edges in pair)
        size = float(np.linalg.norm(a) * np.linalg.norm(b))
        values.append(float(a @ b) / size if size > 0 else 0.0)
    return float(np.mean(values))


def _edges(images: Array) -> Array:
    """Length of the gradient (V, H - 2, W - 2) of images (V, H, W, 3), over all channels.

    Without the outermost pixels, whose differences are one-sided and larger in every image.
    """
    down, across = (g[:, 1:-1, 1:-1] for g in np.gradient(np.asarray(images, np.float64), axis=(1, 2)))
    length: Array = np.sqrt((down**2 + across**2).sum(axis=-1))
    return length


@torch.no_grad()
def embeddings(heads: ProjectionHeads, color: Array, normal: Array) -> tuple[Array, Array]:
    """Unit embeddings (V, D) of one object's colour images and normal maps (V, H, W, 3) in [0, 1]."""
    device = next(heads.parameters()).device
    pictures = (
        torch.from_numpy(np.ascontiguousarray(p)).to(device).permute(0, 3, 1, 2) for p in (color, normal)
    )
    a, b = heads(*(picture.float() for picture in pictures))
    return a.cpu().numpy(), b.cpu().numpy()


def retrieval_accuracy(objects: Sequence[tuple[Array, Array]]) -> float:
    """How often an image's nearest counterpart among all objects is its own, both ways, over views.

    1 / K would be chance, for K objects.

    Args:
        objects: `embeddings` of K objects.
    """
    color, normal = (np.stack(part, axis=1) for part in zip(*objects, strict=True))  # (V, K, D)
    similarity = color @ normal.transpose(0, 2, 1)  # (V, K, K)
    own = np.arange(similarity.shape[-1])
    return float(np.mean([(similarity.argmax(axis=axis) == own).mean() for axis in (1, 2)]))


def reference_heads(
    preset: Preset, cache: LatentCache, vae: torch.nn.Module, steps: int = 300, seed: int = 0
) -> ProjectionHeads:
    """Heads trained with Eq. 16 on the true views of the cache: one measure for all models.

    A model's own heads cannot serve: without L_MI they are untrained, with it they grew up with the
    model's mistakes.
    """
    device, weights = cache.device, preset.train.losses
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        heads = ProjectionHeads(preset.heads).to(device)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-3)
    half = device.type == "cuda"
    for step in range(steps):
        generator = step_generator(device, seed, 0, step)
        z_0 = cache.draw(max(8, weights.mi_objects), generator).z_0  # (K, V, 8, h, w)
        view = torch.randint(z_0.shape[1], (1,), device=device, generator=generator)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            color, normal = (
                vae.decode(part).float().clamp(0, 1) for part in z_0[:, view].squeeze(1).chunk(2, 1)
            )
        pairs: tuple[Tensor, Tensor] = heads(color, normal)
        loss = mutual_information_loss(pairs[0][None], pairs[1][None], weights.temperature)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return heads.eval().requires_grad_(False)
