"""Presets are checked when they are made; `sdxl` is the paper's network and loads from diffusers folders."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from export.networks import load_networks
from train.__main__ import cli
from train.cache import vae_fingerprint
from train.checkpoint import CheckpointError, build_vae, load_vae, save_vae
from train.model import MultiviewModel
from train.multiview_unet import MultiviewUNet, build_unet
from train.presets import (
    EDGE,
    PRESETS,
    SDXL,
    TOY,
    EncoderSpec,
    KlVaeSpec,
    LossWeights,
    Preset,
    UNetSpec,
    with_train,
)
from train.pretrained import load_sdxl_unet, load_sdxl_vae

TINY = Preset(
    name="sdxl",
    unet=UNetSpec(
        latent_px=8, latent_channels=4, channels=(32, 64), attention_levels=(1,), layers_per_block=2,
        head_dim=32, token_dim=48, norm_groups=16, transformer_layers=(1, 2),
    ),
    encoder=EncoderSpec(image_px=32, stem_channels=(16, 32, 64), token_dim=48, layers=1, head_dim=16),
    vae=KlVaeSpec(
        image_px=32, latent_channels=4, channels=(16, 16, 32), layers_per_block=1, scaling_factor=0.13,
        norm_groups=8,
    ),
    heads=TOY.heads,
    schedule=SDXL.schedule,
    sampling=SDXL.sampling,
    train=replace(TOY.train, gradient_checkpointing=True),
)  # fmt: skip


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of SDXL's shape, small: two levels, text-time conditioning and all."""
    folder = tmp_path_factory.mktemp("sdxl")
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=[1, 2],
        attention_head_dim=[1, 2],
        cross_attention_dim=48,
        use_linear_projection=True,
        norm_num_groups=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 32),
        latent_channels=4,
        norm_num_groups=8,
        scaling_factor=0.13,
    ).save_pretrained(folder / "vae")
    return folder


def test_losses_are_the_papers_in_every_preset() -> None:
    for preset in PRESETS.values():
        assert (preset.train.losses.lambda_var, preset.train.losses.lambda_mi) == (0.01, 0.05)
        assert (preset.sampling.steps, preset.sampling.guidance) == (50, 3.0)
        assert preset.train.batch > preset.train.losses.group


def test_sdxl_is_the_published_architecture() -> None:
    with torch.device("meta"):
        unet, vae = build_unet(SDXL.unet), build_vae(SDXL)
    # 2,567,463,684 published, less text embedding, plus the channels that widening adds.
    added = 320 * 8 * 9 + 4 * 320 * 9 + 4
    text_time = 2816 * 1280 + 1280 + 1280 * 1280 + 1280
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684 - text_time + added
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert SDXL.vae.latent_px == 64 and SDXL.train.batch * 8 == 192


@torch.no_grad()
def test_sdxl_unet_loads_and_fits_the_preset(sdxl_folder: Path) -> None:
    model = MultiviewModel(TINY, MultiviewUNet(TINY.unet, load_sdxl_unet(sdxl_folder, TINY.unet)))
    source = UNet2DConditionModel.from_pretrained(sdxl_folder / "unet")
    assert torch.equal(model.unet.unet.conv_in.weight[:, :4], source.conv_in.weight)
    assert model.unet.unet.add_embedding is None
    # A checkpoint of it loads into the network that the preset alone builds, and computes the same.
    again = MultiviewModel(TINY)
    again.load_state_dict(model.state_dict())
    given = (
        torch.randn(6, 8, 8, 8),
        torch.tensor([500.0]),
        torch.randn(1, 16, 48),
        torch.randn(1, 4, 8, 8),
        torch.tensor([1.0]),
    )
    torch.testing.assert_close(again.eval().unet(*given), model.eval().unet(*given))


@torch.no_grad()
def test_sdxl_vae_scales_its_latents(sdxl_folder: Path, tmp_path: Path) -> None:
    vae = load_sdxl_vae(sdxl_folder, TINY.vae)
    source = AutoencoderKL.from_pretrained(sdxl_folder / "vae").eval()
    image = torch.rand(2, 3, 32, 32)
    latent = vae.encode(image)
    torch.testing.assert_close(latent, source.encode(image * 2 - 1).latent_dist.mean * 0.13)
    torch.testing.assert_close(vae.decode(latent), source.decode(latent / 0.13).sample / 2 + 0.5)
    assert latent.shape[-1] == TINY.vae.latent_px and not any(p.requires_grad for p in vae.parameters())
    save_vae(vae, tmp_path)
    torch.testing.assert_close(load_vae(tmp_path, TINY).encode(image), latent)


