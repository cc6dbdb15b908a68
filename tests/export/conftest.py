"""A toy checkpoint with random weights, and its bundle."""

from pathlib import Path

import pytest
import torch

from export.onnx_bundle import export_bundle
from train.checkpoint import save_checkpoint
from train.model import MultiviewModel
from train.presets import TOY
from train.vae import Vae
from uc3d_rt.contract import SamplingDefaults


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, vae = MultiviewModel(TOY), Vae(TOY.vae)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)  # row-wise attention starts as zero and would hide
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    ema = {name: value.detach() for name, value in model.state_dict().items()}
    state = {"step": 7, "batch": 8, "seed": 3, "history": [{"step": 7, "total": 0.5}]}
    save_checkpoint(folder, preset=TOY, model=model, ema=ema, vae=vae, optimizers=(), state=state)
    return folder


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("bundles") / "toy"
    sampling = SamplingDefaults(steps=9, guidance=2.0, guidance_interval=(0.1, 0.9), guidance_rescale=0.5)
    export_bundle(checkpoint, folder, sampling=sampling, training={"data": "none"})
    return folder


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A folder with the bundle's files, to which others may be added."""
    folder = tmp_path / "toy"
    folder.mkdir()
    for path in bundle.iterdir():
        (folder / path.name).symlink_to(path)
    return folder
