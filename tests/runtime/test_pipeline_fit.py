"""A pipeline whose fit runs on a device, what it keeps and gives back, and pipelines side by side."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import trimesh
from click.testing import CliRunner
from scipy.spatial import KDTree

from benchmarks import pipeline as benchmark
from tests.conftest import SEMI_AXES, ellipsoid_views, object_rgba
from tests.runtime.host_device import OpenDevice
from uc3d_rt.errors import BackendError, FitError, UsageError
from uc3d_rt.mesh.build import MeshOptions
from uc3d_rt.neus.fit_plan import FitOptions
from uc3d_rt.pipeline import Pipeline, Result, Views

FAST = FitOptions(resolution=32, iterations=(4, 4), blurred_iterations=(4, 4))
SMALL = MeshOptions(faces=500, texture_px=64)


@pytest.fixture(scope="module")
def views() -> Views:
    return Views(*ellipsoid_views(64))


def made(pipeline: Pipeline, views: Views) -> Result:
    return pipeline.reconstruct(views, fit_options=FAST, mesh_options=SMALL)


def digest(result: Result) -> str:
    return hashlib.sha256(result.mesh.export(file_type="glb")).hexdigest()


@pytest.mark.parametrize("mesh_device", ["cpu", "cuda"])
def test_a_device_gives_the_mesh_of_the_cpu(
    tiny_bundle: Path, devices: list[OpenDevice], views: Views, mesh_device: str
) -> None:
    def mesh_of(fit_device: str, mesh_device: str = "cpu") -> trimesh.Trimesh:
        pipeline = Pipeline.from_bundle(tiny_bundle, fit_device=fit_device, mesh_device=mesh_device)
        colored = MeshOptions(texture="vertex", faces=0)
        return pipeline.reconstruct(views, fit_options=FAST, mesh_options=colored).mesh

    here = mesh_of("cpu")
    assert not devices  # none was asked for
    there = mesh_of("cuda", mesh_device)
    assert len(devices) == 1 and devices[0].closed
    np.testing.assert_allclose(here.extents, 2 * SEMI_AXES, atol=0.1)
    np.testing.assert_allclose(there.bounds, here.bounds, atol=0.02)
    assert there.volume == pytest.approx(here.volume, rel=0.02)
    distance, nearest = KDTree(here.vertices).query(there.vertices)
    assert distance.mean() < 0.01
    levels = [mesh.visual.vertex_colors.astype(float) for mesh in (there, here)]
    assert np.abs(levels[0] - levels[1][nearest]).mean() < 4


def test_within_with_one_device_serves_all_pictures(
    tiny_bundle: Path, devices: list[OpenDevice], views: Views
) -> None:
    pipeline = Pipeline.from_bundle(tiny_bundle, fit_device="cuda")
    with pipeline:
        results = [made(pipeline, views) for _ in range(3)]
        assert len(devices) == 1 and not devices[0].closed and devices[0].live == 0
    assert devices[0].closed and len({digest(result) for result in results}) == 1
    assert digest(made(pipeline, views)) == digest(results[0])  # it works on, and opens its own again
    assert len(devices) == 2 and devices[1].closed


def test_the_fit_takes_the_gpu_of_its_number(
    tiny_bundle: Path, devices: list[OpenDevice], views: Views
) -> None:
    for name, ordinal in (("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)):
        made(Pipeline.from_bundle(tiny_bundle, fit_device=name), views)
        assert devices[-1].ordinal == ordinal


def test_low_memory_keeps_no_device(tiny_bundle: Path, devices: list[OpenDevice], views: Views) -> None:
    with Pipeline.from_bundle(tiny_bundle, fit_device="cuda", low_memory=True) as pipeline:
        for _ in range(2):
            made(pipeline, views)
    assert len(devices) == 2 and all(device.closed for device in devices)


@pytest.mark.parametrize("kernel", ["print_nodes", "adam_step", "refine", "continue_step", "blend_texels"])
def test_a_device_that_fails_gives_its_memory_back(
    tiny_bundle: Path, devices: list[OpenDevice], views: Views, kernel: str
) -> None:
    with Pipeline.from_bundle(tiny_bundle, fit_device="cuda", mesh_device="cuda") as pipeline:
        first = digest(made(pipeline, views))
        devices[0].fails_at = kernel
        with pytest.raises(BackendError, match="no memory left"):
            made(pipeline, views)
        assert devices[0].live == 0
        devices[0].fails_at = ""
        assert digest(made(pipeline, views)) == first
    assert len(devices) == 1 and devices[0].closed


def test_what_ends_a_fit_gives_memory_back(
    tiny_bundle: Path, devices: list[OpenDevice], views: Views
) -> None:
    apart = np.zeros_like(views.normal)
    apart[:, :20, :20], apart[1::2] = views.normal[:, 22:42, 22:42], 0.0
    apart[1::2, -20:, -20:] = views.normal[1::2, 22:42, 22:42]  # no volume in common

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "fit" and done == 2:
            raise KeyboardInterrupt

    with Pipeline.from_bundle(tiny_bundle, fit_device="cuda") as pipeline:
        with pytest.raises(FitError, match="no volume in common"):
            made(pipeline, Views(views.color, apart))
        assert devices[0].live == 0
        with pytest.raises(KeyboardInterrupt):
            pipeline.reconstruct(views, fit_options=FAST, on_progress=stop)
        assert devices[0].live == 0


def test_the_fit_goes_where_the_networks_go_unless_told(tiny_bundle: Path) -> None:
    assert Pipeline.from_bundle(tiny_bundle).fit_device == "cpu"
    for name in ("gpu", "cpu:1", "cuda:", "cuda:x", "cuda:-1", "auto"):
        with pytest.raises(UsageError, match=f"unknown device '{name}'; choose cpu, cuda, or cuda:N"):
            Pipeline.from_bundle(tiny_bundle, fit_device=name)


def test_the_mesh_is_made_on_the_cpu_or_where_the_fit_runs(
    tiny_bundle: Path, devices: list[OpenDevice]
) -> None:
    assert Pipeline.from_bundle(tiny_bundle, fit_device="cuda").mesh_device == "cuda"
    assert Pipeline.from_bundle(tiny_bundle).mesh_device == "cpu"
    for fit_device, mesh_device in (("cpu", "cuda"), ("cuda", "cuda:1"), ("cuda", "gpu")):
        with pytest.raises(UsageError, match="on the CPU or where the fit runs"):
            Pipeline.from_bundle(tiny_bundle, fit_device=fit_device, mesh_device=mesh_device)


def test_pipelines_side_by_side_give_what_each_gives_alone(tiny_bundle: Path) -> None:
    def run(seed: int) -> str:
        pipeline = Pipeline.from_bundle(tiny_bundle, threads=1)
        return digest(pipeline(object_rgba(), seed=seed, fit_options=FAST, mesh_options=SMALL))

    alone = [run(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(run, range(3)))
    assert together == alone and len(set(alone)) == 3


def test_every_kind_of_picture_gives_the_same(tiny_bundle: Path, object_png: Path) -> None:
    from PIL import Image

    pipeline = Pipeline.from_bundle(tiny_bundle, threads=1)
    with Image.open(object_png) as picture:
        given = (object_png, str(object_png), picture.copy(), np.asarray(picture))
    found = [pipeline.views(one, steps=2) for one in given]
    for other in found[1:]:
        np.testing.assert_array_equal(other.color, found[0].color)
        np.testing.assert_array_equal(other.normal, found[0].normal)


def test_the_benchmark_of_all_stages(
    tiny_bundle: Path, object_png: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It passes what is right, and fails when a picture's mesh is not the one it was."""
    whole = Pipeline.__call__
    seeds = [0, 0]

    def quick(self: Pipeline, image: Path, steps: int | None = None) -> Result:
        return whole(self, image, steps=steps, seed=seeds.pop(), fit_options=FAST, mesh_options=SMALL)

    monkeypatch.setattr(Pipeline, "__call__", quick)
    arguments = [str(object_png), "--bundle", str(tiny_bundle), "--runs", "1", "--out", str(tmp_path)]
    arguments += ["--low-memory", "least", "--poll"]
    done = CliRunner().invoke(benchmark.main, arguments)
    assert done.exit_code == 0, done.output
    rows = {line.split()[0]: line for line in done.output.splitlines() if " s  (" in line}
    assert set(rows) == {"preprocess", "encode", "diffuse", "decode", "fit", "mesh", "all"}
    assert (tmp_path / f"{object_png.stem}.glb").is_file()
    seeds = [1, 0]
    done = CliRunner().invoke(benchmark.main, arguments)
    assert done.exit_code == 1 and "another mesh than before" in done.output
