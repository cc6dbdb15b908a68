"""The tutorial runs from nothing to a bundle, and its loss falls."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from export.__main__ import cli as export_command
from train import toy
from train.objects import load_object
from uc3d_rt.cli import main as runtime_command
from uc3d_rt.contract import load_manifest


def test_objects_are_coloured_and_of_four_kinds(tmp_path: Path) -> None:
    files = toy.make_objects(tmp_path, 8, seed=0)
    assert [path.stem.split("-", 1)[1] for path in files] == ["box", "ball", "cone", "l-shape"] * 2
    for path in files:
        thing = load_object(path)
        assert len(np.unique(thing.vertex_color, axis=0)) == 2
    again = toy.make_objects(tmp_path / "again", 8, seed=0)
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(files, again, strict=True))


def test_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    codes = []

    def call(module: str, *arguments: object) -> None:
        """As `toy.call`, without the seconds that a new interpreter imports for."""
        program = {"export": export_command, "uc3d_rt.cli": runtime_command}[module]
        with pytest.raises(SystemExit) as stopped:
            program([str(argument) for argument in arguments])
        codes.append(int(stopped.value.code or 0))

    monkeypatch.setattr(toy, "call", call)
    monkeypatch.setattr(toy, "OBJECTS", 9)
    monkeypatch.setattr(toy, "HELD_OUT", 1)
    history = toy.run(tmp_path, steps=20, vae_steps=60, seed=0)
    losses = [entry["diffusion"] for entry in history]
    assert np.mean(losses[-4:]) < 0.8 * losses[0]
    assert {"var", "mi"} <= set(history[0])
    export, pipeline = codes
    # So few steps may draw nothing at all, which the fit says with exit code 7.
    assert export == 0 and pipeline in (0, 7), capsys.readouterr().err
    assert load_manifest(tmp_path / "bundle").training["data"] == "made by train/toy.py"
    assert (tmp_path / "model/sheet-000020.png").is_file() and (tmp_path / "model/loss.png").is_file()
    assert Image.open(tmp_path / "picture.png").mode == "RGBA"
