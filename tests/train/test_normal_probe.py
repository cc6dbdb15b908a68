"""The probe that tells silhouettes and normals from latents."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.cache import LatentCache
from train.checkpoint import CheckpointError, load_state
from train.normal_probe import FILE, decoded_cells, fit_probe, probe_of_run
from train.presets import TOY, with_train
from train.trainer import RunOptions, train_model
from train.vae import Vae


class Enlarged(nn.Module):
    """A decoder whose pixels are the latents' first channels, four times as large."""

    def decode(self, latent: Tensor) -> Tensor:
        """(n, 4, h, w) to (n, 3, 4h, 4w)."""
        return F.interpolate((latent[:, :3] + 1.0) * 0.5, scale_factor=4)


def blobs(count: int, seed: int) -> Tensor:
    """(count, 6, 8, 8, 8) latents: a normal to the left or right within a random ellipse, none outside."""
    generator = torch.Generator().manual_seed(seed)
    radius = 0.3 + 0.7 * torch.rand((count, 6, 2, 1, 1), generator=generator)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 8)] * 2, indexing="ij")
    inside = (x / radius[:, :, 0]).square() + (y / radius[:, :, 1]).square() < 1
    side = torch.randint(0, 2, (count, 6, 1, 1), generator=generator) * 2.0 - 1.0
    z = torch.zeros(count, 6, 8, 8, 8)
    z[:, :, 4] = inside * side
    z[:, :, 7] = torch.randn((count, 6, 8, 8), generator=generator)  # tells nothing
    return z


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> LatentCache:
    torch.set_num_threads(1)
    monkeypatch.setattr("train.normal_probe.BATCH", 32)
    generator = torch.Generator().manual_seed(1)
    return LatentCache(
        z_0=blobs(40, 0).half(),
        image=torch.randint(0, 256, (40, 1, 32, 32, 3), dtype=torch.uint8, generator=generator),
        image_latent=torch.randn((40, 1, 4, 8, 8), generator=generator).half(),
        focal=torch.zeros(40, 1),
        objects=40,
    )


def test_coverage_is_where_decoded_normals_are_long_and_normals_are_means_there() -> None:
    latent = torch.zeros(1, 4, 8, 8)
    latent[0, 0, 2:4, 3] = 0.6
    latent[0, 3] = 5.0  # no part of a normal
    latent[0, 1, 7, 7] = -0.4
    latent[0, 2, 2, 3] = -0.8
    coverage, normal = decoded_cells(latent, Enlarged())
    expected = torch.zeros(1, 1, 16, 16)
    expected[0, 0, 4:8, 6:8] = 1.0
    assert torch.equal(coverage, expected)
    vectors = torch.zeros(1, 3, 16, 16)
    vectors[0, 0, 6:8, 6:8] = 1.0
    vectors[0, [0, 2], 4:6, 6:8] = torch.tensor([0.6, -0.8])[:, None, None]
    torch.testing.assert_close(normal, vectors)


def test_a_probe_learns_silhouettes_and_normals_of_latents_it_has_not_seen(cache: LatentCache) -> None:
    probe = fit_probe(TOY, cache, Enlarged(), seed=0, steps=150)
    assert not any(p.requires_grad for p in probe.parameters())
    latent = blobs(20, 1)[:, :, 4:].flatten(0, 1)
    cells, (coverage, normal) = probe(latent), decoded_cells(latent, Enlarged())
    found, truth = cells[:, :1] > 0, coverage > 0.5
    assert (found & truth).sum() / (found | truth).sum() > 0.95
    cosine = F.cosine_similarity(cells[:, 1:], normal, dim=1)[truth[:, 0]]
    assert cosine.mean() > 0.95
    # Halfway between a normal and its opposite, where a network cannot decide, there is none.
    assert (probe(torch.zeros_like(latent))[:, 0] < 0).float().mean() > 0.95
    again = fit_probe(TOY, cache, Enlarged(), seed=0, steps=150)
    assert all(torch.equal(a, b) for a, b in zip(probe.parameters(), again.parameters(), strict=True))


def test_a_run_keeps_its_probe(tmp_path: Path, cache: LatentCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.normal_probe.STEPS", 3)
    made = probe_of_run(tmp_path, TOY, cache, Enlarged(), seed=0, keep=True)
    anew = probe_of_run(tmp_path, TOY, cache, Enlarged(), seed=1, keep=False)
    assert not torch.equal(next(made.parameters()), next(anew.parameters()))
    made = probe_of_run(tmp_path, TOY, cache, Enlarged(), seed=0, keep=False)
    monkeypatch.setattr("train.normal_probe.fit_probe", lambda *_: pytest.fail("it is there already"))
    found = probe_of_run(tmp_path, TOY, cache, Enlarged(), seed=1, keep=True)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), found.parameters(), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    (tmp_path / FILE).write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="remove it"):
        probe_of_run(tmp_path, TOY, cache, Enlarged(), seed=0, keep=True)


@pytest.mark.parametrize("name", ["outline", "normal"])
def test_training_lowers_the_loss_on_what_is_decoded(
    name: str, tmp_path: Path, cache: LatentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of latents that are all alike, so that a few steps suffice."""
    fitted = fit_probe(TOY, cache, Enlarged(), seed=0, steps=150)
    monkeypatch.setattr("train.normal_probe.fit_probe", lambda *_: fitted)
    cache.z_0[:] = cache.z_0[:1]
    losses = replace(TOY.train.losses, lambda_var=0.0, lambda_mi=0.0, **{f"lambda_{name}": 1.0})
    preset = with_train(
        TOY, batch=4, steps=30, warmup=2, lr=4e-3, drop_image=0.0, last_share=1.0, losses=losses
    )
    vae = Vae(TOY.vae).eval().requires_grad_(False)
    options = RunOptions(out=tmp_path, save_every=30, sheet_every=99, log_every=4)
    history = load_state(train_model(preset, cache, vae, None, options))["history"]
    assert history[-1][name] < 0.8 * history[0][name]
