"""What is optimised: image encoder, multiview UNet and projection heads, with the losses of Eq. 18."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train.image_encoder import ImageEncoder
from train.input_augment import augmented_pictures
from train.losses import (
    diffusion_loss,
    mutual_information_loss,
    noisy_latent,
    normal_loss,
    outline_loss,
    predicted_z_0,
    variance_loss,
)
from train.multiview_unet import MultiviewUNet
from train.presets import Preset
from train.projection_heads import ProjectionHeads
from uc3d_rt.contract import FOCAL_UNKNOWN
from uc3d_rt.sampler import alpha_bars


@dataclass(frozen=True)
class Batch:
    """One step's samples on a device; b objects, V views."""

    z_0: Tensor  # (b, V, 8, h, w) scaled [colour; normal] latents
    image: Tensor  # (b, 3, H, W) input views in [0, 1]
    image_latent: Tensor  # (b, 4, h, w) E(y)
    focal: Tensor  # (b,) f~


def timesteps(uniform: Tensor, train_steps: int, bias: float, last_share: float = 0.0) -> Tensor:
    """Timesteps 0 ... train_steps - 1 with density t^(bias - 1), from numbers uniform in [0, 1).

    That share of them is the last one instead.
    """
    rest = (uniform / max(1.0 - last_share, 1e-12)).clamp_max(1.0)
    t = (rest ** (1.0 / bias) * train_steps).long()
    return t.clamp_max(train_steps - 1)  # a root of 0.99999994 may round to 1


