"""`uc3d-rt doctor`: what it finds, and what it calls wrong."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from uc3d_rt import doctor
from uc3d_rt.contract import load_manifest
from uc3d_rt.engines import BUILT_NAME, EngineFile, EngineSet, Machine, save_engine_set

Run = Callable[..., tuple[int, str, str]]


def test_a_machine_that_works(run_cli: Run, tiny_bundle: Path) -> None:
    code, out, _ = run_cli("doctor", "--bundle", tiny_bundle)
    assert code == 0 and "wrong:" not in out
    for text in ("CPUExecutionProvider", "profile tiny, all files as they were written", "engines: none"):
        assert text in out


def test_two_onnx_runtimes(run_cli: Run, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"onnxruntime": "1.30.0", "onnxruntime-gpu": "1.31.0"}
    monkeypatch.setattr(doctor, "_version", found.get)
    code, out, _ = run_cli("doctor", "--bundle", tiny_bundle)
    assert code == 6
    assert "wrong: onnxruntime 1.30.0 and onnxruntime-gpu 1.31.0 are both installed" in out
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in out


def test_no_onnx_runtime(run_cli: Run, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, out, _ = run_cli("doctor", "--bundle", tiny_bundle)
    assert code == 6 and "wrong: ONNX Runtime does not load" in out


def test_a_bundle_that_is_not_whole(run_cli: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    code, out, _ = run_cli("doctor", "--bundle", tmp_path / "none")
    assert code == 6 and "wrong: no bundle at" in out
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))
    (copy / "unet.onnx").write_bytes(b"x")
    code, out, _ = run_cli("doctor", "--bundle", copy)
    assert code == 6 and "unet.onnx was altered" in out


def test_engines_and_whether_they_fit(
    run_cli: Run, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))
    folder = copy / BUILT_NAME / "some"
    folder.mkdir(parents=True)
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # SHA-256 of no bytes
    files = {}
    for name, entry in load_manifest(copy).networks.items():
        (folder / f"{name}.rtx").touch()
        files[name] = EngineFile(f"{name}.rtx", empty, 0, entry.sha256, "key", (1,), 1e-3)
    save_engine_set(EngineSet("tensorrt-rtx", "1.7.1", ("sm_89",), "fp16", "tiny", files), folder)
    monkeypatch.setattr(doctor, "installed_version", {"tensorrt-rtx": "1.7.1"}.get)
    monkeypatch.setattr(doctor, "this_machine", lambda: Machine("RTX 4090", "sm_89", "580.1"))
    code, out, _ = run_cli("doctor", "--bundle", copy)
    assert code == 0 and "fits this machine" in out and "GPU: RTX 4090, sm_89, driver 580.1" in out
    monkeypatch.setattr(doctor, "this_machine", lambda: Machine("RTX 5090", "sm_120", "580.1"))
    _, out, _ = run_cli("doctor", "--bundle", copy)
    assert "does not fit this machine: built for sm_89, but RTX 5090 is sm_120" in out
    (folder / "engines.json").write_text("{}")
    code, out, _ = run_cli("doctor", "--bundle", copy)
    assert code == 0 and "unusable" in out  # the main job runs without them


def test_help(run_cli: Run) -> None:
    code, out, _ = run_cli("doctor", "--help")
    assert code == 0 and "uc3d-rt doctor" in out
