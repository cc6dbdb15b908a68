"""The multiview UNet: a diffusers UNet whose transformer blocks also talk across views by rows.

Six views of a sample are six entries of the batch, views varying fastest: `(b v) c h w`.  The
input of a view is `[z_t (8); E(y) (4)]`, the output 8 channels, colour then normal (Sec. 3.2).
The input picture goes through the network as a seventh view; self-attention of the six sees its
tokens beside their own (reference attention, as in Zero123++).  What it becomes is dropped.
The same code builds the small `edge` network and widens a pretrained SDXL UNet.
"""

from __future__ import annotations

import math

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional

from train.presets import UNetSpec

PLACE_FREQUENCIES = 4


def place_features(side: int, views: int, like: Tensor) -> Tensor:
    """Where a token stands: (views + 1, side * side, 4 * PLACE_FREQUENCIES + views).

    Sines and cosines of its column and row, and which view it is of: attention is blind to both.
    The last view is the input picture, none of the others.
    """
    at = (torch.arange(side, device=like.device, dtype=torch.float32) + 0.5) * (2.0 / side) - 1.0
    octaves = torch.exp2(torch.arange(PLACE_FREQUENCIES, device=like.device, dtype=torch.float32) - 1.0)
    angles = at[:, None] * (octaves * math.pi)
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (side, 2 F)
    column, row = waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)
    view = torch.eye(views + 1, views, device=like.device).repeat_interleave(side * side, dim=0)
    place = torch.cat([torch.cat([column, row], dim=-1).repeat(views + 1, 1), view], dim=-1)
    return place.reshape(views + 1, side * side, -1).to(like.dtype)


class MultiviewBlock(nn.Module):
    """A transformer block with self-, row-wise and cross-attention, and its feed-forward.

    Self-attention of a view has the tokens of the input picture among its keys (reference
    attention).  Row-wise attention lets each image row see the same row of every view: in
    orthographic views of elevation 0 the rows are epipolar lines, so corresponding points share a row.
    """

    def __init__(self, block: BasicTransformerBlock, views: int) -> None:
        super().__init__()
        dim, attention = block.norm1.normalized_shape[0], block.attn1
        self.views = views
        self.norm1, self.attn1 = block.norm1, block.attn1
        self.norm_row = nn.LayerNorm(dim)
        self.attn_row = Attention(
            query_dim=dim, heads=attention.heads, dim_head=attention.inner_dim // attention.heads
        )
        self.norm2, self.attn2 = block.norm2, block.attn2
        self.norm3, self.ff = block.norm3, block.ff
        self.place = nn.Linear(4 * PLACE_FREQUENCIES + views, dim, bias=False)
        # New layers add nothing to a pretrained block until they have learned.
        nn.init.zeros_(self.place.weight)
        nn.init.zeros_(self.attn_row.to_out[0].weight)
        nn.init.zeros_(self.attn_row.to_out[0].bias)

    def forward(
        self,
        hidden_states: Tensor,  # ((b (v + 1)), (h w), c), the input picture last
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,  # (b, tokens, token_dim), shared by the views
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, object] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        x, v = hidden_states, self.views
        n, c = x.shape[1], x.shape[2]
        side = math.isqrt(n)
        x = (x.reshape(-1, v + 1, n, c) + self.place(place_features(side, v, x))).reshape(-1, n, c)
        x = (x + self._look(self.norm1(x))).reshape(-1, v + 1, n, c)
        targets, picture = x[:, :v], x[:, v:]

        rows = targets.reshape(-1, v, side, side, c).transpose(1, 2).reshape(-1, v * side, c)  # (b h) (v w) c
        rows = rows + self.attn_row(self.norm_row(rows))
        targets = rows.reshape(-1, side, v, side, c).transpose(1, 2).reshape(-1, v, n, c)

        x = torch.cat([targets, picture], dim=1).reshape(-1, (v + 1) * n, c)  # b (v h w) c
        x = x + self.attn2(self.norm2(x), encoder_hidden_states=encoder_hidden_states)
        x = x + self.ff(self.norm3(x))
        return x.reshape(-1, n, c)

    def _look(self, normed: Tensor) -> Tensor:
        """Self-attention whose keys are a view's own tokens and the picture's: ((b (v + 1)), n, c).

        The picture meets its own tokens twice, which a softmax cannot tell from once.
        """
        attention, n, v = self.attn1, normed.shape[1], self.views
        inner, width = attention.inner_dim, attention.inner_dim // attention.heads

        def with_picture(x: Tensor) -> Tensor:
            views = x.reshape(-1, v + 1, n, inner)
            picture = views[:, v:].expand(-1, v + 1, -1, -1)
            return torch.cat([views, picture], dim=2).reshape(-1, 2 * n, inner)

        def heads(x: Tensor, tokens: int) -> Tensor:
            return x.reshape(-1, tokens, attention.heads, width).transpose(1, 2)

        q, k, value = attention.to_q(normed), attention.to_k(normed), attention.to_v(normed)
        looked = functional.scaled_dot_product_attention(
            heads(q, n), heads(with_picture(k), 2 * n), heads(with_picture(value), 2 * n)
        )
        out: Tensor = attention.to_out[0](looked.transpose(1, 2).reshape(-1, n, inner))
        return out


