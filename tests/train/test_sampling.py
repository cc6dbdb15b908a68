"""The sampler around the torch networks, driven by a UNet that knows the answer."""

import numpy as np
import pytest
import torch
from torch import Tensor

from train.model import MultiviewModel
from train.presets import TOY
from train.sampling import decode_pairs, sample_views
from train.vae import Vae
from uc3d_rt.contract import SamplingDefaults
from uc3d_rt.views import decode_views


class Oracle(torch.nn.Module):
    """Predicts the v that leads to the latents it was given; wrong ones where it sees no picture."""

    def __init__(self, model: MultiviewModel, z_0: Tensor) -> None:
        super().__init__()
        self.alpha_bar, self.z_0 = model.alpha_bar.double(), z_0
        self.calls = 0

    def forward(self, z_t: Tensor, t: Tensor, tokens: Tensor, image_latent: Tensor, focal: Tensor) -> Tensor:
        self.calls += 1
        a = self.alpha_bar[t.long()].repeat_interleave(6).reshape(-1, 1, 1, 1)
        z_0 = self.z_0.repeat(len(t) * 6 // len(self.z_0), 1, 1, 1)
        z_0 = torch.where(tokens.any().expand(1), z_0, z_0 + 1.0)
        return ((a.sqrt() * z_t - z_0) / (1 - a).sqrt()).float()


@pytest.fixture
def parts() -> tuple[MultiviewModel, Vae, Tensor]:
    torch.manual_seed(0)
    model, vae = MultiviewModel(TOY).eval(), Vae(TOY.vae).eval().requires_grad_(False)
    with torch.no_grad():
        vae.decoder[-2].weight.mul_(6.0)  # fills [0, 1]
    return model, vae, torch.randn(12, 8, 8, 8)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 7])
def test_sampling_finds_the_latents(
    parts: tuple[MultiviewModel, Vae, Tensor], guidance: float, steps: int
) -> None:
    model, vae, z_0 = parts
    model.unet = Oracle(model, z_0)  # type: ignore[assignment]
    color, normal, mask = sample_views(
        model, vae, torch.rand(2, 3, 32, 32), torch.zeros(2), SamplingDefaults(steps, guidance)
    )
    assert color.shape == normal.shape == (2, 6, 32, 32, 3) and mask.shape == (2, 6, 32, 32)
    truth = decode_pairs(vae, z_0).reshape(2, 2, 6, 32, 32, 3)  # colour then normal; objects; views
    shown, unit, silhouette = decode_views(truth[0], truth[1])
    assert (mask != silhouette).mean() < 1e-3 and 0.1 < mask.mean() < 1.0
    both = mask & silhouette
    np.testing.assert_allclose(color[both], shown[both], atol=5e-3)
    np.testing.assert_allclose(normal[both], unit[both], atol=2e-2)
    assert (color[~mask] == 1.0).all() and (normal[~mask] == 0.0).all()
    assert model.unet.calls == steps


def test_guidance_interval_saves_the_unconditional_half(parts: tuple[MultiviewModel, Vae, Tensor]) -> None:
    model, vae, z_0 = parts
    seen = []
    model.unet = Oracle(model, z_0)  # type: ignore[assignment]
    model.unet.register_forward_hook(lambda _m, given, _o: seen.append(len(given[1])))
    image, focal = torch.rand(2, 3, 32, 32), torch.zeros(2)
    sample_views(model, vae, image, focal, SamplingDefaults(10, 3.0, guidance_interval=(0.0, 0.5)))
    assert seen == [2] * 5 + [4] * 5


def test_decode_pairs_gives_all_colours_then_all_normals(parts: tuple[MultiviewModel, Vae, Tensor]) -> None:
    _, vae, z_0 = parts
    pictures = decode_pairs(vae, z_0)
    assert pictures.shape == (24, 32, 32, 3) and pictures.min() >= 0.0 and pictures.max() <= 1.0
    alone = vae.decode(z_0[3:4, 4:]).clamp(0, 1)[0].permute(1, 2, 0)
    np.testing.assert_allclose(pictures[12 + 3], alone, atol=1e-5)
