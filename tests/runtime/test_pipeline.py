"""The whole pipeline on the tiny bundle, and the order and shape of its calls on a fake backend."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import SEMI_AXES, TINY_SHAPE, ellipsoid_views, object_rgba
from uc3d_rt.backends.base import Backend, Network
from uc3d_rt.backends.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeNetwork
from uc3d_rt.contract import FOCAL_UNKNOWN, Manifest, load_manifest
from uc3d_rt.errors import FitError, UsageError
from uc3d_rt.neus.fit_plan import FitOptions
from uc3d_rt.pipeline import Pipeline, Result, Views, default_bundle
from uc3d_rt.stage_clock import STAGES

FAST = FitOptions(resolution=32, iterations=(4, 4), blurred_iterations=(4, 4))


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(tiny_bundle, threads=1)


@pytest.fixture(scope="module")
def result(pipeline: Pipeline) -> Result:
    return pipeline(object_rgba(), fit_options=FAST)


def test_one_call_gives_a_mesh_of_the_object(result: Result) -> None:
    mesh = result.mesh.copy()
    mesh.merge_vertices(merge_tex=True, merge_norm=True)  # seams of the atlas
    assert mesh.is_watertight and mesh.is_winding_consistent and mesh.volume > 0
    np.testing.assert_allclose(mesh.extents, 2 * SEMI_AXES, atol=0.15)
    np.testing.assert_allclose(mesh.bounds.mean(axis=0), 0.0, atol=0.08)
    assert result.notes == ()
    assert tuple(result.timings) == STAGES and min(result.timings.values()) >= 0.0


def test_views_are_what_the_networks_drew(result: Result) -> None:
    color, normal = ellipsoid_views(TINY_SHAPE.image_px)
    views = result.views
    assert views.color.shape == views.normal.shape == (6, 64, 64, 3)
    assert views.color.dtype == views.normal.dtype == np.float32
    length = np.linalg.norm(views.normal, axis=-1)
    silhouette = length > 0
    np.testing.assert_allclose(length[silhouette], 1.0, atol=1e-5)
    assert (silhouette != (normal != 0).any(-1)).mean() < 0.01
    assert (views.color[~silhouette] == 1.0).all()
    both = silhouette & (normal != 0).any(-1)
    assert np.abs(views.color - color)[both].mean() < 0.06
    assert (views.normal * normal).sum(-1)[both].mean() > 0.98


def test_same_seed_same_views(pipeline: Pipeline) -> None:
    first, again, other = (pipeline.views(object_rgba(), seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.color, again.color)
    np.testing.assert_array_equal(first.normal, again.normal)
    assert np.abs(first.color - other.color).max() > 1e-3


def test_guidance_and_steps_matter(pipeline: Pipeline) -> None:
    default = pipeline.views(object_rgba())
    explicit = pipeline.views(object_rgba(), steps=4, guidance=2.0)  # the tiny bundle's defaults
    np.testing.assert_array_equal(default.color, explicit.color)
    assert np.abs(pipeline.views(object_rgba(), guidance=1.0).color - default.color).max() > 1e-4


@pytest.mark.parametrize(
    "low_memory, objects, latents",
    [("off", 2, 4), ("stages", 2, 4), ("unet", 1, 4), (True, 1, 4), ("least", 1, 1)],
)
def test_every_rung_of_low_memory_gives_the_same_views(
    pipeline: Pipeline, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, low_memory: bool | str,
    objects: int, latents: int,
) -> None:  # fmt: skip
    """How many objects the UNet takes at once where guidance acts, how many latents the decoder; and a stage
    is freed before the next one loads."""
    batches: list[tuple[str, int]] = []
    loaded: list[str] = []
    call, close, opened = OnnxRuntimeNetwork.__call__, OnnxRuntimeNetwork.close, OnnxRuntimeBackend.open

    def spied(self: OnnxRuntimeNetwork, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        batches.extend((name, len(inputs[name])) for name in ("timestep", "latent") if name in inputs)
        return call(self, **inputs)

    def noted(self: OnnxRuntimeBackend, bundle: Path, manifest: Manifest, name: str) -> OnnxRuntimeNetwork:
        if low_memory != "off":
            assert not loaded, f"{loaded} still loaded when {name} is"
        loaded.append(name)
        return opened(self, bundle, manifest, name)

    def freed(self: OnnxRuntimeNetwork) -> None:
        loaded.pop()
        close(self)

    usual = pipeline.views(object_rgba())
    monkeypatch.setattr(OnnxRuntimeNetwork, "__call__", spied)
    monkeypatch.setattr(OnnxRuntimeNetwork, "close", freed)
    monkeypatch.setattr(OnnxRuntimeBackend, "open", noted)
    with Pipeline.from_bundle(tiny_bundle, threads=1, low_memory=low_memory) as low:
        found = low.views(object_rgba())
        assert len(loaded) == (4 if low_memory == "off" else 0)
    steps = [("timestep", objects)] * (4 * 2 // objects)  # each with guidance
    assert batches == steps + [("latent", latents)] * (12 // latents) and not loaded
    np.testing.assert_allclose(found.color, usual.color, atol=1e-5)
    np.testing.assert_allclose(found.normal, usual.normal, atol=1e-4)


def test_without_noise_the_seed_does_not_matter(pipeline: Pipeline) -> None:
    still, other = (pipeline.views(object_rgba(), noise_scale=0.0, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(still.color, other.color)
    half, full = (pipeline.views(object_rgba(), noise_scale=scale) for scale in (0.5, 1.0))
    default = pipeline.views(object_rgba())  # the tiny bundle's scale is 1
    np.testing.assert_array_equal(full.color, default.color)
    assert np.abs(half.color - full.color).max() > 1e-4 < np.abs(half.color - still.color).max()


def test_progress_names_every_stage_and_ends_full(pipeline: Pipeline) -> None:
    heard: list[tuple[str, int, int]] = []
    pipeline(object_rgba(), fit_options=FAST, on_progress=lambda *told: heard.append(told))
    assert tuple(dict.fromkeys(stage for stage, _, _ in heard)) == STAGES
    for stage in STAGES:
        told = [(done, total) for name, done, total in heard if name == stage]
        assert told[0][0] == 0 and told[-1][0] == told[-1][1]
        assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert ("diffuse", 3, 4) in heard


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": 101},
        {"guidance": -0.1},
        {"guidance": float("nan")},
        {"noise_scale": 1.1},
        {"first_step_to": 0.0},
        {"first_step_to": 1.1},
        {"first_step_to": 0.5, "steps": 52},
        {"seed": -1},
    ],
)
def test_options_are_checked_before_the_work(pipeline: Pipeline, wrong: dict) -> None:
    with pytest.raises(UsageError):
        pipeline.views("no_such_file.png", **wrong)


def test_views_with_no_object_do_not_fit(pipeline: Pipeline) -> None:
    empty = Views(np.ones((6, 64, 64, 3), np.float32), np.zeros((6, 64, 64, 3), np.float32))
    with pytest.raises(FitError):
        pipeline.reconstruct(empty, fit_options=FAST)


class RecordingBackend(Backend):
    """Notes what is opened, run and closed; answers zeros of the right shapes."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.unet: list[dict[str, np.ndarray]] = []

    def open(self, bundle: Path, manifest: object, name: str) -> RecordingNetwork:
        self.log.append(f"open {name}")
        return RecordingNetwork(self, name)


