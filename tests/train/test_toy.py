"""The tutorial runs from nothing to a bundle, and its loss falls."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from export.__main__ import cli as export_command
from train import toy
from train.objects import load_object
from uc3d_rt.cli import command as runtime_command
from uc3d_rt.contract import load_manifest
from uc3d_rt.pipeline import Pipeline


def test_objects_are_coloured_and_of_four_kinds(tmp_path: Path) -> None:
    files = toy.make_objects(tmp_path, 8, seed=0)
    assert [path.stem.split("-", 1)[1] for path in files] == ["box", "ball", "cone", "l-shape"] * 2
    for path in files:
        thing = load_object(path)
        assert len(np.unique(thing.vertex_color, axis=0)) == 2
    again = toy.make_objects(tmp_path / "again", 8, seed=0)
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(files, again, strict=True))


def test_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    called = []

    def call(module: str, *arguments: object) -> None:
        """As `toy.call`, without a new interpreter and without the surface fit."""
        called.append(module)
        words = [str(argument) for argument in arguments]
        if module == "export":
            export_command(words, standalone_mode=False)
            return
        given = runtime_command.make_context("uc3d-rt", words).params
        views = Pipeline.from_bundle(given["bundle"], threads=1).views(given["image"], steps=2)
        assert views.color.shape == views.normal.shape == (6, 32, 32, 3)

    monkeypatch.setattr(toy, "call", call)
    monkeypatch.setattr(toy, "OBJECTS", 9)
    monkeypatch.setattr(toy, "HELD_OUT", 1)
    history = toy.run(tmp_path, steps=12, vae_steps=60, seed=0)
    losses = [entry["diffusion"] for entry in history]
    assert np.mean(losses[-4:]) < 0.8 * losses[0]
    assert {"var", "mi"} <= set(history[0])
    assert called == ["export", "uc3d_rt.cli"]
    assert load_manifest(tmp_path / "bundle").training["data"] == "made by train/toy.py"
    assert (tmp_path / "model/sheet-000012.png").is_file() and (tmp_path / "model/loss.png").is_file()
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.mode == "RGBA"
