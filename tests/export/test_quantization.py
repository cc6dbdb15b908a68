"""`quantize`: int8 on a CPU is close to fp32, taken by the runtime, and kept only where it is worth it."""

import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper

from export import quantization, verification
from export.__main__ import cli
from export.example_inputs import example_inputs
from export.folders import replace_folder
from train.presets import TOY
from uc3d_rt.backends.choice import choose
from uc3d_rt.backends.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeQuantized
from uc3d_rt.contract import load_manifest
from uc3d_rt.engines import BUILT_NAME, load_engine_set


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, ["quantize", *(str(argument) for argument in arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def times(fp32_ms: float, int8_ms: float) -> object:
    measured = quantization._compared_calls

    def compared(*arguments: object) -> tuple[float, float, float]:
        return measured(*arguments)[0], fp32_ms, int8_ms  # type: ignore[arg-type]

    return compared


def unchanged(source: Path, target: Path, *_: object) -> None:
    """In the place of the quantizer, for tests of what comes after it."""
    shutil.copyfile(source, target)


@pytest.mark.parametrize(("saturates", "largest"), [(True, 64), (False, 127)])
def test_weights_get_seven_bits_where_products_saturate(
    saturates: bool, largest: int, copy: Path, object_png: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "_compared_calls", times(2.0, 1.0))
    monkeypatch.setattr(quantization, "products_saturate", lambda: saturates)
    monkeypatch.setitem(quantization.SAMPLE_LIMIT_DB, "int8", 0.0)
    result = run("--bundle", copy, object_png)
    assert result.exit_code == 0, result.output
    assert ("weights get seven bits" in result.output) == saturates
    (folder,) = (copy / BUILT_NAME).iterdir()
    stored = onnx.load(folder / "unet.onnx").graph.initializer
    weights = [numpy_helper.to_array(t) for t in stored if t.data_type == onnx.TensorProto.INT8]
    peaks = [int(np.abs(weight.astype(int)).max()) for weight in weights if weight.size >= 64]
    assert len(peaks) > 50 and largest - 1 <= max(peaks) <= largest


def test_int8_is_made_and_taken(copy: Path, object_png: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "_compared_calls", times(2.0, 1.0))  # a toy's time tells nothing
    monkeypatch.setitem(quantization.SAMPLE_LIMIT_DB, "int8", 5.0)  # random weights sample noise
    result = run("--bundle", copy, object_png)
    assert result.exit_code == 0, result.output
    assert "a call takes 1 ms, fp32 2 ms; relative error" in result.output
    manifest = load_manifest(copy)
    (folder,) = (copy / BUILT_NAME).iterdir()
    assert load_engine_set(folder).precision == "int8" and folder.name.endswith("int8-cpu")
    count = Counter(node.op_type for node in onnx.load(folder / "unet.onnx").graph.node)
    exact = Counter(node.op_type for node in onnx.load(copy / "unet.onnx").graph.node)
    assert count["MatMulInteger"] > 0.8 * count["MatMul"] and count["DynamicQuantizeLinear"]
    assert count["QuantizeLinear"] >= exact["Conv"] - 2 and count["Conv"] == exact["Conv"]

    chosen = choose(copy, manifest, "cpu")
    assert isinstance(chosen.backend, OnnxRuntimeQuantized) and "unet in int8" in chosen.name
    for batch in (1, 2):
        inputs = example_inputs(TOY.shape, "unet", batch, seed=4)
        with chosen.backend.open(copy, manifest, "unet") as fast:
            found = fast(**inputs)["prediction"]
        with OnnxRuntimeBackend("cpu").open(copy, manifest, "unet") as plain:
            expected = plain(**inputs)["prediction"]
        assert 1e-4 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.1
    with chosen.backend.open(copy, manifest, "vae_decoder") as decoder:  # the bundle's own
        assert decoder(latent=np.zeros((1, 4, 8, 8), np.float32))["image"].shape == (1, 3, 32, 32)

    assert isinstance(choose(copy, manifest, "cpu", "bundle").backend, OnnxRuntimeBackend)
    plain_cpu = OnnxRuntimeBackend("cpu")
    truth = verification.sample(copy, manifest, plain_cpu, 2, 0)
    checks = list(verification._engine_checks(copy, manifest, plain_cpu, truth, 2, 0))
    assert len(checks) == 2 and not any(check.failed for check in checks)
    assert {check.form for check in checks} == {folder.name}

    (folder / "unet.onnx").write_bytes(b"x")
    found_again = choose(copy, manifest, "cpu")
    assert not isinstance(found_again.backend, OnnxRuntimeQuantized)
    assert "unet.onnx was altered or damaged" in found_again.reason


def test_what_is_slower_is_not_kept(copy: Path, object_png: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "int8_graph", unchanged)
    monkeypatch.setattr(quantization, "_compared_calls", lambda *_: (0.1, 1.0, 2.0))
    result = run("--bundle", copy, object_png)
    assert (
        result.exit_code == 6
        and "int8 is not faster on this machine (2 ms a call, fp32 1 ms)" in result.output
    )
    assert not list((copy / BUILT_NAME).iterdir())


def test_what_changes_the_views_is_not_kept(
    copy: Path, object_png: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "int8_graph", unchanged)
    monkeypatch.setattr(quantization, "_compared_calls", times(2.0, 1.0))
    monkeypatch.setitem(quantization.SAMPLE_LIMIT_DB, "int8", math.inf)
    monkeypatch.setattr(quantization, "views_psnr", lambda view, true: {"colour": 27.0})
    result = run("--bundle", copy, object_png)
    assert result.exit_code == 6 and "int8 changes the views too much" in result.output
    assert not list((copy / BUILT_NAME).iterdir())


def test_bad_input(copy: Path, tmp_path: Path) -> None:
    assert run("--bundle", copy, tmp_path / "none.png").exit_code == 3
    assert run("--bundle", tmp_path / "none", tmp_path / "none.png").exit_code == 4
    assert run("--bundle", copy).exit_code == 2


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, work = tmp_path / "int8", tmp_path / "work"
    for folder in (target, work):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    rename = Path.rename

    def refusing(path: Path, to: Path) -> Path:
        if path == work:
            raise OSError("refused")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(OSError, match="refused"):
        replace_folder(target, work)
    assert (target / "name").read_text() == "int8"
