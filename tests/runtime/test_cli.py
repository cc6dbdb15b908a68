"""`uc3d-rt` from arguments to files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from tests.conftest import FAST_OPTIONS as FAST
from tests.conftest import CliRun
from uc3d_rt import errors, pipeline, stage_clock
from uc3d_rt.cli import StageBars, command

Run = Callable[..., tuple[int, str, str]]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_main_job(glb_run: Callable[[str], CliRun]) -> None:
    run = glb_run("atlas")
    assert run.code == 0, run.stderr
    assert run.stdout == ""
    assert names(run.folder) == ["m.glb", "views"]
    views = run.folder / "views"
    assert names(views) == [f"{kind}_{i}.png" for kind in ("color", "normal") for i in range(6)]
    with Image.open(views / "normal_0.png") as normal:
        assert normal.size == (64, 64)
        assert normal.getpixel((0, 0)) == (128, 128, 128)  # background normals are mid-grey
    mesh = trimesh.load(run.folder / "m.glb", force="mesh")
    mesh.merge_vertices(merge_tex=True, merge_norm=True)  # seams of the atlas
    assert mesh.is_watertight and mesh.volume > 0
    lines = run.stderr.strip().splitlines()
    assert all(stage in lines[-2] for stage in stage_clock.STAGES) and "total" in lines[-2]
    assert lines[-1].startswith("wrote ")


def test_same_seed_same_bytes(
    tmp_path: Path, object_png: Path, tiny_bundle: Path, run_cli: Run, glb_run: Callable[[str], CliRun]
) -> None:
    again = tmp_path / "again.glb"
    code, _, err = run_cli(object_png, "-o", again, "--bundle", tiny_bundle, "--seed", "0", "--quiet", *FAST)
    assert (code, err) == (0, "")
    assert again.read_bytes() == (glb_run("atlas").folder / "m.glb").read_bytes()


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("m.ply", "ply", ("--texture", "vertex")),
        ("m.obj", "obj", ()),
        ("mesh", "glb", ("--texture", "vertex", "--format", "glb")),
    ],
)
def test_formats(
    name: str,
    kind: str,
    options: tuple[str, ...],
    tmp_path: Path,
    object_png: Path,
    tiny_bundle: Path,
    run_cli: Run,
) -> None:
    code, _, err = run_cli(object_png, "-o", tmp_path / name, "--bundle", tiny_bundle, *options, *FAST)
    assert code == 0, err
    mesh = trimesh.load(tmp_path / name, file_type=kind, force="mesh")
    assert len(mesh.faces) > 100


def test_an_existing_file_is_replaced_whole(
    tmp_path: Path, object_png: Path, tiny_bundle: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "m.glb"
    target.write_bytes(b"precious")

    def fail(*_: object, **__: object) -> None:
        raise errors.FitError("no surface")

    monkeypatch.setattr("uc3d_rt.neus.fit.fit", fail)
    views = tmp_path / "views"
    code, _, err = run_cli(
        object_png, "-o", target, "--views", views, "--bundle", tiny_bundle, "--quiet", *FAST
    )
    assert code == errors.FitError.exit_code and err == "error: no surface\n"
    assert target.read_bytes() == b"precious"
    assert len(names(views)) == 12  # the views were made before: they stay


def test_doubts_reach_the_user_even_when_quiet(tmp_path: Path, tiny_bundle: Path, run_cli: Run) -> None:
    rgba = np.zeros((60, 60, 4), np.uint8)
    rgba[20:40, 20:40] = (200, 30, 30, 255)
    Image.fromarray(rgba).save(tmp_path / "small.png")
    code, _, err = run_cli(
        tmp_path / "small.png",
        "-o",
        tmp_path / "m.ply",
        "--bundle",
        tiny_bundle,
        "--quiet",
        *FAST,
        "--texture",
        "vertex",
    )
    assert code == 0
    assert err.splitlines() == [
        "warning: the object is only 20 px wide; a larger picture gives a sharper result"
    ]


def test_interrupted(
    tmp_path: Path, object_png: Path, tiny_bundle: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("uc3d_rt.neus.fit.fit", interrupt)
    code, _, err = run_cli(object_png, "-o", tmp_path / "m.glb", "--bundle", tiny_bundle, "--quiet", *FAST)
    assert code == 130 and err.strip() == "interrupted"
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_control_c_in_a_process_of_its_own(tmp_path: Path, object_png: Path, tiny_bundle: Path) -> None:
    arguments = [str(object_png), "-o", str(tmp_path / "m.glb"), "--bundle", str(tiny_bundle)]
    running = subprocess.Popen(
        [sys.executable, "-m", "uc3d_rt.cli", *arguments, "--views", str(tmp_path / "views")],
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts its background jobs with SIGINT ignored, and they hand that on to us.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "views" / "normal_5.png").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    # Python itself dies of the signal where it struck in code that is run from a string.
    assert running.returncode in (130, -signal.SIGINT) and "Traceback" not in err
    assert names(tmp_path) == ["views"]


def test_an_unexpected_error_is_one_line(
    tmp_path: Path, object_png: Path, tiny_bundle: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr("uc3d_rt.neus.fit.fit", fail)
    code, _, err = run_cli(object_png, "-o", tmp_path / "m.glb", "--bundle", tiny_bundle, "--quiet", *FAST)
    assert code == 1
    assert err == "error: unexpected RuntimeError: first second; run again with --debug and report it\n"


def test_help_names_every_option(run_cli: Run) -> None:
    code, out, _ = run_cli("--help")
    assert code == 0
    for parameter in command.params:
        assert any(name in out for name in (*parameter.opts, parameter.human_readable_name))


@pytest.mark.parametrize(
    "given, expected",
    [
        ((), {}),
        (("--low-memory",), {"low_memory": "unet"}),
        (("--low-memory", "least"), {"low_memory": "least"}),
        (("--deterministic",), {"deterministic": True}),
        (("--fit-device", "cuda", "--mesh-device", "cuda"), {"fit_device": "cuda", "mesh_device": "cuda"}),
        (("--precision", "fp8"), {"precision": "fp8"}),
    ],
)
def test_options_reach_the_pipeline(
    run_cli: Run, object_png: Path, tmp_path: Path, given: tuple[str, ...], expected: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    usual: dict[str, object] = {
        "fit_device": None, "mesh_device": None, "low_memory": "off", "deterministic": False,
        "precision": "auto",
    }  # fmt: skip
    heard: list[dict[str, object]] = []

    def told(*_: object, **options: object) -> None:
        heard.append(options)
        raise errors.UsageError("enough")

    monkeypatch.setattr(pipeline.Pipeline, "from_bundle", told)
    code, _, err = run_cli(object_png, "-o", tmp_path / "m.glb", *given)
    assert code == errors.UsageError.exit_code and err == "error: enough\n" and heard == [usual | expected]


def test_version(run_cli: Run) -> None:
    from importlib.metadata import version

    assert run_cli("--version") == (0, f"uc3d-rt {version('uc3d-rt')}\n", "")


def test_bars_are_drawn_only_when_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (False, True):
        with StageBars(shown) as bars:
            for stage, total in (("encode", 1), ("diffuse", 3)):
                for done in range(total + 1):
                    bars.update(stage, done, total)
            bars.say("warning: a doubt")
        err = capsys.readouterr().err
        assert "warning: a doubt" in err.splitlines()
        assert ("diffuse" in err) is shown


@pytest.mark.parametrize(("given", "wanted"), [((), None), (("--mirror",), True), (("--no-mirror",), False)])
def test_the_mirror_image_is_the_bundles_choice_or_the_users(
    given: tuple[str, ...], wanted: bool | None, tmp_path: Path, object_png: Path, tiny_bundle: Path,
    run_cli: Run, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    heard: list[object] = []

    def views(self: pipeline.Pipeline, image: Path, **options: object) -> None:
        heard.append(options["mirror"])
        raise errors.UsageError("enough")

    monkeypatch.setattr(pipeline.Pipeline, "views", views)
    code, _, err = run_cli(object_png, "-o", tmp_path / "m.glb", "--bundle", tiny_bundle, *given)
    assert (code, err, heard) == (errors.UsageError.exit_code, "error: enough\n", [wanted])
