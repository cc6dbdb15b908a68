"""`verify`: what it compares, and that a difference fails."""

import math
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper

from export import verification
from export.__main__ import cli
from export.engine_plan import BuildOptions, plan_build
from export.engines import build
from export.verification import Check, shaded_ball, table, verify, views_psnr
from uc3d_rt.contract import NETWORK_NAMES
from uc3d_rt.pipeline import Views


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, ["verify", *(str(argument) for argument in arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_all_forms_agree(bundle: Path, checkpoint: Path) -> None:
    checks = list(verify(bundle, checkpoint=checkpoint, steps=2))
    compared = {(check.form, check.what) for check in checks if not check.note}
    for form in ("fp16", "torch"):
        assert {what.split(".")[0] for f, what in compared if f == form and "." in what} == set(NETWORK_NAMES)
        assert (form, "sample: colour views") in compared and (form, "sample: normal views") in compared
    # Random weights sample noise; their networks agree all the same.
    assert not [check for check in checks if check.failed and "sample" not in check.what]
    errors = {(check.form, check.what): check.value for check in checks}
    assert 0 < errors["fp16", "unet.prediction"] < errors["torch", "unet.prediction"]
    assert checks[-1] == Check("engines", "all", note="none were built")


def test_without_a_checkpoint_torch_is_left_out_by_name(tiny_bundle: Path) -> None:
    result = run("--bundle", tiny_bundle)
    assert result.exit_code == 0, result.output
    assert "torch    all                                no --checkpoint was given" in result.output
    assert result.output.count(" ok") == 8 and "FAILED" not in result.output


def test_a_graph_that_computes_something_else_fails(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bent(path: Path, sizes: dict[str, int], **options: object) -> onnx.ModelProto:
        model = plain(path, sizes, **options)
        if path.name == "vae_decoder.onnx":
            weight = next(t for t in model.graph.initializer if t.name.startswith("pictures"))
            changed = numpy_helper.to_array(weight) * np.float16(1.1)
            weight.CopyFrom(numpy_helper.from_array(changed, weight.name))
        return model

    plain = verification.typed_graph
    monkeypatch.setattr(verification, "typed_graph", bent)
    result = run("--bundle", tiny_bundle, "--steps", 2)
    assert result.exit_code == 1
    failed = [line.split()[1] for line in result.output.splitlines() if line.endswith("  FAILED")]
    assert failed == ["vae_decoder.image", "sample:", "sample:"]


def test_engines_that_cannot_run_here_are_named(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))
    plan = plan_build(BuildOptions(copy, "tensorrt-rtx", ("sm_75",)))
    build(plan)
    result = run("--bundle", copy, "--steps", 2)
    assert result.exit_code == 0
    assert f"{plan.folder.name} all" in result.output and "not run: " in result.output


def test_a_checkpoint_of_another_profile(tiny_bundle: Path, checkpoint: Path) -> None:
    result = run("--bundle", tiny_bundle, "--checkpoint", checkpoint)
    assert result.exit_code == 4 and "give the checkpoint it was exported from" in result.output


def test_no_number_fails() -> None:
    lines: list[str] = []
    checks = [
        Check("fp16", "a", 1e-3, 1e-2), Check("fp16", "b", math.nan, 1e-2), Check("x", "c", note="not run"),
        Check("fp16", "d", 50.0, 40.0, True), Check("fp16", "e", math.nan, 40.0, True),
    ]  # fmt: skip
    assert [check.failed for check in checks] == [False, True, False, False, True]
    assert table(checks[:1] + checks[2:4], lines.append) and not table(checks, lines.append)


def test_psnr_of_views() -> None:
    black, grey = np.zeros((6, 4, 4, 3), np.float32), np.full((6, 4, 4, 3), 0.1, np.float32)
    found = views_psnr(Views(grey, black), Views(black, black))
    assert found["colour"] == pytest.approx(20.0, abs=1e-5) and found["normal"] == math.inf


def test_the_ball_is_lit_from_above() -> None:
    ball = shaded_ball(64)
    inside = ball[..., 3] == 255
    assert 0.45 < inside.mean() < 0.55 and (ball[..., 3][~inside] == 0).all()
    assert ball[16, 32, 0] > ball[48, 32, 0]
