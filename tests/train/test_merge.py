"""The mean of several checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from train.__main__ import cli
from train.checkpoint import CheckpointError, save_checkpoint
from train.merge import merge_checkpoints
from train.model import MultiviewModel
from train.presets import TOY
from train.vae import Vae


def checkpoint(folder: Path, step: int, vae: Vae) -> Path:
    torch.manual_seed(step)
    model = MultiviewModel(TOY)
    state = {"step": step, "batch": 4, "seed": step // 20, "history": [{"step": step}]}
    ema = dict(model.state_dict())
    save_checkpoint(folder, preset=TOY, model=model, ema=ema, vae=vae, optimizers=(), state=state)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    torch.manual_seed(0)
    vae = Vae(TOY.vae)
    return [checkpoint(tmp_path / str(step), step, vae) for step in (10, 20, 40)]


def test_merged_weights_are_their_mean(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    made = CliRunner().invoke(cli, ["merge", *map(str, folders), "--out", str(out)])
    assert made.exit_code == 0 and "the mean of steps 10, 20, 40" in made.output, made.output
    given = [load_file(folder / "ema.safetensors") for folder in folders]
    merged = load_file(out / "ema.safetensors")
    assert merged.keys() == given[0].keys()
    for name, value in merged.items():
        truth = torch.stack([weights[name].double() for weights in given]).mean(dim=0)
        torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=1e-7)
        assert value.dtype == given[0][name].dtype
    state = json.loads((out / "state.json").read_text())
    assert (state["step"], state["merged_steps"], state["history"]) == (40, [10, 20, 40], [{"step": 40}])
    assert state["merged_seeds"] == [0, 1, 2]
    assert (out / "vae.safetensors").read_bytes() == (folders[0] / "vae.safetensors").read_bytes()


def test_what_cannot_be_merged_is_told(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two checkpoints or more"):
        merge_checkpoints(folders[:1], tmp_path / "out")
    with pytest.raises(ValueError, match="exists; choose another --out"):
        merge_checkpoints(folders, folders[0])
    vae = load_file(folders[1] / "vae.safetensors")
    name = next(iter(vae))
    save_file({**vae, name: vae[name] + 1.0}, folders[1] / "vae.safetensors")
    with pytest.raises(CheckpointError, match="20 has another preset or autoencoder than .*40"):
        merge_checkpoints(folders, tmp_path / "out")
    (folders[0] / "ema.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="ema.safetensors is missing; give folders of checkpoints"):
        merge_checkpoints(folders[::2], tmp_path / "out")
    assert not (tmp_path / "out").exists()
