"""The plain package in a fresh environment: no torch anywhere, and the main job runs."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest
import trimesh

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment with nothing but `pip install .`; needs a package index."""
    folder = tmp_path_factory.mktemp("plain")
    venv.create(folder, with_pip=True)
    binaries = folder / ("Scripts" if sys.platform == "win32" else "bin")
    run(binaries / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", ROOT)
    return binaries


def run(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, cwd=cwd
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.timeout(600)
def test_nothing_heavy_came_along(plain: Path) -> None:
    code = (
        "import importlib.util as u; print([n for n in "
        "('torch', 'diffusers', 'transformers', 'onnx', 'accelerate', 'warp') if u.find_spec(n)])"
    )
    assert run(plain / "python", "-c", code).stdout.strip() == "[]"


@pytest.mark.timeout(600)
def test_the_main_job_runs(plain: Path, tmp_path: Path, object_png: Path, tiny_bundle: Path) -> None:
    shipped = (ROOT / "engines" / "edge" / "manifest.json").is_file()
    bundle = () if shipped else ("--bundle", tiny_bundle)
    # From another folder: the bundle must come out of the package, not out of the source tree.
    run(plain / "uc3d-rt", object_png, "-o", "m.glb", "--steps", "4", *bundle, cwd=tmp_path)
    mesh = trimesh.load(tmp_path / "m.glb", force="mesh")
    assert len(mesh.faces) > 100
    if shipped:
        code = "from uc3d_rt.pipeline import default_bundle; print(default_bundle())"
        assert "site-packages" in run(plain / "python", "-c", code, cwd=tmp_path).stdout
