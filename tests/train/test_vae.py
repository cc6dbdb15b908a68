"""The autoencoder: shapes, latent normalisation, and that its loss pulls where it should."""

import numpy as np
import pytest
import torch

from train.checkpoint import build_vae, load_vae
from train.presets import EDGE, TOY
from train.vae import Vae, vae_loss
from train.vae_trainer import train_vae


@pytest.fixture
def vae() -> Vae:
    torch.manual_seed(0)
    return Vae(TOY.vae)


def test_edge_halves_three_times() -> None:
    with torch.device("meta"):
        vae = build_vae(EDGE)
        latent = vae.encode(torch.zeros(1, 3, 256, 256))
        assert latent.shape == (1, 4, 32, 32) and vae.decode(latent).shape == (1, 3, 256, 256)


@torch.no_grad()
def test_normalized_latents_have_mean_zero_and_variance_one(vae: Vae) -> None:
    images = torch.rand(70, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    before = vae.decode(vae.encode(images))
    vae.normalize_latents(images)
    latents = vae.encode(images)
    np.testing.assert_allclose(latents.mean(dim=(0, 2, 3)), 0.0, atol=1e-4)
    np.testing.assert_allclose(latents.std(dim=(0, 2, 3)), 1.0, atol=1e-4)
    # The scale is undone by the decoder: pictures stay what they were.
    torch.testing.assert_close(vae.decode(latents), before, atol=1e-4, rtol=1e-3)
    vae.normalize_latents(images)  # measured from the bare weights, so twice is once
    torch.testing.assert_close(vae.encode(images), latents)


def test_loss_is_l1_and_gradient_l1(vae: Vae) -> None:
    class Identity(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    vae.encoder = vae.decoder = Identity()  # type: ignore[assignment]
    image = torch.rand(2, 3, 8, 8)
    # With no noise the picture comes back; only the pull on the "latent" remains.
    pull = 1e-4 * float((image * 2 - 1).square().mean())
    assert float(vae_loss(vae, image, noise=0.0)) == pytest.approx(pull, rel=1e-4, abs=1e-7)
    assert float(vae_loss(vae, image, noise=0.5)) > 0.1


def test_training_lowers_the_error_and_leaves_a_loadable_frozen_net(tmp_path, capsys) -> None:
    torch.set_num_threads(1)
    ramp = np.linspace(0, 255, 32, dtype=np.uint8)
    images = np.stack([np.stack([np.roll(ramp, k)[:, None] + 0 * ramp] * 3, -1) for k in range(8)])
    out = tmp_path / "vae"
    train_vae(TOY, torch.from_numpy(images), out, steps=60, minutes=None, batch=4, lr=2e-3, seed=0)
    loaded = load_vae(out, TOY)
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    picture = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    assert (loaded.decode(loaded.encode(picture)) - picture).abs().mean() < 0.12
    assert loaded.encode(picture).std() == pytest.approx(1.0, abs=0.2)
    assert [path.name for path in out.iterdir()] == ["vae.safetensors"]
    assert "mean PSNR" in capsys.readouterr().out


def test_a_collapsed_net_is_refused(tmp_path) -> None:
    noise = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    with pytest.raises(FloatingPointError, match="collapsed"):
        train_vae(TOY, noise, tmp_path / "vae", steps=1, minutes=None, batch=2, lr=1e-4, seed=0)
    assert not (tmp_path / "vae").exists()
