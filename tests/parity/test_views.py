"""Training's sampler and the runtime's pipeline give the same views from the same picture."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from export.onnx_bundle import export_bundle
from train.checkpoint import load_vae, save_checkpoint
from train.model import MultiviewModel
from train.presets import TOY
from train.sampling import sample_views
from train.vae import Vae
from uc3d_rt.contract import SamplingDefaults
from uc3d_rt.pipeline import Pipeline
from uc3d_rt.preprocess import preprocess

LIMIT = 1e-3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MultiviewModel]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, vae = MultiviewModel(TOY).eval(), Vae(TOY.vae)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
        vae.decoder[-2].weight.mul_(6.0)  # random pictures that fill [0, 1], with clear silhouettes
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    ema = {name: value.detach() for name, value in model.state_dict().items()}
    state = {"step": 1, "batch": 1, "seed": 0, "history": []}
    save_checkpoint(folder, preset=TOY, model=model, ema=ema, vae=vae, optimizers=(), state=state)
    return folder, model


@pytest.fixture(scope="module")
def pipeline(checkpoint: tuple[Path, MultiviewModel], tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    bundle = tmp_path_factory.mktemp("bundles") / "toy"
    sampling = replace(TOY.sampling, first_step_to=0.5)
    export_bundle(checkpoint[0], bundle, int8_weights=False, sampling=sampling)
    return Pipeline.from_bundle(bundle, threads=1)


@pytest.mark.parametrize(
    ("steps", "guidance", "focal_mm", "mirror"),
    [(6, 3.0, None, False), (6, 3.0, 50.0, True), (4, 1.0, 0.0, False), (3, 3.0, None, True)],
)
def test_torch_and_runtime_views_agree(
    checkpoint: tuple[Path, MultiviewModel],
    pipeline: Pipeline,
    object_png: Path,
    steps: int,
    guidance: float,
    focal_mm: float | None,
    mirror: bool,
) -> None:
    """At guidance 3, where a colour paired with another view's normals would show."""
    folder, model = checkpoint
    found = pipeline.views(
        object_png, steps=steps, guidance=guidance, noise_scale=0.5, mirror=mirror, seed=4, focal_mm=focal_mm
    )
    given = preprocess(object_png, TOY.shape.image_px, focal_mm)
    color, normal, mask = sample_views(
        model,
        load_vae(folder, TOY),
        torch.from_numpy(given.image)[None],
        torch.tensor([given.focal]),
        SamplingDefaults(steps, guidance, noise_scale=0.5, first_step_to=0.5, mirror=mirror),
        seed=4,
    )
    drawn = np.linalg.norm(found.normal, axis=-1) > 0.5
    assert 0.2 < drawn.mean() < 1.0
    assert (drawn != mask[0]).mean() < 1e-3  # a pixel may stand on the silhouette's threshold
    both = drawn & mask[0]
    assert np.abs(found.color - color[0])[both].max() <= LIMIT
    # A normal is divided by a length of at least a half.
    assert np.abs(found.normal - normal[0])[both].max() <= 4 * LIMIT
    # Each view is its own: the comparison would fail on any other order of views.
    assert all(np.abs(found.color[v] - color[0, (v + 1) % 6]).max() > 0.1 for v in range(6))
