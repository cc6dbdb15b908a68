"""The probe of conditions, driven by a UNet whose knowledge is known."""

import numpy as np
import pytest
import torch
from torch import Tensor

from train.model import MultiviewModel
from train.presets import TOY
from train.probe import CONDITIONS, errors_of_conditions, latents, table
from train.vae import Vae
from train.watch import Watch

OBJECTS = 2


@pytest.fixture
def watch() -> Watch:
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(OBJECTS, 6, 32, 32, 3))
    return Watch(
        picture=rng.integers(0, 256, (OBJECTS, 32, 32, 3), dtype=np.uint8),
        focal=np.array([0.0, 1.5], np.float32),
        color=rng.random((OBJECTS, 6, 32, 32, 3)).astype(np.float32),
        normal=(normal / np.linalg.norm(normal, axis=-1, keepdims=True)).astype(np.float32),
        mask=np.ones((OBJECTS, 6, 32, 32), bool),
    )


def test_each_condition_is_given_alone(watch: Watch) -> None:
    torch.manual_seed(0)
    model, vae = MultiviewModel(TOY).eval(), Vae(TOY.vae).eval().requires_grad_(False)
    truth = [latents(vae, watch, index, torch.device("cpu")) for index in range(OBJECTS)]
    wrong_by = {(True, True): 0.0, (True, False): 0.5, (False, True): 0.25, (False, False): 2.0}
    calls: list[tuple[bool, bool]] = []

    class Knows(torch.nn.Module):
        """Off by a known amount, less where more is given."""

        def forward(self, z_t: Tensor, t: Tensor, tokens: Tensor, image_latent: Tensor, focal: Tensor):  # noqa: ANN202
            """The v of the true latents, moved; at T - 1 v is -z_0 and z_t is noise."""
            assert t.tolist() == [TOY.schedule.train_steps - 1] and z_t.shape == (6, 8, 8, 8)
            given = bool(tokens.any()), bool(image_latent.any())
            index = len(calls) // len(CONDITIONS)
            assert focal.item() == watch.focal[index]
            calls.append(given)
            return -(truth[index] + wrong_by[given])

    model.unet = Knows()  # type: ignore[assignment]
    errors = errors_of_conditions(model, vae, watch)
    assert set(calls) == set(wrong_by)
    names = {"both": (True, True), "tokens only": (True, False), "E(y) only": (False, True)}
    for name, given in {**names, "neither": (False, False)}.items():
        assert errors[name] == pytest.approx(wrong_by[given] ** 2, abs=1e-5)
    assert errors["zero"] == pytest.approx(float(torch.stack(truth).square().mean()), rel=1e-5)
    assert table({"2 kept aside": errors}).splitlines()[-1].endswith("| 0.000 | 0.250 | 0.062 | 4.000 |")