class RecordingNetwork(Network):
    def __init__(self, backend: RecordingBackend, name: str) -> None:
        self.backend, self.name = backend, name

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        batch = len(next(iter(inputs.values())))
        if self.name == "image_encoder":
            return {"tokens": np.ones((batch, 2, 8), np.float32)}
        if self.name == "vae_encoder":
            return {"latent": np.ones((batch, 4, 8, 8), np.float32)}
        if self.name == "unet":
            self.backend.unet.append({key: value.copy() for key, value in inputs.items()})
            return {"prediction": np.zeros_like(inputs["sample"])}
        self.backend.log.append(f"decode {batch}")
        return {"image": np.full((batch, 3, 64, 64), 0.5, np.float32)}

    def close(self) -> None:
        self.backend.log.append(f"close {self.name}")


@contextmanager
def recorded(tiny_bundle: Path) -> Iterator[tuple[Pipeline, RecordingBackend]]:
    backend = RecordingBackend()
    yield Pipeline(tiny_bundle, load_manifest(tiny_bundle), backend), backend


def test_one_network_is_held_at_a_time(tiny_bundle: Path) -> None:
    with recorded(tiny_bundle) as (pipeline, backend):
        pipeline.views(object_rgba(), steps=2)
    assert backend.log == [
        "open image_encoder", "close image_encoder", "open vae_encoder", "close vae_encoder",
        "open unet", "close unet", "open vae_decoder", "decode 4", "decode 4", "decode 4",
        "close vae_decoder",
    ]  # fmt: skip


