"""Bundles: contract, parity limit, manifest and replacement; the toy networks with random weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result

from export import onnx_bundle
from export.__main__ import cli
from export.networks import example_tensors, load_networks
from export.onnx_bundle import ParityError, export_bundle, parity_error, run_onnx
from export.typed_graph import cpu_session
from train.merge import merge_checkpoints
from train.presets import TOY
from uc3d_rt.contract import NETWORK_NAMES, SamplingDefaults, load_manifest, network_specs, sha256_of


@pytest.fixture
def ready_made(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Export by copying: these tests are about folders, not about graphs."""
    monkeypatch.setattr(
        onnx_bundle,
        "export_network",
        lambda _p, name, _n, target: shutil.copy(bundle / f"{name}.onnx", target),
    )
    monkeypatch.setattr(onnx_bundle, "parity_error", lambda *_: 1e-6)
    monkeypatch.setattr(onnx_bundle, "store_weights_int8", lambda source, target: shutil.copy(source, target))


def test_manifest_says_what_the_folder_holds(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    assert {path.name for path in bundle.iterdir()} == {"manifest.json"} | {
        f"{n}.onnx" for n in NETWORK_NAMES
    }
    for entry in manifest.networks.values():
        assert sha256_of(bundle / entry.file) == entry.sha256
        assert (bundle / entry.file).stat().st_size == entry.bytes
    assert (manifest.profile, manifest.shape, manifest.schedule) == ("toy", TOY.shape, TOY.schedule)
    assert manifest.sampling == SamplingDefaults(9, 2.0, (0.1, 0.9), 0.5)
    assert manifest.training["data"] == "none" and manifest.training["steps"] == 7
    assert manifest.training["losses"]["lambda_mi"] == 0.05
    assert manifest.training["last_losses"] == {"step": 7, "total": 0.5}
    for figures in manifest.parity.values():
        assert 0 <= figures["fp32_relative_error"] < 1e-5
        assert figures["fp32_relative_error"] < figures["int8_weights_relative_error"] < 0.05


def test_graphs_keep_the_contract(bundle: Path) -> None:
    for name, spec in network_specs(TOY.shape).items():
        graph = onnx.load(bundle / f"{name}.onnx").graph
        for tensors, found in ((spec.inputs, graph.input), (spec.outputs, graph.output)):
            assert [value.name for value in found] == [tensor.name for tensor in tensors]
            for tensor, value in zip(tensors, found, strict=True):
                sizes = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
                assert tuple(sizes) == tensor.shape


def test_batches_of_one_two_and_three_objects(checkpoint: Path, bundle: Path) -> None:
    _, networks = load_networks(checkpoint)
    session = cpu_session(bundle / "unet.onnx")
    for batch in (1, 2, 3):  # the graph was traced with two
        inputs = example_tensors(TOY, "unet", batch, seed=5)
        (found,) = run_onnx(session, inputs)
        with torch.no_grad():
            truth = networks["unet"](*inputs).numpy()
        assert found.shape == truth.shape == (6 * batch, 8, 8, 8)
        assert np.linalg.norm(found - truth) < 0.05 * np.linalg.norm(truth)  # int8 weights


def test_decoder_output_is_clipped(bundle: Path) -> None:
    latent = 100 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    (image,) = run_onnx(cpu_session(bundle / "vae_decoder.onnx"), (latent,))
    assert image.min() >= 0.0 and image.max() <= 1.0


def test_a_perturbed_network_is_refused_and_nothing_is_left(
    checkpoint: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bent(_preset, name: str, network: torch.nn.Module, target: Path) -> None:
        shutil.copy(bundle / f"{name}.onnx", target)
        if name == "vae_encoder":
            with torch.no_grad():
                next(network.parameters()).mul_(1.05)

    monkeypatch.setattr(onnx_bundle, "export_network", bent)
    monkeypatch.setattr(onnx_bundle, "PARITY_LIMIT", 2e-2)  # above int8's own error
    with pytest.raises(ParityError, match=r"vae_encoder.onnx differs from torch by .*limit 0.02"):
        export_bundle(checkpoint, tmp_path / "toy")
    assert not list(tmp_path.iterdir())


def test_a_network_that_gives_no_number_is_refused(
    checkpoint: Path, ready_made: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_bundle, "parity_error", lambda *_: float("nan"))
    with pytest.raises(ParityError):
        export_bundle(checkpoint, tmp_path / "toy")
    assert not list(tmp_path.iterdir())


def test_parity_looks_at_every_output_and_batch(checkpoint: Path, bundle: Path) -> None:
    _, networks = load_networks(checkpoint)
    heads, path = networks["projection_heads"], bundle / "projection_heads.onnx"
    assert parity_error(TOY, "projection_heads", heads, path) < 0.05
    with torch.no_grad():
        heads.normal[-1].weight.mul_(-1.0)  # the second output alone
    assert parity_error(TOY, "projection_heads", heads, path) > 0.5
    with torch.no_grad():
        heads.normal[-1].weight.fill_(float("nan"))
    assert np.isnan(parity_error(TOY, "projection_heads", heads, path))


def test_replacing_a_bundle(checkpoint: Path, ready_made: None, tmp_path: Path) -> None:
    out = tmp_path / "toy"
    export_bundle(checkpoint, out, training={"data": "first"})
    (out / "built").mkdir()  # engines of the old networks must not outlive them
    export_bundle(checkpoint, out, training={"data": "second"})
    assert load_manifest(out).training["data"] == "second"
    assert not (out / "built").exists() and [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_a_merged_checkpoint_is_told_in_the_manifest(
    checkpoint: Path, ready_made: None, tmp_path: Path
) -> None:
    merged, out = tmp_path / "merged", tmp_path / "toy"
    merge_checkpoints([checkpoint, checkpoint], merged)
    export_bundle(merged, out, training={})
    training = load_manifest(out).training
    assert training["merged_steps"] == [7, 7] and training["steps"] == 7
    export_bundle(checkpoint, out, training={})
    assert "merged_steps" not in load_manifest(out).training


def test_a_failed_replacement_leaves_the_old_bundle(
    checkpoint: Path, ready_made: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "toy", Path.rename
    export_bundle(checkpoint, out, training={"data": "first"})

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise PermissionError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(PermissionError):
        export_bundle(checkpoint, out, training={"data": "second"})
    assert load_manifest(out).training["data"] == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_a_folder_of_other_things_is_not_replaced(checkpoint: Path, ready_made: None, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(ValueError, match="is no bundle and not empty"):
        export_bundle(checkpoint, tmp_path)
    assert (tmp_path / "thesis.tex").is_file()


def test_command_line(checkpoint: Path, ready_made: None, tmp_path: Path) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(cli, ["onnx", *map(str, arguments)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.output

    more = ("--steps", 20, "--guidance-interval", 0.0, 0.5, "--noise-scale", 0.5, "--data", "mine")
    more += ("--first-step-to", 0.5, "--mirror")
    code, output = run("--checkpoint", checkpoint, "--out", tmp_path / "toy", *more)
    assert code == 0 and "bundle" in output and "fp32 relative error" in output
    manifest = json.loads((tmp_path / "toy" / "manifest.json").read_text())
    assert manifest["sampling"] == {
        "steps": 20, "guidance": 3.0, "guidance_interval": [0.0, 0.5], "guidance_rescale": 0.0,
        "noise_scale": 0.5, "first_step_to": 0.5, "mirror": True,
    }  # fmt: skip
    code, output = run("--checkpoint", tmp_path / "nothing", "--out", tmp_path / "new")
    assert code == 1 and "Error: no checkpoint at" in output and not (tmp_path / "new").exists()
    shutil.copytree(checkpoint, tmp_path / "cut")
    (tmp_path / "cut" / "ema.safetensors").unlink()
    code, output = run("--checkpoint", tmp_path / "cut", "--out", tmp_path / "new")
    assert code == 1 and "ema.safetensors is missing" in output


def test_a_checkpoint_of_another_profile_is_refused(
    checkpoint: Path, tmp_path: Path, ready_made: None
) -> None:
    def run(profile: str) -> Result:
        command = ["onnx", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]
        return CliRunner().invoke(cli, [*command, "--profile", profile])

    refused = run("sdxl")
    assert refused.exit_code == 1 and "is of profile 'toy', not 'sdxl'" in refused.output
    assert not (tmp_path / "out").exists()
    assert run("toy").exit_code == 0 and load_manifest(tmp_path / "out").profile == "toy"
