"""Memory that runs out: everything is freed, the error says what would fit, and the pipeline works on."""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.conftest import ellipsoid_views, object_rgba
from tests.runtime.host_device import HostDevice, OpenDevice
from uc3d_rt.backends import onnxruntime as backend_module
from uc3d_rt.contract import load_manifest, save_manifest
from uc3d_rt.counting_device import CountingDevice
from uc3d_rt.device import Device
from uc3d_rt.errors import BackendError, OutOfMemoryError
from uc3d_rt.mesh.build import MeshOptions
from uc3d_rt.neus import fit_memory
from uc3d_rt.neus.fit import check_views, fit
from uc3d_rt.neus.fit_memory import fit_bytes, largest_resolution
from uc3d_rt.neus.fit_plan import FitOptions
from uc3d_rt.neus.rays import select_pixels
from uc3d_rt.pipeline import Pipeline, Views

Run = Callable[..., tuple[int, str, str]]
FAST = FitOptions(resolution=48, iterations=(2, 2), blurred_iterations=(2, 2))
SMALL = MeshOptions(faces=500, texture_px=64)


@pytest.fixture
def views() -> Views:
    return Views(*ellipsoid_views(64))


def estimate(views: Views, options: FitOptions) -> int:
    color, normal, masks = check_views(views.color, views.normal)
    return fit_bytes(color.shape[1], len(select_pixels(color, normal, masks, options.seed).mask), options)


class Metered(HostDevice):
    """The stand-in, with the bytes of its arrays counted by NumPy."""

    def __init__(self, plain: HostDevice) -> None:
        self.library, self.live, self.blocks = plain.library, 0, (0,)
        self.held = self.most = 0

    def empty(self, *arguments: object) -> np.ndarray:
        buffer = super().empty(*arguments)  # type: ignore[arg-type]
        self.held += buffer.nbytes
        self.most = max(self.most, self.held)
        return buffer

    def free(self, buffers: list[np.ndarray]) -> None:  # type: ignore[override]
        self.held -= sum(buffer.nbytes for buffer in buffers)
        super().free(buffers)


@pytest.mark.parametrize(
    "size, options",
    [
        (64, FitOptions(resolution=32, iterations=(2,))),
        (64, FitOptions(resolution=32, iterations=(2, 3))),
        (96, FitOptions(resolution=64, iterations=(1, 1, 2), blurred_iterations=(0, 0), carve_steps=2)),
        (
            96,
            FitOptions(resolution=64, iterations=(1, 1, 2), blurred_iterations=(1, 2), second_start_loss=0.0),
        ),
        (32, FitOptions(resolution=48, iterations=(1, 1), blurred_iterations=(1, 1))),
    ],
)
def test_the_estimate_is_what_a_fit_takes(machine: Device, size: int, options: FitOptions) -> None:
    if not isinstance(machine, HostDevice):
        pytest.skip("counted on the stand-in")
    views, metered = Views(*ellipsoid_views(size)), Metered(machine)
    fit(views.color, views.normal, options, device=metered)
    assert metered.held == 0
    assert estimate(views, options) == pytest.approx(metered.most, rel=0.1)


def test_bytes_a_node_are_what_the_documentation_says() -> None:
    found = estimate(Views(*ellipsoid_views(256)), FitOptions())
    assert found / 160**3 == pytest.approx(112, abs=1)


def test_the_largest_resolution_is_the_largest(views: Views) -> None:
    options = FitOptions(resolution=96, iterations=(1, 1, 1))
    sizes = {r: estimate(views, replace(options, resolution=r)) for r in range(16, 97, 4)}
    for wanted in (32, 60, 92):
        for free in (sizes[wanted], sizes[wanted + 4] - 1):
            found = largest_resolution(views.color, views.normal, options, free + fit_memory.SPARE)
            assert found == (wanted, sizes[wanted])
    assert largest_resolution(views.color, views.normal, options, 2**40) == (92, sizes[92])  # below 96
    assert largest_resolution(views.color, views.normal, options, fit_memory.SPARE) is None