class MultiviewModel(nn.Module):
    """The trained networks; `forward` gives the losses, so that one wrapper serves DDP and FSDP."""

    alpha_bar: Tensor

    def __init__(self, preset: Preset, unet: MultiviewUNet | None = None) -> None:
        super().__init__()
        self.preset = preset
        self.encoder = ImageEncoder(preset.encoder)
        self.unet = unet if unet is not None else MultiviewUNet(preset.unet)
        self.heads = ProjectionHeads(preset.heads)
        alpha_bar = torch.from_numpy(alpha_bars(preset.schedule)).float()
        self.register_buffer("alpha_bar", alpha_bar, persistent=False)

    def forward(
        self, batch: Batch, vae: nn.Module, generator: torch.Generator, probe: nn.Module | None = None
    ) -> dict[str, Tensor]:
        """Losses of one batch (Eq. 18); `vae` is frozen: it decodes x^_0 for L_MI, and encodes input
        pictures that are changed as they are drawn (`TrainSpec.input_augment`).

        The first objects, the group, share one timestep and one noise (the negatives of Eq. 16);
        `var_objects` of them get further draws, whose noise they share too (Eq. 10).  The others
        get one draw at a timestep of their own; the unconditional branch is trained on them only.

        At the last timestep, where only the picture tells anything, errors may be weighted by themselves
        (`LossWeights.relative_power`), and the outlines and normals that the predicted z_0 decodes to
        compared (`lambda_outline`, `lambda_normal`), which the frozen `probe` tells.
        """
        spec, weights = self.preset.train, self.preset.train.losses
        b, device = batch.z_0.shape[0], batch.z_0.device
        group = min(weights.group, b)
        drawn, draws = min(weights.var_objects, b), weights.var_draws
        if weights.lambda_var == 0:
            drawn, draws = 0, 1

        def random(*shape: int) -> Tensor:
            return torch.rand(shape, device=device, generator=generator)

        t = timesteps(random(b), self.preset.schedule.train_steps, spec.timestep_bias, spec.last_share)
        t[:group] = t[0]
        eps = torch.randn(batch.z_0.shape, device=device, generator=generator)
        eps[:group] = eps[:1]
        drop = random(b) < spec.drop_image
        drop[:group] = False
        focal = torch.where(random(b) < spec.drop_focal, FOCAL_UNKNOWN, batch.focal)

        # Second and later draws: same z_0, same t, new noise shared by the objects.
        more = torch.arange(drawn, device=device).repeat(draws - 1)
        rows = torch.cat([torch.arange(b, device=device), more])
        if draws > 1:
            extra = torch.randn((draws - 1, 1, *batch.z_0.shape[1:]), device=device, generator=generator)
            eps = torch.cat([eps, extra.expand(-1, drawn, *extra.shape[2:]).flatten(0, 1)])

        image, image_latent = batch.image, batch.image_latent
        if spec.input_augment > 0:
            image = augmented_pictures(image, generator, spec.input_augment)
            with torch.no_grad():
                image_latent = vae.encode(image).to(image_latent.dtype)
        keep = (~drop).to(batch.z_0.dtype)
        tokens = self.encoder(image) * keep[:, None, None]
        image_latent = image_latent * keep[:, None, None, None]
        z_0, t, focal = batch.z_0[rows], t[rows], focal[rows]
        alpha_bar = self.alpha_bar[t]
        z_t = noisy_latent(z_0, eps, alpha_bar)
        prediction = self.unet(z_t.flatten(0, 1), t.float(), tokens[rows], image_latent[rows], focal)
        prediction = prediction.reshape(z_0.shape).float()
        features, self.unet.mid_features = self.unet.mid_features, None  # not kept: it holds the graph

        kind = self.preset.schedule.prediction
        last = (t == self.preset.schedule.train_steps - 1) & keep[rows].bool()  # with their picture
        relative = (last, weights.relative_power) if weights.relative_power > 0 else None
        losses = {"diffusion": diffusion_loss(prediction, z_0, eps, alpha_bar, kind, relative)}
        total = losses["diffusion"]
        if weights.probed:
            assert probe is not None
            c = z_0.shape[2] // 2
            guess = predicted_z_0(prediction, z_t, alpha_bar, kind)[:, :, c:]
            with torch.no_grad():
                truth = probe(z_0[:, :, c:].flatten(0, 1)).float().unflatten(0, z_0.shape[:2])
            cells, coverage = probe(guess.flatten(0, 1)).unflatten(0, z_0.shape[:2]), truth[:, :, 0].sigmoid()
            if weights.lambda_outline > 0:
                losses["outline"] = outline_loss(cells[:, :, 0], coverage, last)
                total = total + weights.lambda_outline * losses["outline"]
            if weights.lambda_normal > 0:
                losses["normal"] = normal_loss(cells[:, :, 1:], truth[:, :, 1:], coverage, last)
                total = total + weights.lambda_normal * losses["normal"]
        if weights.lambda_var > 0:
            assert features is not None
            features = features.reshape(rows.numel(), z_0.shape[1], -1)
            paired = torch.stack([features[:drawn], *features[b:].split(drawn)], dim=1)  # (drawn, K, V, D)
            losses["var"] = variance_loss(paired)
            total = total + weights.lambda_var * losses["var"]
        if weights.lambda_mi > 0:
            # Never beyond the batch: what follows it are more draws of the same objects.
            k = min(weights.mi_objects, b)
            losses["mi"] = self.contrast(prediction[:k], z_t[:k], alpha_bar[:k], vae, generator)
            total = total + weights.lambda_mi * losses["mi"]
        return losses | {"total": total}

    def contrast(
        self, prediction: Tensor, z_t: Tensor, alpha_bar: Tensor, vae: nn.Module, generator: torch.Generator
    ) -> Tensor:
        """L_MI of `mi_views` views drawn at random, scaled to the sum over all views (Eq. 17).

        Args:
            prediction: the network's output (K, V, 8, h, w) for K different objects.
            z_t: its input, at the same t and eps for all K.
            alpha_bar: (K,).
        """
        weights = self.preset.train.losses
        all_views, c = z_t.shape[1], z_t.shape[2] // 2
        views = torch.randperm(all_views, device=z_t.device, generator=generator)[: weights.mi_views]
        z_0 = predicted_z_0(prediction, z_t, alpha_bar, self.preset.schedule.prediction)
        z_0 = z_0[:, views].transpose(0, 1)  # (views, K, 8, h, w)
        latents = torch.cat([z_0[:, :, :c], z_0[:, :, c:]], dim=0).flatten(0, 1)
        images = vae.decode(latents).clamp(0.0, 1.0)
        color, normal = images.chunk(2)
        color_embedding, normal_embedding = self.heads(color, normal)
        shape = (views.numel(), -1, color_embedding.shape[-1])
        loss = mutual_information_loss(
            color_embedding.reshape(shape), normal_embedding.reshape(shape), weights.temperature
        )
        return loss * (all_views / views.numel())