def test_within_with_networks_stay_loaded(tiny_bundle: Path) -> None:
    with recorded(tiny_bundle) as (pipeline, backend):
        with pipeline:
            pipeline.views(object_rgba(), steps=1)
            pipeline.views(object_rgba(), steps=1)
        assert sum(line.startswith("open") for line in backend.log) == 4
        assert sum(line.startswith("close") for line in backend.log) == 4


def test_a_guided_step_is_one_call_with_an_imageless_half(tiny_bundle: Path) -> None:
    with recorded(tiny_bundle) as (pipeline, backend):
        pipeline.views(object_rgba(), steps=2, guidance=3.0, focal_mm=50.0)
    assert len(backend.unet) == 2
    call = backend.unet[0]
    assert call["sample"].shape == (12, 8, 8, 8)
    np.testing.assert_array_equal(call["sample"][:6], call["sample"][6:])
    assert (call["tokens"][0] == 1).all() and (call["tokens"][1] == 0).all()
    assert (call["image_latent"][0] == 1).all() and (call["image_latent"][1] == 0).all()
    np.testing.assert_allclose(call["focal"], 50 / 35)
    np.testing.assert_array_equal(call["timestep"], [99, 99])
    noise = np.random.default_rng(0).standard_normal((6, 8, 8, 8), dtype=np.float32)
    np.testing.assert_array_equal(call["sample"][:6], noise)


def test_an_unguided_step_runs_the_picture_alone(tiny_bundle: Path) -> None:
    with recorded(tiny_bundle) as (pipeline, backend):
        pipeline.views(object_rgba(), steps=2, guidance=1.0)
    assert [len(call["sample"]) for call in backend.unet] == [6, 6]
    assert backend.unet[0]["focal"] == FOCAL_UNKNOWN


def test_networks_are_closed_when_a_stage_fails(tiny_bundle: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "diffuse" and done == 1:
            raise KeyboardInterrupt

    with recorded(tiny_bundle) as (pipeline, backend):
        with pytest.raises(KeyboardInterrupt):
            pipeline.views(object_rgba(), steps=2, on_progress=stop)
        assert backend.log[-1] == "close unet"


def test_importing_does_nothing_heavy() -> None:
    import subprocess
    import sys

    code = (
        "import sys, uc3d_rt, uc3d_rt.cli, uc3d_rt.pipeline;"
        "heavy = {'torch', 'onnxruntime', 'numba', 'skimage', 'scipy', 'trimesh'} & set(sys.modules);"
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_default_bundle_is_the_one_that_ships() -> None:
    bundle = default_bundle()
    assert bundle.parts[-2:] in (("engines", "edge"), ("bundles", "edge"))
    manifest = load_manifest(bundle)
    assert manifest.profile == "edge" and manifest.training["data"]
    assert (manifest.sampling.steps, manifest.sampling.guidance) == (50, 3.0)
    for entry in manifest.networks.values():
        content = (bundle / entry.file).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry.sha256 and len(content) == entry.bytes
    assert sum(path.stat().st_size for path in bundle.iterdir() if path.is_file()) <= 48 * 2**20
