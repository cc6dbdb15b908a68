"""`python -m train evaluate --protocol …`: what each measures, writes, and refuses."""

import csv
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import trimesh
from click.testing import CliRunner, Result
from PIL import Image

from train.__main__ import cli
from train.evaluate import _workers
from train.evaluator import gallery_pictures
from train.protocols import EvaluateOptions
from train.viewpoint_report import viewpoint_markdown, viewpoint_summary
from uc3d_rt.errors import FitError, UsageError
from uc3d_rt.mesh.build import MeshOptions
from uc3d_rt.neus.fit_plan import FitOptions
from uc3d_rt.pipeline import Pipeline, Views
from uc3d_rt.pipeline import Result as PipelineResult


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a box and a taller one, and an `index.csv` beside it."""
    root = tmp_path_factory.mktemp("objects")
    for name, sides in (("low", (1.0, 0.6, 0.4)), ("tall", (0.4, 1.0, 0.5))):
        mesh = trimesh.creation.box(sides)
        mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=np.full((8, 4), (200, 60, 40, 255)))
        (root / "val").mkdir(exist_ok=True)
        mesh.export(root / "val" / f"{name}.glb")
    (root / "index.csv").write_text(
        "id,category,attribution\nlow,boxes,Kenney\ntall,boxes,own scans\n", encoding="utf-8"
    )
    return root / "val"


def run(*arguments: object) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        for module in ("train.evaluator", "train.text"):
            patch.setattr(f"{module}.FitOptions", partial(FitOptions, resolution=32, iterations=(5,)))
            patch.setattr(f"{module}.MeshOptions", partial(MeshOptions, faces=800, texture_px=64))
        return CliRunner().invoke(cli, ["evaluate", *map(str, arguments), "--steps", "2"])


def summary_of(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text("utf-8"))


class Page(HTMLParser):
    """The pictures, cards and sorting of a gallery."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.pictures: list[str] = []
        self.cards: list[dict[str, str | None]] = []
        self.choices: list[str | None] = []
        self.open: list[str] = []
        self.feed(path.read_text("utf-8"))
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "img":
            self.pictures.append(str(given["src"]))
        elif tag == "article":
            self.cards.append(given)
        elif tag == "option":
            self.choices.append(given["value"])
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize(
    ("protocol", "filled", "empty"),
    [
        ("views", {"psnr", "ssim", "silhouette_iou"}, {"normal_deg", "normal_true_deg", "chamfer"}),
        ("normals", {"normal_deg", "normal_median_deg", "normal_true_within_11"}, {"psnr", "chamfer"}),
        ("mesh", {"chamfer", "volume_iou"}, {"psnr", "normal_deg"}),
    ],
)
def test_each_protocol_measures_its_own(
    tmp_path: Path, tiny_bundle: Path, objects: Path, protocol: str, filled: set[str], empty: set[str]
) -> None:
    out = tmp_path / "out"
    result = run("--bundle", tiny_bundle, "--objects", objects, "--out", out, "--protocol", protocol)
    assert result.exit_code == 0, result.output
    summary = summary_of(out)
    for row in ("model", "input", "ceiling"):
        assert all(summary["rows"][row][name] is not None for name in filled)
        assert all(summary["rows"][row][name] is None for name in empty)
    assert set(summary["breakdowns"]["making"]) == {"scanned", "stylised"}
    assert set(summary["left_out_metrics"]) == ({"lpips"} if protocol == "views" else set())
    text = (out / "metrics.md").read_text("utf-8")
    assert ("Left out: LPIPS" in text) == (protocol == "views")
    page = Page(out / "gallery.html")
    assert len(page.cards) == 2 and set(page.choices) >= {"worst", "best"}
    assert page.pictures and all((out / name).is_file() for name in page.pictures)


def test_gallery_begins_with_the_worst(tmp_path: Path, tiny_bundle: Path, objects: Path) -> None:
    out = tmp_path / "out"
    given = ("--bundle", tiny_bundle, "--objects", objects, "--out", out, "--protocol", "views")
    assert run(*given).exit_code == 0
    for name, psnr in (("low", 30.0), ("tall", 20.0)):
        path = out / "objects" / f"{name}.json"
        record = json.loads(path.read_text("utf-8"))
        record["rows"]["model"]["psnr"] = psnr
        path.write_text(json.dumps(record), encoding="utf-8")
    assert run(*given).exit_code == 0
    assert [card["data-psnr"] for card in Page(out / "gallery.html").cards] == ["20.0", "30.0"]


