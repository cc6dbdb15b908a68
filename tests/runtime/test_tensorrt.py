"""TensorRT engines through a library that is a stand-in: it runs ONNX at the addresses it is given."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnxruntime
import pytest

import uc3d_rt.engines
from export import verification
from uc3d_rt.backends import choice, tensorrt
from uc3d_rt.backends.base import NetworkSampler, backend_for
from uc3d_rt.backends.tensorrt import TensorRtEngines
from uc3d_rt.contract import NETWORK_NAMES, Manifest, load_manifest, network_specs, sha256_of
from uc3d_rt.engines import BUILT_NAME, EngineFile, EngineSet, Machine, save_engine_set
from uc3d_rt.errors import BackendError, UsageError
from uc3d_rt.pipeline import Pipeline

VERSION = "1.7.1"


class Memory:
    """NumPy's memory as a `CudaDevice`'s."""

    live: ClassVar[dict[int, np.ndarray]] = {}
    ordinals: ClassVar[list[int]] = []
    stream = 99

    def __init__(self, ordinal: int = 0) -> None:
        self.ordinals.append(ordinal)

    @contextmanager
    def current(self) -> Iterator[None]:
        yield

    def empty(self, shape: Sequence[int], dtype: type[np.generic]) -> SimpleNamespace:
        array = np.full(shape, 7, dtype)
        self.live[array.ctypes.data] = array
        return SimpleNamespace(address=array.ctypes.data, dtype=array.dtype, nbytes=array.nbytes)

    def upload(self, array: np.ndarray, buffer: SimpleNamespace) -> None:
        assert array.dtype == buffer.dtype and array.nbytes == buffer.nbytes
        self.live[buffer.address][...] = array

    def download(self, buffer: SimpleNamespace) -> np.ndarray:
        return self.live[buffer.address].copy()

    def free(self, buffers: Sequence[SimpleNamespace]) -> None:
        for buffer in buffers:
            del self.live[buffer.address]

    def wait(self) -> None:
        pass

    def close(self) -> None:
        self.live.clear()


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.at, self.shapes, self.profile = engine, {}, {}, None
        self.scratch: tuple[int, int] | None = None

    def set_device_memory(self, address: int, size: int) -> None:
        self.scratch = (address, size)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == Memory.stream
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes.get(name) or self.engine.outputs(self.profile)[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.at[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        session = self.engine.session
        assert stream == Memory.stream and self.scratch is not None
        address, size = self.scratch
        assert Memory.live[address].nbytes == size
        assert size >= self.engine.get_device_memory_size_for_profile_v2(self.profile)
        given = {
            node.name: Memory.live[self.at[node.name]].astype(np.float32) for node in session.get_inputs()
        }
        for node, value in zip(session.get_outputs(), session.run(None, given), strict=True):
            Memory.live[self.at[node.name]][...] = value
        return self.engine.library.works


class Engine:
    def __init__(self, library: Library, model: bytes) -> None:
        self.library, self.session = library, onnxruntime.InferenceSession(model)
        self.nodes = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.num_io_tensors = len(self.nodes)
        self.spec = next(
            s for s in network_specs(library.manifest.shape).values()
            if [{t.name for t in ts} for ts in (s.inputs, s.outputs)]
            == [{n.name for n in ns} for ns in (self.session.get_inputs(), self.session.get_outputs())]
        )  # fmt: skip
        self.batches = library.batches(self.spec.name)
        self.num_optimization_profiles = len(self.batches)
        self.made: list[Any] = []

    def free(self, profile: int) -> dict[str, int]:
        batch = self.batches[profile]
        return {"batch": batch, "samples": batch * self.library.manifest.shape.views}

    def outputs(self, profile: int) -> dict[str, tuple[int, ...]]:
        free = self.free(profile)
        return {
            t.name: tuple(free[s] if isinstance(s, str) else s for s in t.shape) for t in self.spec.outputs
        }

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return 2048 * self.batches[profile]

    def get_tensor_name(self, index: int) -> str:
        return str(self.nodes[index].name)

    def get_tensor_dtype(self, name: str) -> type[np.generic]:
        return np.float16 if name == "tokens" else np.float32

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if len(self.batches) == 1:
            return self.get_tensor_profile_shape(name, 0)[0]
        tensor = next(t for t in self.spec.inputs if t.name == name)
        return tuple(-1 if isinstance(s, str) else s for s in tensor.shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        free, tensor = self.free(profile), next(t for t in self.spec.inputs if t.name == name)
        return [tuple(free[s] if isinstance(s, str) else s for s in tensor.shape)] * 3

    def create_runtime_config(self) -> SimpleNamespace:
        cache = SimpleNamespace(read=[], serialize=lambda: b"compiled here")
        cache.deserialize = cache.read.append
        config = SimpleNamespace(
            strategy=None, cache=None, cuda_graph_strategy="none", create_runtime_cache=lambda: cache
        )
        config.set_execution_context_allocation_strategy = lambda s: setattr(config, "strategy", s)
        config.set_runtime_cache = lambda c: setattr(config, "cache", c)
        return config

    def create_execution_context(self, runtime_config: SimpleNamespace) -> Context:
        assert runtime_config.strategy == "user"
        self.made.append(runtime_config)
        return Context(self)


class Library(ModuleType):
    """`tensorrt_rtx` as far as the backend uses it."""

    __version__ = VERSION
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")
    ComputeCapability = SimpleNamespace(__members__={"SM86": 0})

    def __init__(self, manifest: Manifest) -> None:
        super().__init__("tensorrt_rtx")
        self.manifest, self.works, self.opened = manifest, True, []
        self.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})

    def batches(self, name: str) -> tuple[int, ...]:
        return {"unet": (1, 2), "vae_decoder": (2 * self.manifest.shape.views,)}.get(name, (1,))

    def Runtime(self, _logger: object) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(deserialize_cuda_engine=self.open)

    def open(self, content: bytes) -> Engine | None:
        if not content:
            return None
        self.opened.append(Engine(self, content))
        return self.opened[-1]

    def nptype(self, kind: type[np.generic]) -> type[np.generic]:
        return kind


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The tiny bundle, and its networks as engines of the stand-in."""
    for path in tiny_bundle.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture
