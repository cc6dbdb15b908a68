"""Checkpoints: whole after a kill at any moment, and clear about what does not fit."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train import checkpoint as checkpoint_module
from train.checkpoint import (
    CheckpointError,
    differences,
    load_state,
    load_vae,
    load_weights,
    optimizer_tensors,
    preset_of,
    restore_optimizers,
    save_checkpoint,
    save_vae,
)
from train.optimizer import build_optimizers
from train.presets import EDGE, TOY
from train.vae import Vae


def save(folder: Path, step: int) -> None:
    torch.manual_seed(0)
    net, vae = torch.nn.Linear(3, 2), Vae(TOY.vae)
    with torch.no_grad():
        net.weight.fill_(step)
    ema = {name: value.detach() * 2 for name, value in net.state_dict().items()}
    save_checkpoint(
        folder, preset=TOY, model=net, ema=ema, vae=vae, optimizers=(), state={"step": step, "history": []}
    )


def weight(folder: Path) -> float:
    return float(load_file(folder / "model.safetensors")["weight"][0, 0])


def test_round_trip(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoint"
    save(folder, 3)
    save(folder, 4)
    assert load_state(folder)["step"] == 4 and weight(folder) == 4.0
    assert float(load_file(folder / "ema.safetensors")["weight"][0, 0]) == 8.0
    assert preset_of(folder) == TOY
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "ema.safetensors",
        "model.safetensors",
        "state.json",
        "vae.safetensors",
    ]


class Killed(BaseException):
    pass


def kill_at_rename(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    rename = Path.rename

    def patched(self: Path, target: Path) -> Path:
        if self.name == source:
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", patched)


def test_kill_between_the_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint"
    save(folder, 1)
    with monkeypatch.context() as patch:
        kill_at_rename(patch, "checkpoint.new")
        with pytest.raises(Killed):
            save(folder, 2)
    assert not folder.exists()
    # Both are whole; the newer one takes the place.
    assert load_state(folder)["step"] == 2 and weight(folder) == 2.0
    save(folder, 3)
    assert weight(folder) == 3.0 and [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_save_after_that_kill_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint"
    save(folder, 1)
    with monkeypatch.context() as patch:
        kill_at_rename(patch, "checkpoint.new")
        with pytest.raises(Killed):
            save(folder, 2)
    with monkeypatch.context() as patch:  # the next save dies early, before load_state was called
        patch.setattr(checkpoint_module, "save_file", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            save(folder, 3)
    assert load_state(folder)["step"] == 2


def test_kill_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint"
    save(folder, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "save_vae", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            save(folder, 2)
    assert load_state(folder)["step"] == 1
    folder.rename(tmp_path / "checkpoint.old")
    assert load_state(folder)["step"] == 1  # the half-written .new is not taken for a checkpoint


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizer_round_trip(kind: str) -> None:
    def train(net: torch.nn.Module, optimizers: list[torch.optim.Optimizer], steps: int) -> None:
        for k in range(steps):
            net(torch.full((1, 64), 1.0 + k)).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    torch.manual_seed(0)
    net, twin = torch.nn.Linear(64, 80), torch.nn.Linear(64, 80)
    optimizers = build_optimizers(net.parameters(), kind, 0.1, 0.01)
    train(net, optimizers, 3)
    twin.load_state_dict(net.state_dict())
    again = build_optimizers(twin.parameters(), kind, 0.1, 0.01)
    restore_optimizers(again, {k: v.clone() for k, v in optimizer_tensors(optimizers).items()})
    train(net, optimizers, 2)
    train(twin, again, 2)
    assert torch.equal(net.weight, twin.weight) and torch.equal(net.bias, twin.bias)


def test_missing_and_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train one with: python -m train model --out .*run$"):
        load_state(tmp_path / "run" / "checkpoint")
    with pytest.raises(FileNotFoundError, match="make one with: python -m train vae --profile toy"):
        load_vae(tmp_path, TOY)
    folder = tmp_path / "checkpoint"
    save(folder, 1)
    (folder / "vae.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_vae(folder, TOY)
    (folder / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_state(folder)


def test_other_architectures(tmp_path: Path) -> None:
    save_vae(Vae(TOY.vae), tmp_path)
    with pytest.raises(CheckpointError, match="another architecture.*--profile edge"):
        load_vae(tmp_path, EDGE)
    with pytest.raises(CheckpointError, match="another architecture"):
        load_weights(torch.nn.Linear(2, 2), tmp_path / "vae.safetensors", "…")
    folder = tmp_path / "checkpoint"
    save(folder, 1)
    state = json.loads((folder / "state.json").read_text())
    state["config"]["unet"]["channels"] = [32, 128]
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"unet.channels was \[32, 128\], now \[32, 64\]"):
        preset_of(folder)
    (folder / "state.json").write_text(json.dumps(state | {"preset": "huge"}))
    with pytest.raises(CheckpointError, match="trained as 'huge'; known presets"):
        preset_of(folder)


def test_a_setting_newer_than_the_checkpoint_says_nothing() -> None:
    saved = json.loads(json.dumps(asdict(TOY)))
    del saved["unet"]["transformer_layers"], saved["train"]["gradient_checkpointing"]
    assert differences(saved, asdict(TOY)) == []
    other = replace(TOY, train=replace(TOY.train, lr=0.5))
    assert differences(saved, asdict(other)) == ["train.lr was 0.001, now 0.5"]
