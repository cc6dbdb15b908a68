"""The autoencoder of the `edge` profile, for colour images and normal maps alike.

AutoencoderTiny-class (convolutions only, 8x downsampling, no sampling step), but working from
half resolution down: the stem folds 2x2 pixels into channels and the last layer unfolds them, which
saves the full-resolution convolutions that cost AutoencoderTiny most of its time on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.presets import VaeSpec


class ResidualBlock(nn.Module):
    """`x + conv(act(conv(act(norm(x)))))`, starting close to the identity.

    Without the norm the deep, unnormalised stack collapsed to a constant image within 200 steps.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        with torch.no_grad():
            self.conv2.weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class Vae(nn.Module):
    """`encode`: image (n, 3, H, W) in [0, 1] to latent (n, c, H/8, W/8) of about unit variance."""

    latent_shift: Tensor
    latent_scale: Tensor

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        self.spec = spec
        down: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, spec.encoder_channels[0], 3, padding=1)]
        for level, (channels, blocks) in enumerate(
            zip(spec.encoder_channels, spec.encoder_blocks, strict=True)
        ):
            if level:
                down.append(nn.Conv2d(spec.encoder_channels[level - 1], channels, 3, stride=2, padding=1))
            down += [ResidualBlock(channels) for _ in range(blocks)]
        down += [nn.SiLU(), nn.Conv2d(spec.encoder_channels[-1], spec.latent_channels, 3, padding=1)]
        self.encoder = nn.Sequential(*down)

        up: list[nn.Module] = [nn.Conv2d(spec.latent_channels, spec.decoder_channels[0], 3, padding=1)]
        for level, (channels, blocks) in enumerate(
            zip(spec.decoder_channels, spec.decoder_blocks, strict=True)
        ):
            if level:
                up += [
                    nn.Upsample(scale_factor=2),
                    nn.Conv2d(spec.decoder_channels[level - 1], channels, 3, padding=1),
                ]
            up += [ResidualBlock(channels) for _ in range(blocks)]
        up += [nn.SiLU(), nn.Conv2d(spec.decoder_channels[-1], 12, 3, padding=1), nn.PixelShuffle(2)]
        self.decoder = nn.Sequential(*up)

        # Measured over the training images once the weights are final: see `normalize_latents`.
        self.register_buffer("latent_shift", torch.zeros(1, spec.latent_channels, 1, 1))
        self.register_buffer("latent_scale", torch.ones(1, spec.latent_channels, 1, 1))

    def encode(self, image: Tensor) -> Tensor:
        """Image (n, 3, H, W) in [0, 1] to a scaled latent (n, c, H/8, W/8)."""
        return (self.encoder(image * 2.0 - 1.0) - self.latent_shift) * self.latent_scale

    def decode(self, latent: Tensor) -> Tensor:
        """Scaled latent (n, c, h, w) to an image (n, 3, 8h, 8w); about [0, 1], not clipped."""
        return (self.decoder(latent / self.latent_scale + self.latent_shift) + 1.0) * 0.5

    @torch.no_grad()
    def normalize_latents(self, images: Tensor) -> None:
        """Set shift and scale so that the latents of `images` have mean 0 and variance 1 a channel."""
        self.latent_shift.zero_()
        self.latent_scale.fill_(1.0)
        latents = torch.cat([self.encode(part) for part in images.split(64)])
        self.latent_shift.copy_(latents.mean(dim=(0, 2, 3), keepdim=True))
        self.latent_scale.copy_(1.0 / latents.std(dim=(0, 2, 3), keepdim=True).clamp_min(1e-6))


def vae_loss(
    vae: Vae, image: Tensor, noise: float = 0.05, generator: torch.Generator | None = None
) -> Tensor:
    """L1 on pixels and on their finite differences, plus a weak pull of latents towards zero.

    Noise of `noise` standard deviations on the latent makes the decoder bear the small errors of a
    sampled latent.
    """
    latent = vae.encoder(image * 2.0 - 1.0)
    spread = latent.detach().float().std()
    shake = torch.randn(latent.shape, generator=generator, device=latent.device, dtype=latent.dtype)
    decoded = (vae.decoder(latent + shake * (noise * spread).to(latent.dtype)) + 1.0) * 0.5
    error = decoded.float() - image.float()
    gradients = (error[..., 1:, :] - error[..., :-1, :]).abs().mean() + (
        error[..., 1:] - error[..., :-1]
    ).abs().mean()
    return error.abs().mean() + gradients + 1e-4 * latent.float().square().mean()
