"""The Khronos validator has nothing to say about the meshes that the command line writes."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import CliRun

pytestmark = pytest.mark.skipif(
    not (shutil.which("node") and shutil.which("npm")), reason="needs node and npm for the glTF validator"
)

VERSION = "2.0.0-dev.3.10"
SCRIPT = """
const validator = require('gltf-validator');
const data = new Uint8Array(require('fs').readFileSync(process.argv[1]));
validator.validateBytes(data).then(report => console.log(JSON.stringify(report.issues)));
"""


@pytest.fixture(scope="session")
def validator(request: pytest.FixtureRequest) -> Path:
    """A folder in which node finds `gltf-validator`; kept in pytest's cache between runs."""
    folder = Path(request.config.cache.mkdir("gltf-validator"))
    if not (folder / "node_modules" / "gltf-validator").is_dir():
        install = [
            "npm",
            "install",
            "--prefix",
            str(folder),
            "--no-audit",
            "--no-fund",
            f"gltf-validator@{VERSION}",
        ]
        subprocess.run(install, check=True, capture_output=True, timeout=240)
    return folder


@pytest.mark.parametrize("texture", ["atlas", "vertex"])
def test_meshes_are_valid_gltf(texture: str, validator: Path, glb_run: Callable[[str], CliRun]) -> None:
    run = glb_run(texture)
    assert run.code == 0, run.stderr
    command = ["node", "-e", SCRIPT, str(run.folder / "m.glb")]
    done = subprocess.run(command, cwd=validator, check=True, capture_output=True, text=True, timeout=60)
    issues = json.loads(done.stdout)
    assert (issues["numErrors"], issues["numWarnings"]) == (0, 0), issues["messages"]
