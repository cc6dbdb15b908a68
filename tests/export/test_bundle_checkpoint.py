"""A bundle turned back into a checkpoint holds the weights it was exported from."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from export.__main__ import cli
from export.bundle_checkpoint import checkpoint_from_bundle
from export.onnx_bundle import network_file
from export.weights import MIN_ENTRIES
from train.checkpoint import CheckpointError, load_vae, load_weights, preset_of
from train.model import MultiviewModel
from train.presets import TOY
from uc3d_rt.contract import load_manifest, save_manifest

FILES = ("ema.safetensors", "vae.safetensors")


def test_weights_come_back(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        cli, ["checkpoint", "--bundle", str(bundle), "--out", str(tmp_path / "runs" / "start")]
    )
    assert result.exit_code == 0, result.output
    back = tmp_path / "runs" / "start"
    assert preset_of(back) == TOY
    for file in FILES:
        before, after = load_file(checkpoint / file), load_file(back / file)
        assert set(before) == set(after)
        exact = [name for name, value in before.items() if torch.equal(value, after[name])]
        for name, value in before.items():
            assert (
                value.numel() < MIN_ENTRIES
                and name in exact
                or (
                    (value - after[name]).norm()
                    < 0.02 * value.norm()  # int8 in the bundle: 127 levels either way
                )
            ), name
        assert len(before) > len(exact) > 0.5 * len(before)
    model = MultiviewModel(TOY)
    load_weights(model, back / "ema.safetensors", "")  # what `--start-from` reads
    load_vae(back, TOY)
    assert json.loads((back / "state.json").read_text("utf-8"))["bundle"]["data"] == "none"


def test_a_folder_that_exists_is_left_alone(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept", encoding="utf-8")
    result = CliRunner().invoke(cli, ["checkpoint", "--bundle", str(bundle), "--out", str(tmp_path)])
    assert result.exit_code == 1 and "choose another --out" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_graphs_of_other_code_are_refused(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "toy"))
    path = copy / "projection_heads.onnx"
    model = onnx.load(path)
    color, normal = (
        next(node for node in model.graph.node if node.op_type == "Conv" and head in node.input[1])
        for head in ("color", "normal")
    )
    # The graph computes what it did, but the names by which weights are found are exchanged.
    color.name, normal.name = normal.name, color.name
    onnx.save(model, path)
    manifest = load_manifest(copy)
    networks = {**manifest.networks, "projection_heads": network_file(path)}
    save_manifest(replace(manifest, networks=networks), copy)
    with pytest.raises(CheckpointError, match="check out the code"):
        checkpoint_from_bundle(copy, tmp_path / "back")
    assert not (tmp_path / "back").exists()