def test_a_counting_device_is_read_before_memory_is_given_back(machine: Device) -> None:
    readings: list[int] = []
    counted = CountingDevice(machine, lambda: readings.append(counted.held))
    a, b = counted.empty((10, 2), np.float32), counted.empty((3,), np.int64)
    counted.free([a])
    c = counted.empty((8,), np.uint8)
    counted.free([b, c])  # less than before: not told
    assert readings == [104] and (counted.held, counted.most) == (0, 104)
    d = counted.empty((200,), np.uint8)
    counted.clear(d)  # the other device's own
    assert not counted.download(d).any()
    counted.free([d])
    assert readings == [104, 200]


def test_a_fit_that_does_not_fit_says_what_would(
    tiny_bundle: Path, devices: list[OpenDevice], views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_memory, "SPARE", 0)
    OpenDevice.limit = estimate(views, replace(FAST, resolution=40)) + 1
    pipeline = Pipeline.from_bundle(tiny_bundle, fit_device="cuda")
    with pytest.raises(OutOfMemoryError) as caught:
        pipeline.reconstruct(views, fit_options=FAST, mesh_options=SMALL)
    assert devices[0].closed and devices[0].bytes == 0
    mib = math.floor(OpenDevice.limit / 2**20 + 0.5)
    assert str(caught.value) == (
        "cuMemAlloc failed on the GPU: CUDA_ERROR_OUT_OF_MEMORY; use --resolution 40, the largest that would "
        f"fit: its arrays take {mib} MiB of the {mib} that are free, or add --fit-device cpu"
    )
    for resolution, fits in ((40, True), (42, False)):
        options = replace(FAST, resolution=resolution)
        if fits:
            pipeline.reconstruct(views, fit_options=options, mesh_options=SMALL)
        else:
            with pytest.raises(OutOfMemoryError):
                pipeline.reconstruct(views, fit_options=options, mesh_options=SMALL)
    OpenDevice.limit = 1000
    with pytest.raises(OutOfMemoryError, match="; no --resolution fits into the 0 MiB that are free, or add"):
        pipeline.reconstruct(views, fit_options=FAST, mesh_options=SMALL)


