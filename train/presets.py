"""The presets `toy`, `edge` and `sdxl`: one code path, three sets of sizes and weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

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
    transformer_layers: tuple[int, ...] = ()  # transformer blocks in a row, a level; empty = 1 each

    def __post_init__(self) -> None:
        if self.transformer_layers and len(self.transformer_layers) != len(self.channels):
            raise ValueError(
                f"transformer_layers={self.transformer_layers} must name {len(self.channels)} levels"
            )
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

    def __post_init__(self) -> None:
        if self.token_dim % self.head_dim:
            raise ValueError(f"token_dim={self.token_dim} must be a multiple of head_dim={self.head_dim}")

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
class KlVaeSpec:
    """Sizes of a diffusers AutoencoderKL; level i works at image_px / 2^i."""

    image_px: int
    latent_channels: int
    channels: tuple[int, ...]
    layers_per_block: int
    scaling_factor: float  # latents are multiplied by it, to about unit variance
    norm_groups: int = 32

    @property
    def latent_px(self) -> int:
        """Side of a latent."""
        return self.image_px // 2 ** (len(self.channels) - 1)


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
    relative_power: float = 0.0  # at t = T - 1: errors are divided by this power of themselves; 0 = Eq. 9
    lambda_outline: float = 0.0  # at t = T - 1: on the silhouettes that the predicted z_0 decodes to
    lambda_normal: float = 0.0  # at t = T - 1: on the angles of the normals that it decodes to

    def __post_init__(self) -> None:
        if not (self.lambda_var >= 0 and self.lambda_mi >= 0 and self.temperature > 0):
            raise ValueError(f"loss weights must be 0 or more and the temperature positive, got {self}")
        if not (0 <= self.relative_power <= 1 and self.lambda_outline >= 0 and self.lambda_normal >= 0):
            raise ValueError(
                f"relative_power must be 0 to 1, lambda_outline and lambda_normal 0 or more: {self}"
            )
        if self.lambda_var > 0 and (self.var_draws < 2 or self.var_objects < 1):
            raise ValueError(f"L_var needs var_draws >= 2 of var_objects >= 1, got {self}")
        if self.lambda_mi > 0 and (self.mi_objects < 2 or self.mi_views < 1):
            raise ValueError(f"L_MI needs mi_objects >= 2 and mi_views >= 1, got {self}")

    @property
    def probed(self) -> bool:
        """Whether a loss looks at what the predicted z_0 decodes to, through `train.normal_probe`."""
        return self.lambda_outline > 0 or self.lambda_normal > 0

    @property
    def group(self) -> int:
        """How many objects of a batch share one t and eps, for the regularisers that are on."""
        return max(
            self.var_objects if self.lambda_var > 0 else 0, self.mi_objects if self.lambda_mi > 0 else 0
        )


@dataclass(frozen=True)
class TrainSpec:
    """Optimisation of the multiview model."""

    batch: int  # objects a step and device
    steps: int
    lr: float
    lr_final: float
    warmup: int
    lr_drop: int = 0  # the step from which on the rate is lr_final; 0 = a cosine from lr to lr_final
    optimizer: str = "adamw"  # or "muon": Muon for the weight matrices (train/optimizer.py)
    weight_decay: float = 0.01
    ema_decay: float = 0.9995
    drop_image: float = 0.1  # probability of the unconditional branch
    drop_focal: float = 0.3  # probability of the "unknown focal length" token
    grad_clip: float = 1.0
    timestep_bias: float = 1.0  # density of t: t^(bias - 1); 1 = uniform (Eq. 9), 2 = half of all above 0.7 T
    last_share: float = 0.0  # probability of t = T - 1, where only the picture tells anything
    input_augment: float = 0.0  # share of the input pictures changed as drawn (train/input_augment.py)
    losses: LossWeights = field(default_factory=LossWeights)
    gradient_checkpointing: bool = False  # recompute the UNet's blocks: less memory, a third more time

    def __post_init__(self) -> None:
        if self.batch < 1 or self.steps < 1 or not self.lr > 0:
            raise ValueError(
                f"batch and steps must be 1 or more and lr above 0, "
                f"got batch={self.batch}, steps={self.steps}, lr={self.lr}"
            )
        if self.lr_drop and self.lr_drop < self.warmup:
            raise ValueError(f"lr_drop={self.lr_drop} lies within the warm-up of {self.warmup} steps")
        if not self.timestep_bias > 0:
            raise ValueError(f"timestep_bias must be above 0, got {self.timestep_bias}")
        if not 0 <= self.last_share <= 1:
            raise ValueError(f"last_share must be between 0 and 1, got {self.last_share}")
        if not 0 <= self.input_augment <= 1:
            raise ValueError(f"input_augment must be between 0 and 1, got {self.input_augment}")
        if self.drop_image > 0 and self.batch <= self.losses.group:
            raise ValueError(
                f"batch={self.batch} leaves no object to train the unconditional branch on: "
                f"L_var and L_MI hold {self.losses.group} of it; use {self.losses.group + 1} or more"
            )


@dataclass(frozen=True)
class Preset:
    """All that fixes a profile."""

    name: str
    unet: UNetSpec
    encoder: EncoderSpec
    vae: VaeSpec | KlVaeSpec
    heads: HeadSpec
    schedule: NoiseSchedule
    sampling: SamplingDefaults
    train: TrainSpec

    def __post_init__(self) -> None:
        for name, a, b in (
            ("image_px", self.encoder.image_px, self.vae.image_px),
            ("latent_px", self.unet.latent_px, self.vae.latent_px),
            ("latent_channels", self.unet.latent_channels, self.vae.latent_channels),
            ("token_dim", self.unet.token_dim, self.encoder.token_dim),
        ):
            if a != b:
                raise ValueError(f"preset {self.name!r}: two parts disagree on {name}: {a} and {b}")

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
        norm_groups=16,  # 6, 12 and 22 channels a group: fused kernels read channels in pairs
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
    sampling=SamplingDefaults(
        guidance_interval=(0.075, 0.1), noise_scale=0.5, first_step_to=0.1, mirror=True
    ),
    # The layout is decided at t = T - 1, from the picture alone, and a first step far down keeps it:
    # most of the draws stand there. At less noise the views themselves tell their layout.
    train=TrainSpec(
        batch=64,
        steps=20_000,
        lr=1.5e-3,
        lr_final=1e-5,
        warmup=300,
        optimizer="muon",
        drop_image=0.05,  # guidance acts in no more than a step or two
        drop_focal=0.6,  # most people's pictures come without it
        last_share=0.9,
        weight_decay=0.03,
        input_augment=0.75,
        losses=LossWeights(relative_power=1.0, lambda_outline=0.6, lambda_normal=0.4),
    ),  # fmt: skip
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

# The paper's own size (Sec. 4.1.3): SDXL's UNet and autoencoder, given with `--pretrained`.
SDXL = Preset(
    name="sdxl",
    unet=UNetSpec(
        latent_px=64,
        latent_channels=4,
        channels=(320, 640, 1280),
        attention_levels=(1, 2),
        layers_per_block=2,
        head_dim=64,
        token_dim=2048,
        transformer_layers=(1, 2, 10),
    ),
    encoder=EncoderSpec(image_px=512, stem_channels=(64, 128, 256, 512, 1024), token_dim=2048, layers=4),
    vae=KlVaeSpec(
        image_px=512,
        latent_channels=4,
        channels=(128, 256, 512, 512),
        layers_per_block=2,
        scaling_factor=0.13025,
    ),
    heads=HeadSpec(),
    # SDXL's own schedule; its last alpha_bar is 0.0047, large enough to predict eps.
    schedule=NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_curve="scaled_linear", prediction="eps"),
    sampling=SamplingDefaults(steps=50, guidance=3.0),
    train=TrainSpec(
        batch=24,  # on each of 8 GPUs: 192, as in the paper
        steps=60_000,
        lr=1e-4,
        lr_final=1e-5,
        warmup=0,
        lr_drop=10_000,
        gradient_checkpointing=True,
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (EDGE, TOY, SDXL)}


def with_train(preset: Preset, **changes: Any) -> Preset:
    """A preset with some of its optimisation settings replaced; None leaves one as it is."""
    return replace(preset, train=replace(preset.train, **{k: v for k, v in changes.items() if v is not None}))
