"""The fatbin that ships is of the sources that ship, and building one tells of what is wrong."""

import json
import shutil
import struct
from pathlib import Path

import pytest

from export.kernels import FATBIN, TARGETS, build_kernels, sources_sha256
from uc3d_rt.errors import BackendError, UsageError

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


def test_the_fatbin_is_of_these_sources() -> None:
    record = json.loads(FATBIN.with_name("kernels.json").read_text())
    assert record["sources_sha256"] == sources_sha256(), "run: python -m export build-kernels"
    assert tuple(record["targets"]) == TARGETS
    assert struct.unpack("<I", FATBIN.read_bytes()[:4])[0] == 0xBA55ED50  # what a fatbin begins with


@needs_nvcc
def test_build_kernels(tmp_path: Path) -> None:
    fatbin = tmp_path / "kernels.fatbin"
    fatbin.write_bytes(b"old")
    made = build_kernels(("sm_90",), fatbin)
    assert made.sources_sha256 == sources_sha256() and made.targets == ("sm_90",)
    assert fatbin.stat().st_size > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.fatbin", "kernels.json"]


@needs_nvcc
def test_unknown_target(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not know sm_13"):
        build_kernels(("sm_13",), tmp_path / "kernels.fatbin")
    assert not list(tmp_path.iterdir())


def test_no_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(BackendError, match="no nvcc in CUDA_HOME"):
        build_kernels(("sm_90",), tmp_path / "kernels.fatbin")
