"""Every script in examples/ runs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_embed(
    tmp_path: Path, object_png: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(EXAMPLES / "embed.py"))["main"](object_png, tmp_path, tiny_bundle)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mesh.glb", "views.png"]
    assert "fit: done" in capsys.readouterr().out


def test_every_script_is_tested() -> None:
    assert [path.name for path in EXAMPLES.glob("*.py")] == ["embed.py"]
