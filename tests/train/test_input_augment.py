"""Changes of input pictures: as small as promised, each one reached, the same from the same numbers."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from train import input_augment
from train.input_augment import GAMMA, SCALE, SHIFT, TURN_DEG, augmented_pictures
from train.model import Batch, MultiviewModel
from train.presets import TOY

SIDE = 128


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bars(count: int) -> Tensor:
    """Grey bars 80 x 16 px on white, with their middle in the picture's."""
    image = torch.ones(count, 3, SIDE, SIDE)
    image[:, :, 56:72, 24:104] = 0.5
    return image


def moments(image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of what is not white: mass, centre x and y in shares of the side, angle of its long axis."""
    weight = (1.0 - image.mean(dim=1)).double()
    at = (torch.arange(SIDE, dtype=torch.float64) + 0.5) / SIDE - 0.5
    mass = weight.sum(dim=(1, 2))
    x = (weight * at).sum(dim=(1, 2)) / mass
    y = (weight * at[:, None]).sum(dim=(1, 2)) / mass
    dx, dy = at - x[:, None, None], at[:, None] - y[:, None, None]
    xx, yy, xy = ((weight * p).sum(dim=(1, 2)) for p in (dx * dx, dy * dy, dx * dy))
    return mass, x, y, 0.5 * torch.atan2(2.0 * xy, xx - yy)


def test_no_share_leaves_the_pictures_alone() -> None:
    image = torch.rand((3, 3, 32, 32), generator=generator(1))
    assert torch.allclose(augmented_pictures(image, generator(), 0.0), image, atol=1e-6)


def test_white_stays_white() -> None:
    image = torch.ones(16, 3, 32, 32)
    assert torch.equal(augmented_pictures(image, generator(), 1.0), image)


def test_turn_and_shift_reach_their_bounds_and_go_no_further() -> None:
    _, x, y, angle = moments(augmented_pictures(bars(400), generator(), 1.0))
    pixel, limit = 1.0 / SIDE, math.radians(TURN_DEG)
    for moved in (x, y):  # of the turned and scaled picture, hence a little more
        assert 0.8 * SHIFT < moved.abs().max() < SHIFT * math.exp(SCALE) + 0.1 * pixel
        assert abs(moved.mean()) < 0.15 * SHIFT
    assert 0.9 * limit < angle.abs().max() < limit + 1e-3
    assert abs(angle.mean()) < 0.15 * limit


def test_scale_and_brightness_reach_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    image = bars(400)
    with monkeypatch.context() as only_scale:
        only_scale.setattr(input_augment, "GAMMA", 0.0)
        mass = moments(augmented_pictures(image, generator(), 1.0))[0] / moments(image)[0]
    side = mass.sqrt().log()  # blurring and moving keep the mass, scaling squares
    assert 0.9 * SCALE < side.max() < SCALE + 2e-3
    assert 0.9 * SCALE < -side.min() < SCALE + 2e-3
    inner = augmented_pictures(image, generator(), 1.0)[:, 0, SIDE // 2, SIDE // 2]
    power = (inner.double().log() / math.log(0.5)).log()
    assert 0.9 * GAMMA < power.max() < GAMMA + 1e-3
    assert 0.9 * GAMMA < -power.min() < GAMMA + 1e-3


def test_share_of_the_pictures_changed() -> None:
    image = bars(600)
    changed = (augmented_pictures(image, generator(), 0.3) - image).abs().amax(dim=(1, 2, 3)) > 1e-3
    assert 0.24 < changed.float().mean() < 0.36


def test_the_same_numbers_give_the_same_pictures() -> None:
    image = torch.rand((4, 3, 32, 32), generator=generator(1))
    first, again, other = (augmented_pictures(image, generator(seed), 0.8) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with torch.autocast("cpu", torch.bfloat16):  # as in training on a GPU
        assert torch.equal(augmented_pictures(image, generator(5), 0.8), first)


class Autoencoder(torch.nn.Module):
    """Stands for one, and keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def encode(self, image: Tensor) -> Tensor:
        self.seen.append(image)
        return torch.full((len(image), 4, 8, 8), 7.0)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_tokens_and_latent_are_of_the_same_changed_picture(share: float) -> None:
    losses = replace(TOY.train.losses, lambda_var=0.0, lambda_mi=0.0)
    preset = replace(TOY, train=replace(TOY.train, input_augment=share, drop_image=0.0, losses=losses))
    torch.manual_seed(0)
    model, vae = MultiviewModel(preset), Autoencoder()
    batch = Batch(
        torch.randn(2, 6, 8, 8, 8), torch.rand(2, 3, 32, 32), torch.zeros(2, 4, 8, 8), torch.zeros(2)
    )
    encoded: list[Tensor] = []
    latents: list[Tensor] = []
    model.encoder.register_forward_pre_hook(lambda _, args: encoded.append(args[0]))
    model.unet.register_forward_pre_hook(lambda _, args: latents.append(args[3]))
    model(batch, vae, generator())
    if share == 0.0:
        assert vae.seen == []
        assert torch.equal(encoded[0], batch.image)
        assert not latents[0].any()
    else:
        assert torch.equal(encoded[0], vae.seen[0])
        assert not torch.equal(encoded[0], batch.image)
        assert (latents[0] == 7.0).all()