def test_folders_that_are_not_sdxl(sdxl_folder: Path, tmp_path: Path) -> None:
    for load, spec, part in (
        (load_sdxl_unet, TINY.unet, "unet"),
        (load_sdxl_vae, TINY.vae, "vae"),
    ):
        with pytest.raises(FileNotFoundError, match=f"no {part}/config.json; --pretrained wants"):
            load(tmp_path / "nothing", spec)
        folder = tmp_path / part / part
        folder.mkdir(parents=True)
        (folder / "config.json").write_text((sdxl_folder / part / "config.json").read_text())
        (folder / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
        with pytest.raises(CheckpointError, match="convert its weights to safetensors"):
            load(folder.parent, spec)
    with pytest.raises(CheckpointError, match="layers_per_block is 2, not 1"):
        load_sdxl_unet(sdxl_folder, replace(TINY.unet, layers_per_block=1))
    with pytest.raises(CheckpointError, match=r"scaling_factor is 0.13, not 0.5"):
        load_sdxl_vae(sdxl_folder, replace(TINY.vae, scaling_factor=0.5))


def test_parts_of_a_preset_must_agree() -> None:
    with pytest.raises(ValueError, match="disagree on token_dim: 320 and 64"):
        replace(EDGE, encoder=TOY.encoder, vae=replace(EDGE.vae, image_px=32), unet=_small(EDGE.unet))
    with pytest.raises(ValueError, match="disagree on image_px: 256 and 32"):
        replace(EDGE, vae=TOY.vae)


def _small(spec: UNetSpec) -> UNetSpec:
    return replace(spec, latent_px=4)


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({"lambda_var": -1.0}, "0 or more"),
        ({"temperature": 0.0}, "temperature"),
        ({"var_draws": 1}, "var_draws >= 2"),
        ({"mi_objects": 1}, "mi_objects >= 2"),
    ],
)
def test_loss_weights_are_checked(losses: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(LossWeights(), **losses)


def test_a_batch_must_reach_beyond_the_regularised_group() -> None:
    with pytest.raises(ValueError, match="unconditional branch.*use 9 or more"):
        with_train(EDGE, batch=8)
    none = replace(EDGE.train.losses, lambda_var=0.0, lambda_mi=0.0)
    assert with_train(EDGE, batch=1, losses=none).train.batch == 1
    with pytest.raises(ValueError, match="steps=0"):
        with_train(EDGE, steps=0)


def test_sdxl_trains_through_the_same_command(
    sdxl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    losses = replace(TINY.train.losses, var_objects=2, mi_objects=2)
    monkeypatch.setitem(PRESETS, "sdxl", with_train(TINY, batch=3, steps=2, losses=losses))
    (tmp_path / "cache").mkdir()
    meta = {"objects": '["a", "b", "c"]', "variants": "1"}
    meta["vae"] = vae_fingerprint(load_sdxl_vae(sdxl_folder, TINY.vae))
    tensors = {
        "z_0": torch.randn(3, 6, 8, 8, 8).half(),
        "image": torch.zeros(3, 1, 32, 32, 3, dtype=torch.uint8),
        "image_latent": torch.randn(3, 1, 4, 8, 8).half(),
        "focal": torch.zeros(3, 1),
    }
    save_file(tensors, tmp_path / "cache/shard-000.safetensors", meta)
    arguments = ["model", "--profile", "sdxl", "--cache", tmp_path / "cache", "--out", tmp_path / "run"]

    def run(*more: object) -> None:
        result = CliRunner().invoke(cli, [str(a) for a in (*arguments, *more)], catch_exceptions=False)
        assert result.exit_code == 0, result.output

    run("--pretrained", sdxl_folder, "--save-every", 1)
    checkpoint = tmp_path / "run/checkpoint"
    weights = load_file(checkpoint / "model.safetensors")
    source = UNet2DConditionModel.from_pretrained(sdxl_folder / "unet")
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    moved = (weights[f"unet.unet.{name}"] - source.state_dict()[name]).abs().max()
    assert 0 < moved < 1e-2  # began at the pretrained weights, then learned
    run("--vae", checkpoint, "--resume")  # a checkpoint holds all it needs
    preset, networks = load_networks(checkpoint)
    assert preset.name == "sdxl" and networks["vae_decoder"](torch.zeros(1, 4, 8, 8)).shape == (1, 3, 32, 32)