def test_viewpoints(tmp_path: Path, tiny_bundle: Path, objects: Path) -> None:
    out = tmp_path / "out"
    given = ("--bundle", tiny_bundle, "--objects", objects, "--out", out, "--protocol", "viewpoint")
    result = run(*given, "--azimuths", 2, "--limit", 1)
    assert result.exit_code == 0, result.output
    summary = summary_of(out)
    assert summary["pairs_of_views"] == 1 and len(summary["by_azimuth"]) == 2
    agreement = summary["agreement"]
    # The box is the same from behind, so true views agree to the bit, and so does what is made of them.
    assert agreement["truth"]["psnr"] > 40 and agreement["truth"]["chamfer"] < 0.02
    assert agreement["truth"]["volume_iou"] == 1.0
    assert summary["rows"]["model"]["chamfer"] is not None
    assert summary["spread"]["input"]["psnr"] < 3
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.height == 2 * 2 * 80  # a line an azimuth
    again = run(*given, "--azimuths", 4, "--limit", 1)
    assert again.exit_code == 1 and "azimuths: [2] there, [4] now" in again.output


def made_pictures(folder: Path, names: Sequence[str]) -> Path:
    """Discs of two colours with prompts."""
    folder.mkdir()
    v, u = np.mgrid[-1:1:64j, -1:1:64j]
    for number, name in enumerate(names):
        rgba = np.zeros((64, 64, 4), np.uint8)
        rgba[..., :3] = [200, 60, 40] if number % 2 else [40, 90, 180]
        rgba[..., 3] = 255 * (np.hypot(u, v) < 0.7)
        Image.fromarray(rgba).save(folder / name)
    with (folder / "prompts.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("file", "prompt"), *((name, f"a disc, {name}") for name in names)])
    return folder


def test_pictures_of_prompts(tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The road of Table 2, with distances in closed form in the networks' place."""

    def distance_of_means(images: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> float:
        assert images[0].dtype == truth[0].dtype == np.uint8
        assert len(truth) == 2 and len(images) == 12
        return float(np.linalg.norm(np.mean(images, (0, 1, 2)) - np.mean(truth, (0, 1, 2))))

    def brightness(images: Sequence[np.ndarray], texts: Sequence[str]) -> list[float]:
        assert all(text.startswith("a disc, ") for text in texts)
        return [float(image.mean()) / 255 for image in images]

    monkeypatch.setattr("train.text.frechet_distance", lambda path, device: distance_of_means)
    monkeypatch.setattr("train.text.clip_score", lambda path, device: brightness)
    pictures, out = made_pictures(tmp_path / "pictures", ["blue.png", "red.png"]), tmp_path / "out"
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "inception.pth").write_bytes(b"")
    given = ("--bundle", tiny_bundle, "--pictures", pictures, "--out", out, "--protocol", "text")
    result = run(*given, "--fid-weights", weights / "inception.pth", "--clip", weights)
    assert result.exit_code == 0, result.output
    rows = summary_of(out)["rows"]
    assert set(rows) == {"views", "mesh", "pictures"} and "fid" not in rows["pictures"]
    with (
        Image.open(out / "scored" / "blue" / "views.png") as a,
        Image.open(out / "scored" / "red" / "views.png") as b,
    ):
        bright = [np.asarray(image.convert("RGB")).mean() / 255 for image in (a, b)]
    assert rows["views"]["clip"] == pytest.approx(np.mean(bright), rel=1e-6)
    assert rows["views"]["fid"] > 0 and "FID" in (out / "metrics.md").read_text("utf-8")
    assert len(Page(out / "gallery.html").cards) == 2
    # Without weights both are left out by name, and nothing is made again.
    result = run(*given)
    assert result.exit_code == 0 and "[1/" not in result.output
    assert set(summary_of(out)["left_out_metrics"]) == {"fid", "clip"}


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        (None, "prompts.csv is missing"),
        ("file,words\nblue.png,x\n", "it needs file and prompt"),
        ("file,prompt\nred.png,a thing\n", "there is no picture 'red.png'"),
        ("file,prompt\nblue.png,\n", "blue.png needs one prompt"),
        ("file,prompt\nblue.png,a thing, blue\n", "in quotes if it has a comma"),
        ("file,prompt\n/blue.png,a thing\n", "is outside of"),
        ("file,prompt\n../pictures/blue.png,a thing\n", "is outside of"),
        ('file,prompt\nblue.png,"a thing\n', "unexpected end of data"),
        (b"file,prompt\nblue.png,caf\xe9\n", "write it as UTF-8"),
        ("file,prompt\nblue.png,a\nblue.png,b\n", "there twice"),
        ("file,prompt\n", "names no pictures"),
    ],
)
def test_prompts_that_do_not_fit(
    tmp_path: Path, tiny_bundle: Path, prompts: str | bytes | None, told: str
) -> None:
    pictures = made_pictures(tmp_path / "pictures", ["blue.png"])
    (pictures / "prompts.csv").unlink()
    if prompts is not None:
        (pictures / "prompts.csv").write_bytes(prompts if isinstance(prompts, bytes) else prompts.encode())
    result = run(
        "--bundle", tiny_bundle, "--pictures", pictures, "--out", tmp_path / "o", "--protocol", "text"
    )
    assert result.exit_code == 1 and told in result.output and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--protocol", "text"], "takes --pictures"),
        (["--azimuths", "4"], "--azimuths is for --protocol viewpoint"),
        (["--protocol", "mesh", "--no-mesh"], "measures nothing without meshes"),
        (["--clip", "."], "for --protocol text"),
        (["--protocol", "normals", "--lpips-weights", __file__], "has no LPIPS"),
        (["--protocol", "views", "--lpips-weights", __file__], "test_protocols.py"),
        (["--protocol", "views", "--workers", "2", "--lpips-weights", __file__], "test_protocols.py"),
        (["--protocol", "viewpoint", "--index", "index.npz"], "leave out --train-objects and --index"),
        (["--train-objects", str(Path(__file__).parent)], "holds no object"),
        (["--device", "gpu"], "unknown device"),
    ],
)
def test_options_that_do_not_fit(
    tmp_path: Path, tiny_bundle: Path, objects: Path, more: list[str], told: str
) -> None:
    result = run("--bundle", tiny_bundle, "--objects", objects, "--out", tmp_path / "o", *more)
    assert result.exit_code in (1, 2) and told in result.output
    assert "Traceback" not in result.output and not (tmp_path / "o").exists()


