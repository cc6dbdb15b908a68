"""The lift: cells of the picture in the views, against the runtime's cameras and rendered views."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from tests.train.shapes import LIFTED, thing
from train.checkpoint import CheckpointError, begin_with
from train.dataset import render_variant
from train.lift import SPLAT_CELLS, Lift, lift_channels, pooled_surface
from train.model import MultiviewModel
from train.presets import TOY, with_lift
from train.render import Scene
from uc3d_rt.views import HALF_WINDOW, TARGET_CAMERAS, decode_normals, project

GRID = 32
SURE = 12.0  # a logit


def lift(channels: int = 2) -> Lift:
    torch.manual_seed(0)
    return Lift(token_dim=16, channels=channels)


def nothing() -> Tensor:
    surface = torch.zeros(1, 7, GRID, GRID)
    surface[:, 0], surface[:, 6] = -SURE, 1.0
    return surface


def put(surface: Tensor, cell: tuple[int, int], position: list[float], normal: list[float]) -> None:
    surface[0, :, cell[0], cell[1]] = torch.tensor([SURE, *position, *normal])


def of_scale(lifted: Tensor, scale: int, channels: int) -> Tensor:
    """(views, channels, grid, grid) of the views of one sample."""
    return lifted[0, :-1, scale * channels : (scale + 1) * channels]


def test_a_cell_lands_where_the_cameras_see_it() -> None:
    surface, values = nothing(), torch.zeros(1, 3, GRID, GRID)
    position, normal = [0.31, -0.44, 0.27], [0.0, 1.0, 0.0]
    put(surface, (5, 20), position, normal)
    values[0, :, 5, 20] = torch.tensor([2.0, -1.0, 0.5])
    lifted = lift().lay(surface, values)
    assert lifted.shape == (1, 7, len(SPLAT_CELLS) * 8, GRID, GRID)
    at = ((torch.arange(GRID) + 0.5) * 2.0 / GRID - 1.0) * HALF_WINDOW
    for scale in range(len(SPLAT_CELLS)):
        views = of_scale(lifted, scale, 8)
        for view, camera in zip(views, TARGET_CAMERAS, strict=True):
            u, v = project(np.array([position]), camera)[0, :2]
            weight = view[7]
            middle = (weight * at).sum() / weight.sum(), (weight * -at[:, None]).sum() / weight.sum()
            assert abs(middle[0] - u) < 0.01 and abs(middle[1] - v) < 0.01
            row, column = np.unravel_index(int(weight.argmax()), weight.shape)
            peak = view[:, row, column] / view[7, row, column]
            depth = 2.0 - project(np.array([position]), camera)[0, 2]
            expected = torch.tensor([2.0, -1.0, 0.5, *normal, depth, 1.0], dtype=torch.float32)
            torch.testing.assert_close(peak, expected, atol=0.02, rtol=0)


def test_the_nearer_cell_hides_the_farther_and_one_that_faces_away_is_not_seen() -> None:
    back = lift().back
    for view in range(6):
        towards, surface, values = back[view], nothing(), torch.zeros(1, 1, GRID, GRID)
        put(surface, (3, 3), (0.8 * towards).tolist(), towards.tolist())
        put(surface, (9, 9), (-0.8 * towards).tolist(), towards.tolist())
        values[0, 0, 3, 3], values[0, 0, 9, 9] = 1.0, -1.0
        middle = of_scale(lift().lay(surface, values), 0, 6)[view, :, GRID // 2, GRID // 2]
        assert middle[0] / middle[5] > 0.98
        put(surface, (3, 3), (0.8 * towards).tolist(), (-towards).tolist())  # now its back is seen
        middle = of_scale(lift().lay(surface, values), 0, 6)[view, :, GRID // 2, GRID // 2]
        facing = middle[0] / middle[5]
        put(surface, (9, 9), (0.8 * towards).tolist(), towards.tolist())
        middle = of_scale(lift().lay(surface, values), 0, 6)[view, :, GRID // 2, GRID // 2]
        assert middle[0] / middle[5] < -0.98 < facing


def test_the_true_surface_gives_the_normals_of_the_views_beside_the_picture() -> None:
    mesh = trimesh.util.concatenate(
        [
            trimesh.creation.icosphere(subdivisions=4),
            trimesh.creation.box(
                [0.5, 0.5, 3.0], transform=trimesh.transformations.translation_matrix([0.6, 0.2, 0])
            ),
        ]
    )
    with Scene(thing(mesh)) as scene:
        variant = render_variant(scene, np.random.default_rng(5), 2, augment=False, cells=GRID)
    assert variant.surface.shape == (2, 7, GRID, GRID)
    surface = variant.surface.float()
    surface[:, 0] = torch.logit(surface[:, 0].clamp(1e-4, 1.0 - 1e-4))
    lifted = lift().lay(surface, torch.zeros(2, 1, GRID, GRID))
    normal, mask = decode_normals(variant.normal.numpy() / 255.0)
    truth = F.avg_pool2d(torch.from_numpy(normal).permute(0, 3, 1, 2), 256 // GRID)
    cover = F.avg_pool2d(torch.from_numpy(mask)[:, None].float(), 256 // GRID)[:, 0]
    around = F.max_pool2d(cover[:, None], 3, stride=1, padding=1)[:, 0]
    for sample in lifted[:, :-1, :6]:
        # Little is laid outside of the object: cells at a step in depth lie in between.
        assert sample[:, 5][around == 0].sum() < 0.02 * sample[:, 5].sum()
        for view in (0, 5):  # 30 degrees to the right and left of the picture
            told, covered = sample[view, 1:4], sample[view, 5]
            sure = (covered > 0.6) & (cover[view] > 0.99)
            assert sure.sum() > 0.5 * (cover[view] > 0.99).sum()
            cosine = F.cosine_similarity(told[:, sure], truth[view][:, sure], dim=0).clamp(-1.0, 1.0)
            assert torch.rad2deg(cosine.acos()).median() < 5.0


def test_gradients_are_those_of_finite_differences() -> None:
    small = Lift(token_dim=4, channels=1).double()
    generator = torch.Generator().manual_seed(1)
    surface = torch.randn((1, 7, 4, 4), dtype=torch.float64, generator=generator) * 0.5
    values = torch.randn((1, 2, 4, 4), dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(small.lay, (surface.requires_grad_(), values.requires_grad_()))


def test_it_begins_with_a_flat_object_and_one_latent_of_another_size() -> None:
    flat = lift()
    lifted, surface = flat(torch.randn(2, 256, 16), torch.randn(2, 4, 64, 64))
    assert lifted.shape == (2, 7, lift_channels(4, 2), 64, 64)
    assert (surface[:, 0] == 0).all() and (surface[:, 3] == 0).all() and (surface[:, 6] == 1).all()
    assert surface[0, 1, 0, 0] < 0 < surface[0, 1, 0, -1] and surface[0, 2, -1, 0] < 0 < surface[0, 2, 0, 0]
    assert lift_channels(4, 0) == 0


def test_pooling_weighs_by_coverage() -> None:
    truth = torch.zeros(1, 7, 4, 4)
    truth[0, 0, 0, 0], truth[0, 1, 0, 0] = 1.0, 0.8
    truth[0, 0, 0, 1], truth[0, 1, 0, 1] = 0.5, 0.2
    pooled = pooled_surface(truth, 2)
    torch.testing.assert_close(pooled[0, :2, 0, 0], torch.tensor([0.375, 0.6]))
    assert not pooled[0, :, 1:].any() and torch.equal(pooled_surface(truth, 4), truth)


def test_autocast_does_not_round_places() -> None:
    one = lift()
    torch.nn.init.normal_(one.surface.weight, std=0.05)
    tokens, latent = torch.randn(1, 256, 16), torch.randn(1, 4, GRID, GRID)
    plain = one(tokens, latent)
    with torch.autocast("cpu", torch.bfloat16):
        cast = one(tokens, latent)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_a_model_that_has_grown_a_lift_and_layers_computes_what_it_did(tmp_path: Path) -> None:
    grown = replace(LIFTED, encoder=replace(TOY.encoder, layers=3))
    torch.manual_seed(3)
    old, new = MultiviewModel(TOY), MultiviewModel(grown)
    for parameter in old.parameters():  # nothing silent by chance
        torch.nn.init.normal_(parameter, std=0.05)
    save_file(old.state_dict(), tmp_path / "ema.safetensors")
    names = begin_with(new, tmp_path / "ema.safetensors", "")
    assert names == ["encoder.blocks.1", "encoder.blocks.2", "unet.lift.surface", "unet.lift.value"]
    image, latent, noisy = torch.rand(2, 3, 32, 32), torch.randn(2, 4, 8, 8), torch.randn(12, 8, 8, 8)
    t, focal = torch.tensor([999.0, 300.0]), torch.tensor([-1.0, 1.0])
    answers = [model.unet(noisy, t, model.encoder(image), latent, focal) for model in (old, new)]
    torch.testing.assert_close(*answers)
    # What is new learns from the first step on.
    answers[1].square().mean().backward()
    gradient = new.unet.unet.conv_in.weight.grad
    assert gradient is not None and gradient[:, 12:].abs().max() > 0
    assert new.encoder.blocks[2].out.weight.grad.abs().max() > 0
    # Other differences are none that training could begin with.
    wide = replace(LIFTED, unet=replace(LIFTED.unet, channels=(32, 96)))
    with pytest.raises(CheckpointError, match=r"another architecture.*train again"):
        begin_with(MultiviewModel(wide), tmp_path / "ema.safetensors", "train again")


def test_a_loss_on_the_surface_needs_a_lift() -> None:
    with pytest.raises(ValueError, match="lambda_surface needs a UNet with lift_channels"):
        with_lift(LIFTED, 0)
    with pytest.raises(ValueError, match="lift_channels must be 0 or more"):
        with_lift(TOY, -1)
