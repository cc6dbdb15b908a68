"""The networks: shapes as the contract says, who talks to whom, and what widening keeps."""

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from train.model import MultiviewModel, timesteps
from train.multiview_unet import MultiviewBlock, MultiviewUNet, widen_unet
from train.presets import EDGE, TOY, Preset, UNetSpec
from train.sampling import sample_views
from train.vae import Vae
from uc3d_rt.contract import SamplingDefaults, TensorSpec, network_specs

B, V = 2, 6


def awake(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every zero-initialised layer random weights, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def unet() -> MultiviewUNet:
    torch.manual_seed(1)
    return awake(MultiviewUNet(TOY.unet))  # type: ignore[return-value]


def inputs(preset: Preset = TOY, batch: int = B) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def made(spec: TensorSpec) -> Tensor:
        sizes = {"batch": batch, "samples": batch * V}
        shape = [sizes[s] if isinstance(s, str) else s for s in spec.shape]
        return torch.rand(shape, generator=generator)

    return {spec.name: made(spec) for spec in network_specs(preset.shape)["unet"].inputs}


@pytest.mark.parametrize("preset", [TOY, EDGE], ids=lambda preset: preset.name)
@pytest.mark.parametrize("name", ["image_encoder", "vae_encoder", "unet", "vae_decoder", "projection_heads"])
def test_shapes_follow_the_contract(preset: Preset, name: str) -> None:
    from export.networks import _Decode, _Encode

    with torch.device("meta"):  # shapes without arithmetic
        networks = {
            "image_encoder": lambda: MultiviewModel(TOY).encoder if preset is TOY else _encoder(preset),
            "unet": lambda: MultiviewUNet(preset.unet),
            "vae_encoder": lambda: _Encode(Vae(preset.vae)),
            "vae_decoder": lambda: _Decode(Vae(preset.vae)),
            "projection_heads": lambda: _heads(preset),
        }
        network, spec = networks[name](), network_specs(preset.shape)[name]
        sizes = {"batch": B, "samples": B * V}

        def shape_of(tensor: TensorSpec) -> tuple[int, ...]:
            return tuple(sizes[s] if isinstance(s, str) else s for s in tensor.shape)

        outputs = network(*(torch.zeros(shape_of(tensor)) for tensor in spec.inputs))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert [tuple(output.shape) for output in outputs] == [shape_of(tensor) for tensor in spec.outputs]


def _encoder(preset: Preset) -> torch.nn.Module:
    from train.image_encoder import ImageEncoder

    return ImageEncoder(preset.encoder)


def _heads(preset: Preset) -> torch.nn.Module:
    from train.projection_heads import ProjectionHeads

    return ProjectionHeads(preset.heads)


def test_edge_is_as_small_as_it_says() -> None:
    with torch.device("meta"):
        model, vae = MultiviewModel(EDGE), Vae(EDGE.vae)
    assert sum(p.numel() for p in model.unet.parameters()) < 45e6
    whole = sum(p.numel() for p in [*model.parameters(), *vae.parameters()])
    assert whole < 48 * 2**20  # the shipped bundle, a byte a weight


def block() -> MultiviewBlock:
    unet = MultiviewUNet(TOY.unet)
    found = next(module for module in unet.modules() if isinstance(module, MultiviewBlock))
    return awake(found)  # type: ignore[return-value]


@pytest.mark.parametrize("last_share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("bias", [1.0, 2.0, 3.0])
def test_timesteps_follow_their_density(bias: float, last_share: float) -> None:
    t = timesteps((torch.arange(100_000) + 0.5) / 100_000, 1000, bias, last_share)
    assert t.min() >= 0 and t.max() == 999
    share = torch.bincount(t, minlength=1000).double() / len(t)
    edges = torch.linspace(0, 1, 1001, dtype=torch.float64) ** bias  # the distribution function
    expected = edges.diff() * (1 - last_share)
    expected[-1] += last_share
    assert (share - expected).abs().max() < 3e-5
    assert timesteps(torch.tensor([1 - 2**-24]), 1000, bias, last_share).item() == 999


@torch.no_grad()
def test_row_attention_mixes_the_same_row_of_all_views_only() -> None:
    layer, side, dim, row, view = block(), 8, 32, 5, 2
    given: dict[str, Tensor] = {}
    layer.attn_row.register_forward_hook(lambda _m, _i, out: given.__setitem__("rows", out))
    x = torch.randn(B * (V + 1), side * side, dim, generator=torch.Generator().manual_seed(0))
    tokens = torch.randn(B, 16, 64, generator=torch.Generator().manual_seed(1))
    # Self-attention would carry the change to other rows first: leave it out.
    layer.attn1.to_out[0].weight.zero_()
    layer.attn1.to_out[0].bias.zero_()

    def rows(x: Tensor) -> Tensor:
        layer(x, encoder_hidden_states=tokens)
        return given["rows"].reshape(B, side, V, side, dim).transpose(1, 2)  # b v h w c

    before = rows(x)
    changed = x.clone().reshape(B, V + 1, side, side, dim)
    changed[0, view, row] += 1.0 + torch.rand(side, dim)
    difference = (rows(changed.reshape_as(x)) - before).abs().amax(dim=(3, 4))  # b v h
    assert (difference[0, :, row] > 1e-4).all()  # every view sees it
    difference[0, :, row] = 0.0
    assert difference.max() < 1e-5  # no other row, no other object


@torch.no_grad()
def test_reference_attention_looks_at_the_picture() -> None:
    """Against a transcription: softmax(q k^T / sqrt(d)) v over own and picture tokens, heads apart."""
    layer, side, dim = block(), 4, 32
    for name in ("attn_row", "attn2"):
        getattr(layer, name).to_out[0].weight.zero_()
        getattr(layer, name).to_out[0].bias.zero_()
    for parameter in (*layer.ff.net[2].parameters(), layer.place.weight):
        parameter.zero_()
    x = torch.randn(B * (V + 1), side * side, dim, generator=torch.Generator().manual_seed(0))
    tokens = torch.randn(B, 16, 64, generator=torch.Generator().manual_seed(1))
    found = layer(x, encoder_hidden_states=tokens).double().unflatten(0, (B, V + 1))

    attention = layer.attn1.double()
    normed = layer.norm1(x).double().unflatten(0, (B, V + 1))
    heads = attention.heads

    def looked(queries: Tensor, keys: Tensor) -> Tensor:
        q, k, v = (
            linear(tokens).unflatten(-1, (heads, -1)).transpose(0, 1)
            for linear, tokens in (
                (attention.to_q, queries), (attention.to_k, keys), (attention.to_v, keys)
            )
        )  # fmt: skip
        weights = (q @ k.transpose(1, 2) / (dim // heads) ** 0.5).softmax(dim=-1)
        return attention.to_out[0]((weights @ v).transpose(0, 1).flatten(1))

    whole = x.double().unflatten(0, (B, V + 1))
    for b in range(B):
        for v in range(V + 1):
            keys = normed[b, v] if v == V else torch.cat([normed[b, v], normed[b, V]])
            truth = whole[b, v] + looked(normed[b, v], keys)
            torch.testing.assert_close(found[b, v], truth, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_places_tell_tokens_apart() -> None:
    layer, side, dim = block(), 8, 32
    x = torch.ones(B * (V + 1), side * side, dim) * torch.linspace(-1, 1, dim)
    tokens = torch.randn(B, 16, 64, generator=torch.Generator().manual_seed(1))
    out = layer(x, encoder_hidden_states=tokens).reshape(B, (V + 1) * side * side, dim)
    apart = torch.cdist(out[0], out[0]) + torch.eye((V + 1) * side * side)
    assert apart.min() > 0.05  # every column, row and view, the picture too
    layer.place.weight.zero_()
    out = layer(x, encoder_hidden_states=tokens).unflatten(0, (B, V + 1))[:, :V].flatten(0, 1)
    assert (out - out[:, :1]).abs().max() < 1e-4  # attention alone is blind to them


@torch.no_grad()
def test_views_talk_and_objects_do_not(unet: MultiviewUNet) -> None:
    given = inputs()
    before = unet(**given)
    given["sample"] = given["sample"].clone()
    given["sample"][1] += 1.0  # view 1 of object 0
    difference = (unet(**given) - before).abs().amax(dim=(1, 2, 3)).reshape(B, V)
    assert (difference[0] > 1e-4).all() and difference[1].max() < 1e-5


@torch.no_grad()
def test_views_are_silent_until_row_attention_has_learned() -> None:
    torch.manual_seed(0)
    fresh, given = MultiviewUNet(TOY.unet).eval(), inputs()
    before = fresh(**given)
    given["sample"] = given["sample"].clone()
    given["sample"][1] += 1.0
    difference = (fresh(**given) - before).abs().amax(dim=(1, 2, 3)).reshape(B, V)
    assert difference[0, 1] > 1e-3 and difference[0, [0, 2, 3, 4, 5]].max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["tokens", "image_latent", "focal", "timestep"])
def test_conditions_reach_all_views_of_their_own_object(unet: MultiviewUNet, name: str) -> None:
    given = inputs()
    before = unet(**given)
    given[name] = given[name].clone()
    given[name][1] += 2.0
    difference = (unet(**given) - before).abs().amax(dim=(1, 2, 3)).reshape(B, V)
    assert (difference[1] > 1e-5).all() and difference[0].max() < 1e-6


@torch.no_grad()
def test_a_batch_of_two_is_two_batches_of_one(unet: MultiviewUNet) -> None:
    given = inputs()
    both = unet(**given)
    for b in range(B):
        alone = {
            name: value[b * V : (b + 1) * V] if name == "sample" else value[b : b + 1]
            for name, value in given.items()
        }
        torch.testing.assert_close(unet(**alone), both[b * V : (b + 1) * V], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_each_target_view_has_its_own_embedding(unet: MultiviewUNet) -> None:
    given = inputs()
    given["sample"] = given["sample"][:1].expand(B * V, -1, -1, -1)
    out = unet(**given).reshape(B, V, -1)
    for v in range(1, V):
        assert (out[0, 0] - out[0, v]).abs().max() > 1e-5


@torch.no_grad()
def test_unknown_focal_token(unet: MultiviewUNet) -> None:
    embedded = unet.embed_focal(torch.tensor([-1.0, 0.0, 1.0, 135 / 35, -7.0]))
    assert torch.equal(embedded[0], unet.focal_unknown)
    assert torch.equal(embedded[4], unet.focal_unknown)  # any negative value
    apart = torch.cdist(embedded[:4], embedded[:4]) + torch.eye(4)
    assert apart.min() > 1e-3


def pretrained_unet(**settings: object) -> UNet2DConditionModel:
    torch.manual_seed(4)
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (32, 64),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "transformer_layers_per_block": 2,
            "attention_head_dim": (1, 2),
            "cross_attention_dim": 48,
            "use_linear_projection": True,
            "norm_num_groups": 16,
            **settings,
        }
    ).eval()


@torch.no_grad()
def test_widening_keeps_the_function_on_the_colour_half() -> None:
    spec = UNetSpec(
        latent_px=8, latent_channels=4, channels=(32, 64), attention_levels=(1,), layers_per_block=1,
        head_dim=32, token_dim=48, norm_groups=16, transformer_layers=(1, 2),
    )  # fmt: skip
    old, t, tokens = pretrained_unet(), torch.tensor([3.0, 700.0]), torch.randn(B, 5, 48)
    # Every view shows what the picture does: its tokens then say nothing that the view's own do not.
    z = torch.randn(B, 8, 8, 8).repeat_interleave(V, dim=0)
    truth = old(z[:, :4], t.repeat_interleave(V), tokens.repeat_interleave(V, dim=0)).sample
    bias = old.conv_out.bias.clone()
    wide = MultiviewUNet(spec, widen_unet(old, 4, 48)).eval()
    assert not wide.unet.conv_in.weight[:, 4:].any()
    assert not wide.unet.conv_out.weight[4:].any() and not wide.unet.conv_out.bias[4:].any()
    assert torch.equal(wide.unet.conv_out.bias[:4], bias)
    # Row-wise attention starts silent and the focal embedding as zero; the view embedding is new.
    wide.view_embedding.weight.zero_()
    found = wide(z, t, tokens, z[::V, :4], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(found[:, :4], truth, atol=1e-5, rtol=1e-4)
    assert not found[:, 4:].any()


def test_widening_refuses_tokens_of_another_width() -> None:
    with pytest.raises(ValueError, match="48 entries.*makes 64"):
        widen_unet(pretrained_unet(), 4, 64)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        torch.manual_seed(0)
        unet = MultiviewUNet(TOY.unet)
        if checkpointing:
            unet.unet.enable_gradient_checkpointing()
        out = unet(**inputs())
        (out.square().mean() + unet.mid_features.square().mean()).backward()  # type: ignore[union-attr]
        return [p.grad for p in unet.parameters() if p.grad is not None]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_guidance_is_between_the_picture_and_no_picture() -> None:
    """CFG's second half sees zero tokens and a zero E(y), and keeps view and focal conditions."""
    torch.manual_seed(0)
    model, vae = awake(MultiviewModel(TOY)), Vae(TOY.vae).eval().requires_grad_(False)
    seen: list[tuple[Tensor, ...]] = []
    outs: list[Tensor] = []

    def spy(_module: torch.nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        seen.append(given)
        outs.append(out)

    hook = model.unet.register_forward_hook(spy)
    image, focal = torch.rand(2, 3, 32, 32), torch.tensor([-1.0, 1.5])
    sample_views(model, vae, image, focal, SamplingDefaults(1, 3.0))
    hook.remove()
    z, t, tokens, image_latent, told = seen[0]
    assert len(seen) == 1 and len(t) == 4 and bool((t == 999).all())
    assert not tokens[2:].any() and not image_latent[2:].any()
    torch.testing.assert_close(tokens[:2], model.encoder(image))
    torch.testing.assert_close(image_latent[:2], vae.encode(image))
    assert torch.equal(told, focal.repeat(2)) and torch.equal(z[:12], z[12:])
    assert torch.equal(z[:6], z[6:12])  # every object starts from the same noise
    with torch.no_grad():  # the halves of the batch did not leak into each other
        alone = model.unet(z[:12], t[:2], tokens[:2], image_latent[:2], told[:2])
    torch.testing.assert_close(alone, outs[0][:12], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_pictures_sampled_together_are_those_sampled_alone() -> None:
    torch.manual_seed(0)
    model, vae = awake(MultiviewModel(TOY)), Vae(TOY.vae).eval().requires_grad_(False)
    image, focal = torch.rand(2, 3, 32, 32), torch.tensor([0.0, 1.5])
    together = sample_views(model, vae, image, focal, SamplingDefaults(3, 3.0, guidance_rescale=0.5))
    for b in range(2):
        part = slice(b, b + 1)
        alone = sample_views(
            model, vae, image[part], focal[part], SamplingDefaults(3, 3.0, guidance_rescale=0.5)
        )
        assert abs(alone[0][0] - together[0][b]).max() < 1e-3 or (alone[2][0] != together[2][b]).any()
        assert (alone[2][0] != together[2][b]).mean() < 1e-3


def test_specs_refuse_sizes_that_cannot_work() -> None:
    with pytest.raises(ValueError, match="transformer_layers"):
        replace(TOY.unet, transformer_layers=(1, 2, 3))
    with pytest.raises(ValueError, match="halved"):
        replace(TOY.unet, latent_px=7)