def test_what_was_left_out_is_tried_again(tmp_path: Path, tiny_bundle: Path, objects: Path) -> None:
    folder, out = tmp_path / "objects", tmp_path / "out"
    folder.mkdir()
    (folder / "low.glb").write_bytes(b"glTF")
    given = ("--bundle", tiny_bundle, "--objects", folder, "--out", out, "--protocol", "views")
    result = run(*given)
    assert result.exit_code == 1 and "none of 1 objects could be measured" in result.output
    assert "Left out: object low" in (out / "metrics.md").read_text("utf-8")
    (folder / "low.glb").write_bytes((objects / "low.glb").read_bytes())
    result = run(*given)
    assert result.exit_code == 0, result.output
    assert summary_of(out)["objects"] == 1 and not summary_of(out)["left_out_objects"]


def test_an_out_of_something_else_is_refused(tmp_path: Path, tiny_bundle: Path, objects: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for text in ("[1]", "no JSON"):
        (out / "settings.json").write_text(text, encoding="utf-8")
        result = run("--bundle", tiny_bundle, "--objects", objects, "--out", out, "--protocol", "views")
        assert result.exit_code == 1 and "give another --out" in result.output
    assert [path.name for path in out.iterdir()] == ["settings.json"]


def test_pictures_of_two_objects_never_meet(tmp_path: Path) -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    first = gallery_pictures(tmp_path, "a", {"true mesh": picture}, px=2)
    second = gallery_pictures(tmp_path, "a_true", {"mesh": picture}, px=2)
    assert first[0][1] != second[0][1]
    assert (tmp_path / first[0][1]).is_file() and (tmp_path / second[0][1]).is_file()


def test_lpips_stands_beside_the_others(
    tmp_path: Path, tiny_bundle: Path, objects: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def distance(path: Path, device: str = "cpu") -> Callable[[np.ndarray, np.ndarray], float]:
        return lambda images, truth: float(np.abs(images - truth).mean())

    for module in ("train.evaluate", "train.evaluator"):
        monkeypatch.setattr(f"{module}.lpips_metric", distance)
    weights, out = tmp_path / "alexnet.pth", tmp_path / "out"
    weights.write_bytes(b"weights")
    given = ("--bundle", tiny_bundle, "--objects", objects, "--out", out, "--protocol", "views", "--limit", 1)
    assert run(*given, "--lpips-weights", weights).exit_code == 0
    summary = summary_of(out)
    assert summary["settings"]["lpips_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert 0.0 < summary["rows"]["input"]["lpips"] < 1.0 and not summary["left_out_metrics"]
    assert "LPIPS ↓" in (out / "metrics.md").read_text("utf-8")
    # Figures with other weights, or with none, do not stand in one table.
    assert "lpips_sha256" in run(*given).output


def test_a_picture_without_a_mesh_keeps_its_views(
    tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, seen = Pipeline.reconstruct, list[Views]()

    def reconstruct(self: Pipeline, views: Views, **options: object) -> PipelineResult:
        seen.append(views)
        if len(seen) == 1:
            raise FitError("no surface")
        return whole(self, views, **options)

    monkeypatch.setattr(Pipeline, "reconstruct", reconstruct)
    pictures, out = made_pictures(tmp_path / "pictures", ["blue.png", "red.png"]), tmp_path / "out"
    result = run("--bundle", tiny_bundle, "--pictures", pictures, "--out", out, "--protocol", "text")
    assert result.exit_code == 0, result.output
    assert summary_of(out)["no_mesh"] == {"blue": "no surface"}
    assert "No mesh: blue (no surface)" in (out / "metrics.md").read_text("utf-8")
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.size == (80 * (2 + 2 * 6), 2 * 2 * 80)


def test_the_mesh_of_a_picture_is_scored_unlit(tmp_path: Path, tiny_bundle: Path) -> None:
    """Its colours come from the views, whose light is in them: no second light darkens them."""
    pictures, out = made_pictures(tmp_path / "pictures", ["blue.png"]), tmp_path / "out"
    result = run("--bundle", tiny_bundle, "--pictures", pictures, "--out", out, "--protocol", "text")
    assert result.exit_code == 0, result.output
    strips = []
    for kind in ("views", "mesh"):
        with Image.open(out / "scored" / "blue" / f"{kind}.png") as strip:
            strips.append(np.asarray(strip).astype(float))
    both = (strips[0].min(axis=-1) < 250) & (strips[1].min(axis=-1) < 250)
    assert both.mean() > 0.1
    assert strips[1][both].mean() == pytest.approx(strips[0][both].mean(), rel=0.03)


def test_inputs_whose_views_never_meet() -> None:
    row = {"psnr": 20.0}
    record = {
        "name": "cup", "seconds": 1.0,
        "pairs_of_views": 0, "agreement": {"model": {}, "input": {}, "truth": {}},
        "rows": {"model": row, "input": row}, "spread": {"model": {"psnr": 1.0}, "input": {"psnr": 2.0}},
        "by_azimuth": [{"azimuth_deg": 72.0 * k, "psnr": 18.0 + k} for k in range(5)],
        "stand_ins": {"azimuths": {"144": "no surface", "72": "no surface"}},
    }  # fmt: skip
    settings = {
        "bundle": "b", "profile": "p", "steps": 50, "guidance": 3.0, "seed": 0, "image_px": 256,
        "azimuths": 5, "meshes": False,
    }  # fmt: skip
    summary = viewpoint_summary({"cup": record, "leaf": {"left_out": "thin"}}, settings, {}, {})
    text = viewpoint_markdown(summary)
    assert "no two of 5 azimuths" in text and "Agreement between inputs" not in text
    assert "| 216° | 21.00 |" in text and "object leaf (thin)" in text
    assert "from 72°, 144°" in text and "| model, spread | 1.00 |" in text


def test_a_worker_that_dies_is_told(tmp_path: Path, tiny_bundle: Path, objects: Path) -> None:
    options = EvaluateOptions(tiny_bundle, objects, tmp_path, workers=2)
    with (
        pytest.raises(UsageError, match="--workers below 2"),
        _workers(options, None) as run_all,
    ):
        list(run_all(os._exit, [1]))


KILLED_PARENT = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from train.evaluate import end_with_parent

def work(folder):
    (Path(folder) / f"{os.getpid()}.pid").touch()
    time.sleep(120)

if __name__ == "__main__":
    pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), initializer=end_with_parent)
    for _ in range(2):
        pool.submit(work, sys.argv[1])
    time.sleep(120)
"""


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(KILLED_PARENT)
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)])
    try:
        workers = within(
            60, lambda: [int(path.stem) for path in tmp_path.glob("*.pid")], lambda w: len(w) == 2
        )
        assert all(alive(worker) for worker in workers)
    finally:
        parent.kill()
        parent.wait()
    assert within(10, lambda: [w for w in workers if alive(w)], lambda left: not left) == []


def within(seconds: float, look: Callable[[], list[int]], done: Callable[[list[int]], bool]) -> list[int]:
    """What `look` gives once `done` with it, or at the end of that time."""
    end = time.monotonic() + seconds
    while not done(found := look()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # one that has ended and is not waited for