def library(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    manifest = load_manifest(bundle)
    found = Library(manifest)
    folder = bundle / BUILT_NAME / "rtx"
    folder.mkdir(parents=True)
    files = {}
    for name, entry in manifest.networks.items():
        path = folder / f"{name}.rtx"
        path.write_bytes((bundle / entry.file).read_bytes())
        files[name] = EngineFile(
            path.name, sha256_of(path), 1, entry.sha256, "key", found.batches(name), 1e-3
        )
    save_engine_set(EngineSet("tensorrt-rtx", VERSION, (), "fp16", manifest.profile, files), folder)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", found)
    monkeypatch.setattr(tensorrt, "CudaDevice", Memory)
    monkeypatch.setattr(choice, "this_machine", lambda ordinal=0: Machine("RTX", "sm_86", "580.1"))
    Memory.live.clear()
    return found


def test_a_picture_through_engines(bundle: Path, library: Library, object_png: Path) -> None:
    pipeline = Pipeline.from_bundle(bundle, "cuda", fit_device="cpu")
    assert isinstance(pipeline._backend, TensorRtEngines)
    assert "tensorrt-rtx, fp16, cuda" in str(pipeline.choice)
    found = pipeline.views(object_png, steps=4, guidance=3.0)
    assert Memory.live == {}
    expected = Pipeline.from_bundle(bundle, "cpu").views(object_png, steps=4, guidance=3.0)
    np.testing.assert_allclose(found.color, expected.color, atol=2e-3)  # tokens went through fp16
    np.testing.assert_allclose(found.normal, expected.normal, atol=2e-3)
    assert not np.array_equal(found.color, expected.color)
    unet = next(engine for engine in library.opened if engine.spec.name == "unet")
    assert len(unet.made) == 1  # one context for all steps
    assert unet.made[0].cuda_graph_strategy == "whole"
    kept = bundle / BUILT_NAME / "rtx" / "unet.runtime-cache"
    assert kept.read_bytes() == b"compiled here" and unet.made[0].cache.read == []
    pipeline.views(object_png, steps=1, guidance=1.0)
    assert library.opened[-2].made[0].cache.read == [b"compiled here"]


@pytest.mark.usefixtures("library")
def test_the_gpu_of_a_number(bundle: Path, object_png: Path) -> None:
    pipeline = Pipeline.from_bundle(bundle, "cuda:1", fit_device="cpu")
    assert "tensorrt-rtx, fp16, cuda:1" in str(pipeline.choice)
    Memory.ordinals.clear()
    pipeline.views(object_png, steps=1, guidance=1.0)
    assert Memory.ordinals == [1] * 4


@pytest.mark.usefixtures("library")
def test_verify_runs_the_engines(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "this_machine", lambda ordinal=0: Machine("RTX", "sm_86", "580.1"))
    checks = [check for check in verification.verify(bundle, steps=2) if check.form == "rtx"]
    assert {check.what for check in checks} >= {
        "unet.prediction",
        "vae_decoder.image",
        "sample: colour views",
    }
    assert not any(check.failed or check.note for check in checks)


def test_what_the_library_refuses(bundle: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, folder = load_manifest(bundle), bundle / BUILT_NAME / "rtx"
    backend = TensorRtEngines(folder, choice.load_engine_set(folder))
    shape = manifest.shape
    with backend.open(bundle, manifest, "image_encoder") as network:
        assert network.batch == 1
        image = np.zeros((1, 3, shape.image_px, shape.image_px), np.float32)
        with pytest.raises(BackendError, match=r"not built for inputs of .*build-engines"):
            network(image=np.concatenate([image, image]))
        library.works = False
        with pytest.raises(BackendError, match="image_encoder failed in tensorrt_rtx"):
            network(image=image)
    with pytest.raises(ValueError, match="is closed"):
        network(image=image)
    monkeypatch.setattr(library, "open", lambda content: None)
    with pytest.raises(BackendError, match=r"does not open .*unet.rtx on this GPU; run: python -m export"):
        backend.open(bundle, manifest, "unet")
    assert Memory.live == {}
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendError, match="tensorrt-rtx does not load"):
        TensorRtEngines(folder, choice.load_engine_set(folder))


@pytest.mark.usefixtures("library")
def test_which_engines_are_taken(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = load_manifest(bundle)
    assert isinstance(choice.choose(bundle, manifest, "cuda", "tensorrt-rtx").backend, TensorRtEngines)
    with pytest.raises(BackendError, match="tensorrt has nothing that fits.*--backend tensorrt$"):
        choice.choose(bundle, manifest, "cuda", "tensorrt")
    with pytest.raises(UsageError, match="runs on GPUs alone; add --device cuda"):
        choice.choose(bundle, manifest, "cpu", "tensorrt-rtx")
    # The library knows sm_86 alone.
    monkeypatch.setattr(choice, "this_machine", lambda ordinal=0: Machine("H100", "sm_90", "580.1"))
    assert uc3d_rt.engines.known_targets("tensorrt-rtx") == ("sm_86",)
    with pytest.raises(BackendError, match="built for sm_86, but H100 is sm_90"):
        choice.choose(bundle, manifest, "cuda", "tensorrt-rtx")


def test_a_network_is_the_bundles(bundle: Path, library: Library) -> None:
    manifest, folder = load_manifest(bundle), bundle / BUILT_NAME / "rtx"
    backend = TensorRtEngines(folder, choice.load_engine_set(folder))
    rng, views = np.random.default_rng(0), manifest.shape.views
    for name in NETWORK_NAMES:
        spec = network_specs(manifest.shape)[name]
        with (
            backend.open(bundle, manifest, name) as ours,
            backend_for("cpu").open(bundle, manifest, name) as own,
        ):
            for batch in library.batches(name):
                free = {"batch": batch, "samples": batch * views}
                sizes = {t.name: [free[s] if isinstance(s, str) else s for s in t.shape] for t in spec.inputs}
                inputs = {key: rng.random(size, dtype=np.float32) for key, size in sizes.items()}
                for key, value in own(**inputs).items():
                    np.testing.assert_allclose(ours(**inputs)[key], value, rtol=2e-3, atol=2e-3)
    unet = next(engine for engine in library.opened if engine.spec.name == "unet")
    first, second = unet.made  # two profiles, a context each, one runtime cache
    assert first.cache is second.cache
    assert isinstance(backend.open_sampler(bundle, manifest), NetworkSampler)


def test_rungs_of_low_memory(bundle: Path, library: Library, object_png: Path) -> None:
    """The same views, and CUDA graphs on each."""
    usual = Pipeline.from_bundle(bundle, "cuda", fit_device="cpu").views(object_png, steps=2, guidance=3.0)
    for rung in ("unet", "least"):
        library.opened.clear()
        pipeline = Pipeline.from_bundle(bundle, "cuda", fit_device="cpu", low_memory=rung)
        found = pipeline.views(object_png, steps=2, guidance=3.0)
        np.testing.assert_allclose(found.color, usual.color, atol=1e-5)
        assert {made.cuda_graph_strategy for engine in library.opened for made in engine.made} == {"whole"}


def test_working_memory_is_as_large_as_what_runs_needs(bundle: Path, library: Library) -> None:
    manifest, folder = load_manifest(bundle), bundle / BUILT_NAME / "rtx"
    spec, rng = network_specs(manifest.shape)["unet"], np.random.default_rng(0)

    def inputs(batch: int) -> dict[str, np.ndarray]:
        free = {"batch": batch, "samples": batch * manifest.shape.views}
        sizes = {t.name: [free[s] if isinstance(s, str) else s for s in t.shape] for t in spec.inputs}
        return {name: rng.random(size, dtype=np.float32) for name, size in sizes.items()}

    def scratches() -> list[int]:
        return [array.nbytes for array in Memory.live.values() if array.dtype == np.uint8]

    backend = TensorRtEngines(folder, choice.load_engine_set(folder))
    with backend.open(bundle, manifest, "unet") as network:
        for batch, size in ((1, 2048), (2, 4096), (1, 4096)):  # the first context gets the larger one too
            network(**inputs(batch))
            assert scratches() == [size]


def test_the_library_has_what_the_backend_calls() -> None:
    """Names only: the library runs nothing without a GPU."""
    real = pytest.importorskip("tensorrt_rtx")
    called: dict[Any, tuple[str, ...]] = {
        real: ("Logger", "nptype"),
        real.Runtime: ("deserialize_cuda_engine",),
        real.ICudaEngine: (
            "num_io_tensors", "get_tensor_name", "get_tensor_dtype", "get_tensor_shape",
            "get_tensor_profile_shape", "num_optimization_profiles", "get_device_memory_size_for_profile_v2",
            "create_runtime_config", "create_execution_context",
        ),
        real.IExecutionContext: (
            "set_device_memory", "set_optimization_profile_async", "set_input_shape", "get_tensor_shape",
            "set_tensor_address", "execute_async_v3",
        ),
        real.IRuntimeConfig: (
            "set_execution_context_allocation_strategy", "cuda_graph_strategy", "create_runtime_cache",
            "set_runtime_cache",
        ),
        real.IRuntimeCache: ("serialize", "deserialize"),
        real.ExecutionContextAllocationStrategy: ("USER_MANAGED",),
        real.CudaGraphStrategy: ("WHOLE_GRAPH_CAPTURE",),
    }  # fmt: skip
    missing = [
        f"{owner.__name__}.{n}" for owner, names in called.items() for n in names if not hasattr(owner, n)
    ]
    assert missing == []
    assert "runtime_config" in real.ICudaEngine.create_execution_context.__doc__


Run = Callable[..., tuple[int, str, str]]


def test_the_command_line(run_cli: Run, object_png: Path, tmp_path: Path, tiny_bundle: Path) -> None:
    files = (object_png, "-o", tmp_path / "m.glb", "--bundle", tiny_bundle)
    code, _, err = run_cli(*files, "--backend", "tensorrt")
    assert code == 2 and "runs on GPUs alone; add --device cuda" in err
