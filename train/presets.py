"""The presets `toy`, `edge` and `sdxl`: one code path, three sets of sizes and weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from uc3d_rt.contract import ModelShape, NoiseSchedule, SamplingDefaults
from uc3d_rt.views import NUM_VIEWS


@dataclass(frozen=True)
class UNetSpec:
    """Sizes of the multiview UNet."""

    latent_px: int
    latent_channels: int
    channels: tuple[int, ...]
    attention_levels: tuple[int, ...]  # indices into `channels` that hold transformer blocks
    layers_per_block: int
    head_dim: int
    token_dim: int
    norm_groups: int = 32
    views: int = NUM_VIEWS
    focal_frequencies: int = 6

    def __post_init__(self) -> None:
        if any(c % self.norm_groups for c in self.channels):
            raise ValueError(f"channels {self.channels} must be multiples of norm_groups={self.norm_groups}")
        if self.latent_px % 2 ** (len(self.channels) - 1):
            raise ValueError(f"latent_px={self.latent_px} cannot be halved {len(self.channels) - 1} times")


@dataclass(frozen=True)
class EncoderSpec:
    """Sizes of the image-token encoder: a strided stem, then transformer blocks on its grid."""

    image_px: int
    stem_channels: tuple[int, ...]  # each halves the resolution
    token_dim: int
    layers: int
    head_dim: int = 64

    @property
    def grid(self) -> int:
        """Tokens along one side."""
        return self.image_px // 2 ** len(self.stem_channels)


@dataclass(frozen=True)
class VaeSpec:
    """Sizes of the autoencoder; level i works at image_px / 2^(i+1)."""

    image_px: int
    latent_channels: int
    encoder_channels: tuple[int, ...]
    encoder_blocks: tuple[int, ...]
    decoder_channels: tuple[int, ...]  # from the lowest resolution up
    decoder_blocks: tuple[int, ...]

    @property
    def latent_px(self) -> int:
        """Side of a latent."""
        return self.image_px // 2 ** len(self.encoder_channels)


@dataclass(frozen=True)
class HeadSpec:
    """Sizes of the two projection heads of L_MI."""

    pooled_px: int = 64  # images are averaged down to this before the head
    channels: tuple[int, ...] = (32, 64, 128)
    embedding_dim: int = 128


@dataclass(frozen=True)
class LossWeights:
    """Eq. 16 and 18, and how much of a batch the two regularisers look at."""

    lambda_var: float = 0.01  # on the mean over feature entries (Eq. 11 sums over them)
    lambda_mi: float = 0.05
    temperature: float = 0.1  # tau of Eq. 16
    var_draws: int = 2  # K of Eq. 10: noise draws of the same z_0 at the same t
    var_objects: int = 8  # objects of a batch that get K draws
    mi_objects: int = 8  # K of Eq. 16: pairs of one contrast, same t and eps, different objects
    mi_views: int = 1  # views a step that are decoded for Eq. 16 (drawn at random)


@dataclass(frozen=True)
class TrainSpec:
    """Optimisation of the multiview model."""

    batch: int  # objects a step and device
    steps: int
    lr: float
    lr_final: float
    warmup: int
    weight_decay: float = 0.01
    ema_decay: float = 0.9995
    drop_image: float = 0.1  # probability of the unconditional branch
    drop_focal: float = 0.3  # probability of the "unknown focal length" token
    grad_clip: float = 1.0
    losses: LossWeights = field(default_factory=LossWeights)


@dataclass(frozen=True)
class Preset:
    """All that fixes a profile."""

    name: str
    unet: UNetSpec
    encoder: EncoderSpec
    vae: VaeSpec
    heads: HeadSpec
    schedule: NoiseSchedule
    sampling: SamplingDefaults
    train: TrainSpec

    @property
    def shape(self) -> ModelShape:
        """The sizes of the tensor contract."""
        return ModelShape(
            image_px=self.encoder.image_px,
            latent_px=self.unet.latent_px,
            latent_channels=self.unet.latent_channels,
            tokens=self.encoder.grid**2,
            token_dim=self.encoder.token_dim,
            embedding_dim=self.heads.embedding_dim,
        )


EDGE = Preset(
    name="edge",
    unet=UNetSpec(
        latent_px=32,
        latent_channels=4,
        channels=(96, 192, 352),
        attention_levels=(1, 2),
        layers_per_block=1,
        head_dim=32,
        token_dim=320,
    ),
    encoder=EncoderSpec(image_px=256, stem_channels=(32, 64, 160, 320), token_dim=320, layers=3),
    vae=VaeSpec(
        image_px=256,
        latent_channels=4,
        encoder_channels=(64, 96, 128),
        encoder_blocks=(1, 2, 3),
        decoder_channels=(192, 128, 64),
        decoder_blocks=(3, 3, 2),
    ),
    heads=HeadSpec(),
    # v-prediction and zero terminal SNR: eps at a tiny last alpha_bar multiplies every error.
    schedule=NoiseSchedule(zero_terminal_snr=True, prediction="v"),
    sampling=SamplingDefaults(steps=50, guidance=3.0),
    train=TrainSpec(batch=64, steps=20_000, lr=2e-4, lr_final=1e-5, warmup=500),
)

TOY = Preset(
    name="toy",
    unet=UNetSpec(
        latent_px=8,
        latent_channels=4,
        channels=(32, 64),
        attention_levels=(0, 1),
        layers_per_block=1,
        head_dim=32,
        token_dim=64,
        norm_groups=16,
    ),
    encoder=EncoderSpec(image_px=32, stem_channels=(16, 32, 64), token_dim=64, layers=1, head_dim=32),
    vae=VaeSpec(
        image_px=32,
        latent_channels=4,
        encoder_channels=(32, 48),
        encoder_blocks=(1, 1),
        decoder_channels=(48, 32),
        decoder_blocks=(1, 1),
    ),
    heads=HeadSpec(pooled_px=16, channels=(16, 32), embedding_dim=32),
    schedule=NoiseSchedule(zero_terminal_snr=True, prediction="v"),
    sampling=SamplingDefaults(steps=50, guidance=3.0),
    train=TrainSpec(
        batch=8,
        steps=300,
        lr=1e-3,
        lr_final=1e-4,
        warmup=20,
        ema_decay=0.99,
        losses=LossWeights(var_objects=4, mi_objects=4),
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (EDGE, TOY)}
