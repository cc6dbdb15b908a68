"""`python -m train gallery`: every picture has its line, with views and a mesh on it."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from train.__main__ import cli
from train.gallery import VIEW_PX
from uc3d_rt.mesh.build import MeshOptions
from uc3d_rt.neus.fit_plan import FitOptions


@pytest.fixture(autouse=True)
def small_meshes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sheet is tested here, not the fit."""
    monkeypatch.setattr("uc3d_rt.neus.fit.FitOptions", partial(FitOptions, resolution=32, iterations=(5,)))
    monkeypatch.setattr("uc3d_rt.mesh.build.MeshOptions", partial(MeshOptions, faces=1000, texture_px=128))


def test_a_line_a_picture(tmp_path: Path, tiny_bundle: Path, object_png: Path) -> None:
    sheet = tmp_path / "sheet.png"
    done = CliRunner().invoke(
        cli, ["gallery", "--bundle", str(tiny_bundle), "--out", str(sheet), *[str(object_png)] * 2]
    )
    assert done.exit_code == 0, done.output
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape == (2 * 2 * VIEW_PX, 14 * VIEW_PX, 3)
    first, second = np.split(pixels, 2)
    assert (first == second).all()  # the same picture and seed
    for start, end in ((0, 2), (2, 8), (8, 14)):  # input, views, mesh: none is empty
        assert first[:, start * VIEW_PX : end * VIEW_PX].std() > 5


def test_steps_guidance_and_kind_of_file_are_chosen(
    tmp_path: Path, tiny_bundle: Path, object_png: Path
) -> None:
    def drawn(name: str, *options: object) -> np.ndarray:
        sheet = tmp_path / name
        arguments = ["gallery", "--bundle", tiny_bundle, "--out", sheet, *options, object_png]
        done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        return np.asarray(Image.open(sheet).convert("RGB")).astype(int)

    few = drawn("few.png", "--steps", 2, "--guidance", 1)
    assert (few != drawn("more.png", "--steps", 3, "--guidance", 4)).any()
    assert np.abs(drawn("few.webp", "--steps", 2, "--guidance", 1) - few).mean() < 8  # it is lossy


def test_a_kind_of_file_that_nobody_writes(tmp_path: Path, tiny_bundle: Path, object_png: Path) -> None:
    sheet = tmp_path / "sheet.mesh"
    done = CliRunner().invoke(
        cli, ["gallery", "--bundle", str(tiny_bundle), "--out", str(sheet), str(object_png)]
    )
    assert done.exit_code == 1 and "name a .png or .webp file" in done.output
    assert " s\n" not in done.output  # before any work


def test_mistakes_are_told_in_a_line(tmp_path: Path, tiny_bundle: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("nothing", encoding="utf-8")
    sheet = tmp_path / "sheet.png"
    done = CliRunner().invoke(cli, ["gallery", "--bundle", str(tiny_bundle), "--out", str(sheet), str(text)])
    assert done.exit_code == 1 and done.output.startswith("Error: ") and "text.png" in done.output
    assert not sheet.exists()