def test_within_with_all_that_was_held_is_freed_and_comes_again(
    tiny_bundle: Path, devices: list[OpenDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions: list[weakref.ref[object]] = []
    open_session = backend_module.open_session

    def opened(*arguments: object, **options: object) -> object:
        session = open_session(*arguments, **options)  # type: ignore[arg-type]
        sessions.append(weakref.ref(session))
        return session

    monkeypatch.setattr(backend_module, "open_session", opened)

    def mesh(pipeline: Pipeline) -> str:
        result = pipeline(object_rgba(), steps=1, fit_options=FAST, mesh_options=SMALL)
        return hashlib.sha256(result.mesh.export(file_type="glb")).hexdigest()

    with Pipeline.from_bundle(tiny_bundle, fit_device="cuda", mesh_device="cuda") as pipeline:
        first = mesh(pipeline)
        assert sum(session() is not None for session in sessions) == 4
        OpenDevice.limit = 10**6
        with pytest.raises(
            OutOfMemoryError, match="use --low-memory stages, which frees the networks first, or"
        ):
            mesh(pipeline)
        assert devices[0].closed and not any(session() for session in sessions)
        OpenDevice.limit = 2**40
        assert mesh(pipeline) == first
    assert len(devices) == 2 and devices[1].closed and not any(session() for session in sessions)


def test_a_mesh_that_does_not_fit(
    tiny_bundle: Path, devices: list[OpenDevice], views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    from uc3d_rt.mesh import device_refine

    def full(device: Device, *_: object) -> None:
        device.empty((2**50,), np.uint8)

    pipeline = Pipeline.from_bundle(tiny_bundle, fit_device="cuda", mesh_device="cuda")
    with monkeypatch.context() as patched:
        patched.setattr(device_refine, "surface_on_device", full)
        with pytest.raises(OutOfMemoryError, match="use a smaller --resolution, or add --mesh-device cpu$"):
            pipeline.reconstruct(views, fit_options=FAST, mesh_options=SMALL)
    assert devices[0].closed and devices[0].live == 0
    pipeline.reconstruct(views, fit_options=FAST, mesh_options=SMALL)


@pytest.fixture
def hungry_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The tiny bundle, whose decoder wants 128 TiB."""
    folder = tmp_path / "hungry"
    folder.mkdir()
    for path in tiny_bundle.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    model = onnx.load(folder / "vae_decoder.onnx")
    size = helper.make_tensor("size", TensorProto.INT64, [1], [2**45])
    output = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["plain" if name == output else name for name in node.output]
    model.graph.initializer.append(size)
    model.graph.node.extend(
        [
            helper.make_node("ConstantOfShape", ["size"], ["vast"]),
            helper.make_node("ReduceMax", ["vast"], ["zero"], keepdims=0),
            helper.make_node("Add", ["plain", "zero"], [output]),
        ]
    )
    onnx.save(model, folder / "vae_decoder.onnx")
    manifest, data = load_manifest(folder), (folder / "vae_decoder.onnx").read_bytes()
    entry = replace(
        manifest.networks["vae_decoder"], sha256=hashlib.sha256(data).hexdigest(), bytes=len(data)
    )
    save_manifest(replace(manifest, networks={**manifest.networks, "vae_decoder": entry}), folder)
    return folder


@pytest.mark.parametrize(
    "rung, mend",
    [
        ("off", "use --low-memory stages or, for less still, unet or least"),
        ("unet", "use --low-memory least"),
        ("least", "no rung of --low-memory is left: free memory of the device, or use another with --device"),
    ],
)
def test_a_network_that_does_not_fit_names_the_rungs_below(
    run_cli: Run, hungry_bundle: Path, object_png: Path, tmp_path: Path, rung: str, mend: str
) -> None:
    """ONNX Runtime itself fails to allocate."""
    code, _, err = run_cli(
        object_png, "-o", tmp_path / "m.glb", "--bundle", hungry_bundle, "--low-memory", rung, "--quiet"
    )
    assert code == 6 and len(err.splitlines()) == 1
    assert err.startswith("error: vae_decoder ran out of memory in ONNX Runtime (") and err.endswith(
        f"; {mend}\n"
    )


def test_a_network_that_fails_leaves_no_session(
    hungry_bundle: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even while somebody holds the error, whose frames have them."""
    sessions: list[weakref.ref[object]] = []
    open_session = backend_module.open_session

    def opened(*arguments: object, **options: object) -> object:
        session = open_session(*arguments, **options)  # type: ignore[arg-type]
        sessions.append(weakref.ref(session))
        return session

    monkeypatch.setattr(backend_module, "open_session", opened)
    for keep in (False, True):
        pipeline = Pipeline.from_bundle(hungry_bundle, threads=1)
        if keep:
            pipeline.__enter__()
        with pytest.raises(OutOfMemoryError) as caught:
            pipeline.views(object_rgba())
        assert len(sessions) == 4 and not any(session() for session in sessions)
        assert isinstance(caught.value.__cause__, OutOfMemoryError)
        sessions.clear()
    # The memory is there now.
    pipeline.bundle, pipeline.manifest = tiny_bundle, load_manifest(tiny_bundle)
    with pipeline:
        found = pipeline.views(object_rgba())
    expected = Pipeline.from_bundle(tiny_bundle, threads=1).views(object_rgba())
    np.testing.assert_array_equal(found.color, expected.color)


@pytest.mark.parametrize(
    "told, memory",
    [
        ("CUDA failure 2: out of memory", True),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED", True),
        ("CUBLAS failure 3: the resource allocation failed", True),
        ("CUBLAS failure 1: CUBLAS_STATUS_NOT_INITIALIZED", True),
        ("CUDNN failure 4: CUDNN_STATUS_BAD_PARAM", False),
    ],
)
def test_a_session_that_cannot_be_made(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, told: str, memory: bool
) -> None:
    """What failed is told, though ONNX Runtime puts it behind the signature of the C++ function."""
    import onnxruntime

    signature = "std::conditional_t<THRW, void, Status> onnxruntime::CudaCall(ERRTYPE, const char*, int) " * 5
    message = (
        f"Exception during initialization: cuda_call.cc:154 {signature}{told} ; GPU=0 ; line=164 ; expr=f();"
    )

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(BackendError) as caught:
        Pipeline.from_bundle(tiny_bundle).views(object_rgba())
    assert isinstance(caught.value, OutOfMemoryError) == memory and f"({told});" in str(caught.value)
    if memory:
        assert str(caught.value).startswith("image_encoder ran out of memory in ONNX Runtime (")
        assert "; use --low-memory stages" in str(caught.value)