class MultiviewUNet(nn.Module):
    """`(z_t, t, image tokens, E(y), f~) -> eps or v` for all views of a sample at once."""

    def __init__(self, spec: UNetSpec, unet: UNet2DConditionModel | None = None) -> None:
        """Build from a spec, or around a given UNet (already widened by `widen_unet`)."""
        super().__init__()
        self.spec = spec
        self.unet = unet if unet is not None else build_unet(spec)
        insert_row_attention(self.unet, spec.views)
        width = self.unet.time_embedding.linear_2.out_features
        self.view_embedding = nn.Embedding(spec.views, width)
        self.focal_embedding = nn.Sequential(
            nn.Linear(2 * spec.focal_frequencies, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.focal_unknown = nn.Parameter(torch.zeros(width))
        self.picture_embedding = nn.Parameter(torch.zeros(width))  # in the place of a view's embedding
        nn.init.normal_(self.view_embedding.weight, std=0.02)
        nn.init.zeros_(self.focal_embedding[2].weight)
        nn.init.zeros_(self.focal_embedding[2].bias)
        self.mid_features: Tensor | None = None  # ((b v), c, h, w) of the last pass, for L_var (Eq. 11)
        self.unet.mid_block.register_forward_hook(self._keep_mid_features)

    def _keep_mid_features(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.mid_features = self._targets(output)

    def _targets(self, x: Tensor) -> Tensor:
        """((b (v + 1)), ...) to ((b v), ...): without the input picture."""
        return x.unflatten(0, (-1, self.spec.views + 1))[:, :-1].flatten(0, 1)

    def embed_focal(self, focal: Tensor) -> Tensor:
        """`f~` (b,) to (b, width); a negative value selects the learned "unknown" vector."""
        count = self.spec.focal_frequencies
        frequencies = torch.exp2(torch.arange(count, device=focal.device, dtype=torch.float32) - 1)
        angles = focal.float()[:, None] * frequencies
        known = self.focal_embedding(
            torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.focal_unknown.dtype)
        )
        return torch.where((focal < 0)[:, None], self.focal_unknown, known)

    def forward(
        self,
        sample: Tensor,  # ((b v), 8, h, w)
        timestep: Tensor,  # (b,)
        tokens: Tensor,  # (b, tokens, token_dim)
        image_latent: Tensor,  # (b, 4, h, w)
        focal: Tensor,  # (b,)
    ) -> Tensor:
        v = self.spec.views
        embeddings = torch.cat([self.view_embedding.weight, self.picture_embedding[None]])
        condition = (embeddings + self.embed_focal(focal)[:, None]).flatten(0, 1)
        # The picture as a view: E(y) in the place of its noisy colour, nothing in that of its normals.
        picture = torch.cat([image_latent, torch.zeros_like(image_latent)], dim=1)
        views = torch.cat([sample.unflatten(0, (-1, v)), picture[:, None]], dim=1)
        beside = image_latent.repeat_interleave(v + 1, dim=0)
        out = self.unet(
            torch.cat([views.flatten(0, 1), beside], dim=1),
            timestep.repeat_interleave(v + 1, dim=0),
            encoder_hidden_states=tokens,
            class_labels=condition,
            return_dict=False,
        )[0]
        return self._targets(out)


def build_unet(spec: UNetSpec) -> UNet2DConditionModel:
    """A diffusers UNet from scratch, sizes from the spec."""
    levels = len(spec.channels)
    attention = [level in spec.attention_levels for level in range(levels)]
    down = tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention)
    up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention))
    return UNet2DConditionModel(
        sample_size=spec.latent_px,
        in_channels=3 * spec.latent_channels,
        out_channels=2 * spec.latent_channels,
        block_out_channels=spec.channels,
        down_block_types=down,
        up_block_types=up,
        layers_per_block=spec.layers_per_block,
        transformer_layers_per_block=spec.transformer_layers or 1,
        # diffusers' `attention_head_dim` counts heads, not their width (huggingface/diffusers#2011).
        attention_head_dim=tuple(max(1, c // spec.head_dim) for c in spec.channels),
        cross_attention_dim=spec.token_dim,
        use_linear_projection=True,
        class_embed_type="identity",
        norm_num_groups=spec.norm_groups,
    )


def insert_row_attention(module: nn.Module, views: int) -> int:
    """Replace every `BasicTransformerBlock` below `module`; returns how many there were."""
    count = 0
    for name, child in module.named_children():
        if isinstance(child, BasicTransformerBlock):
            setattr(module, name, MultiviewBlock(child, views))
            count += 1
        else:
            count += insert_row_attention(child, views)
    return count


def widen_unet(unet: UNet2DConditionModel, latent_channels: int, token_dim: int) -> UNet2DConditionModel:
    """Turn a text-to-image UNet (SDXL) into `[z_t; E(y)] -> 2 x latent_channels`, in place.

    The old weights are kept; new input channels start at zero, so that the widened network first
    computes what the pretrained one did on the colour half, but that views also see the picture's
    tokens.  New output channels start as zero.
    SDXL's embedding of picture size and pooled text goes: there is no text.

    Raises:
        ValueError: the UNet attends to tokens of another width than `token_dim`.
    """
    if unet.config.cross_attention_dim != token_dim:
        raise ValueError(
            f"the UNet attends to tokens of {unet.config.cross_attention_dim} entries, the preset's image "
            f"encoder makes {token_dim}; set EncoderSpec.token_dim"
        )
    old_in, old_out = unet.conv_in, unet.conv_out
    conv_in = nn.Conv2d(3 * latent_channels, old_in.out_channels, 3, padding=1)
    conv_out = nn.Conv2d(old_out.in_channels, 2 * latent_channels, 3, padding=1)
    with torch.no_grad():
        for new in (conv_in, conv_out):
            new.weight.zero_()
            new.bias.zero_()
        conv_in.weight[:, : old_in.in_channels] = old_in.weight
        conv_in.bias.copy_(old_in.bias)
        conv_out.weight[: old_out.out_channels] = old_out.weight
        conv_out.bias[: old_out.out_channels] = old_out.bias
    unet.conv_in, unet.conv_out = conv_in, conv_out
    unet.class_embedding = nn.Identity()
    unet.add_embedding = None
    unet.register_to_config(
        in_channels=3 * latent_channels,
        out_channels=2 * latent_channels,
        class_embed_type="identity",
        addition_embed_type=None,
    )
    return unet
