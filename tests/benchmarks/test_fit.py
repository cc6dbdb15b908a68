"""The fit's benchmark gives the same figures from objects and from a file of their views."""

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
import trimesh

from benchmarks import fit as benchmark
from benchmarks.ground_truth import GroundTruth, chosen, load_truths, rendered_truth, save_truths
from train.mesh_metrics import chamfer, chamfer_to_points
from train.objects import load_object
from uc3d_rt.neus.fit_plan import FitOptions

COARSE = ("--resolution", "32")


@pytest.fixture(autouse=True)
def little_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    few = partial(FitOptions, iterations=(5, 5), blurred_iterations=(2, 2), rays_per_iteration=2000)
    monkeypatch.setattr(benchmark, "FitOptions", few)
    torch.set_num_threads(1)
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    yield
    numba.set_num_threads(before)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objects")
    colors = np.array([[200, 40, 40, 255], [40, 40, 200, 255]], np.uint8)
    box = trimesh.creation.box((0.8, 1.0, 0.5))
    trimesh.Trimesh(box.vertices, box.faces, vertex_colors=colors[np.arange(8) % 2]).export(
        folder / "box.glb"
    )
    return folder


@pytest.fixture(scope="module")
def truth(objects: Path) -> GroundTruth:
    return rendered_truth(objects / "box.glb", 48)


def run(*arguments: str | Path) -> int:
    before = sys.argv
    sys.argv = ["fit.py", *map(str, arguments)]
    try:
        return benchmark.main()
    finally:
        sys.argv = before


def test_a_file_of_views_gives_the_figures_of_the_objects(objects: Path, tmp_path: Path) -> None:
    views = tmp_path / "views.npz"
    size = ("--size", "48")
    assert run("--objects", objects, *size, "--save-views", views) == 0
    assert run("--objects", objects, *size, *COARSE, "--out", tmp_path / "a") == 0
    assert run("--views", views, *COARSE, "--out", tmp_path / "b") == 0
    a, b = (json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in "ab")
    timed = {"fit_s", "mesh_s"}
    assert [{k: v for k, v in row.items() if k not in timed} for row in a] == [
        {k: v for k, v in row.items() if k not in timed} for row in b
    ]
    assert a[0]["iou"] > 0.9 and 0.0 < a[0]["chamfer"] < 0.05 and a[0]["closed"]


def test_networks_are_measured_beside(
    truth: GroundTruth, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_truths([truth], tmp_path / "views.npz")
    few = ("--reference-iterations", "1", "--reference-rays", "16", "--reference-samples", "4")
    small = ("--reference-width", "48")
    run("--views", tmp_path / "views.npz", "--peers", *COARSE, *few, *small, "--out", tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["by"] for row in results["rows"]] == ["fit-cpu", "networks", "networks-our-mesh"]
    ours, networks, other = (results["means"][row["by"]] for row in results["rows"])
    assert ours["iterations"] == 14 and networks["iterations"] == other["iterations"] == 1
    assert ours["iou"] > networks["iou"] > 0.2  # a sphere
    assert networks["fit_s_median"] == other["fit_s_median"] > 0.0
    printed = capsys.readouterr().out
    assert "1 iterations of 16 rays on CPU, fp32" in printed and "fit / fit-cpu's" in printed


def test_seeds_show_how_much_is_chance(
    truth: GroundTruth, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_truths([truth], tmp_path / "views.npz")
    run("--views", tmp_path / "views.npz", *COARSE, "--seeds", "3", "--out", tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows, found = results["rows"], results["means"]["seeds"]
    assert [row["by"] for row in rows] == [f"fit-cpu seed {seed}" for seed in range(3)]
    assert len({row["chamfer"] for row in rows}) == 3  # each with a seed of its own
    for key in ("iou", "normal_deg", "chamfer"):
        values = [row[key] for row in rows]
        assert found[key] == pytest.approx(np.mean(values))
        assert found[f"{key}_sd"] == pytest.approx(np.std(values, ddof=1))
    assert "3 seeds: IoU" in capsys.readouterr().out
    run("--views", tmp_path / "views.npz", *COARSE, "--out", tmp_path / "one")
    one = json.loads((tmp_path / "one" / "results.json").read_text())
    assert one["rows"][0]["chamfer"] == rows[0]["chamfer"] and "seeds" not in one["means"]
    with pytest.raises(SystemExit):
        run("--views", tmp_path / "views.npz", "--seeds", "0")


def test_a_file_keeps_every_byte(truth: GroundTruth, tmp_path: Path) -> None:
    save_truths([truth] * 2, tmp_path / "views.npz")
    first, second = load_truths(tmp_path / "views.npz")
    for found in (first, second):
        assert (found.name, found.longest) == (truth.name, truth.longest)
        for name in ("color_bytes", "normal_bytes", "points"):
            assert np.array_equal(getattr(found, name), getattr(truth, name))
    assert len(list(load_truths(tmp_path / "views.npz", limit=1))) == 1


def test_reading_a_file_needs_no_renderer(truth: GroundTruth, tmp_path: Path) -> None:
    save_truths([truth], tmp_path / "views.npz")
    code = (
        "import sys; from pathlib import Path\n"
        "import benchmarks.fit; from benchmarks.ground_truth import load_truths\n"
        f"list(load_truths(Path({str(tmp_path / 'views.npz')!r})))\n"
        "print([name for name in ('warp', 'torch', 'train.render') if name in sys.modules])"
    )
    root = Path(benchmark.__file__).parents[1]
    environment = {"PYTHONPATH": f"{root}:{root / 'runtime'}", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="--save-views"):
        list(load_truths(tmp_path / "other.npz"))


def test_points_and_side_are_all_that_the_chamfer_distance_needs(objects: Path, truth: GroundTruth) -> None:
    thing = load_object(objects / "box.glb")
    mesh = trimesh.creation.icosphere(subdivisions=2, radius=0.6)
    wanted = chamfer(mesh, thing)
    assert chamfer_to_points(mesh, truth.surface_points, truth.longest) == pytest.approx(wanted, abs=1e-5)


def test_objects_are_the_first_or_evenly_spaced() -> None:
    assert chosen(100, 3, False).tolist() == [0, 1, 2]
    assert chosen(100, 4, True).tolist() == [0, 25, 50, 75]
    assert chosen(3, 50, True).tolist() == chosen(3, None, False).tolist() == [0, 1, 2]
