"""Which backend runs on which device: the best that fits, said aloud, and never another device."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest

import uc3d_rt.engines
from uc3d_rt import cuda_device
from uc3d_rt.backends import choice
from uc3d_rt.backends.choice import choose
from uc3d_rt.backends.onnxruntime import OnnxRuntimeBackend, open_session
from uc3d_rt.backends.onnxruntime_engines import OnnxRuntimeEngines
from uc3d_rt.contract import Manifest, load_manifest
from uc3d_rt.engines import (
    BUILT_NAME,
    UNET_PARTS,
    EngineFile,
    EngineSet,
    Machine,
    parts_of,
    save_engine_set,
)
from uc3d_rt.errors import BackendError, BundleError, UsageError
from uc3d_rt.pipeline import Pipeline

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # SHA-256 of no bytes
HERE = Machine("H100", "sm_90", "580.1")


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    for path in tiny_bundle.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    return load_manifest(bundle)


def build(
    bundle: Path, manifest: Manifest, backend: str, version: str, deterministic: bool = False,
    precision: str = "fp16",
) -> Path:  # fmt: skip
    """A folder of engines with nothing in them."""
    kind = f"{precision}{'-deterministic' if deterministic else ''}"
    folder = bundle / BUILT_NAME / f"{backend}-{version}-{kind}"
    folder.mkdir(parents=True)
    files = {}
    for name, entry in manifest.networks.items():
        for part in parts_of(backend, name):
            (folder / f"{part}.engine").touch()
            files[part] = EngineFile(f"{part}.engine", EMPTY, 0, entry.sha256, "key", (1,), 1e-3)
    engines = EngineSet(backend, version, (), precision, manifest.profile, files, deterministic)
    save_engine_set(engines, folder)
    return folder


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Machine | None], None]:
    installed = {"onnxruntime": "1.31.1", "tensorrt-rtx": "1.7.1"}
    monkeypatch.setattr(choice, "installed_version", installed.get)
    rtx = {"tensorrt-rtx": ("sm_86", "sm_120")}
    monkeypatch.setattr(uc3d_rt.engines, "known_targets", lambda backend: rtx.get(backend, ()))

    def place(machine: Machine | None) -> None:
        monkeypatch.setattr(choice, "this_machine", lambda ordinal=0: machine if ordinal == 0 else None)

    place(HERE)
    return place


def test_on_a_cpu_the_bundles_own_files_run(bundle: Path, manifest: Manifest) -> None:
    build(bundle, manifest, "onnxruntime", "1.31.1")
    found = choose(bundle, manifest, "cpu")
    assert isinstance(found.backend, OnnxRuntimeBackend) and found.backend.device == "cpu"
    assert found.name == "the bundle's own files, fp32, cpu"
    assert "quantize" in str(Pipeline.from_bundle(bundle).choice) and not found.notable


@pytest.mark.usefixtures("gpu")
def test_engines_that_fit_are_taken(bundle: Path, manifest: Manifest) -> None:
    folder = build(bundle, manifest, "onnxruntime", "1.31.1")
    found = choose(bundle, manifest, "cuda")
    assert isinstance(found.backend, OnnxRuntimeEngines) and found.backend.folder == folder
    assert found.name == "onnxruntime, fp16, cuda" and folder.name in found.reason
    named = choose(bundle, manifest, "cuda", "onnxruntime")
    assert isinstance(named.backend, OnnxRuntimeEngines) and named.notable
    plain = choose(bundle, manifest, "cuda", "bundle")
    assert isinstance(plain.backend, OnnxRuntimeBackend) and "fp32" in plain.name


@pytest.mark.usefixtures("gpu")
def test_the_gpu_of_a_number(bundle: Path, manifest: Manifest) -> None:
    build(bundle, manifest, "onnxruntime", "1.31.1")
    first = choose(bundle, manifest, "cuda:0").backend
    assert isinstance(first, OnnxRuntimeEngines) and first.place.ordinal == 0
    second = choose(bundle, manifest, "cuda:1")
    assert isinstance(second.backend, OnnxRuntimeBackend) and second.backend.device == "cuda:1"
    assert "no NVIDIA GPU was found" in second.reason


def test_the_provider_is_told_the_gpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    class Session:
        def __init__(self, path: Path, options: object, providers: object, enable_fallback: int) -> None:
            asked.append(providers)
            assert not enable_fallback

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    open_session(bundle / "unet.onnx", "cuda:3", provider_options={"use_tf32": "0"})
    assert asked == [[("CUDAExecutionProvider", {"use_tf32": "0", "device_id": "3"})]]


def test_auto_takes_a_gpu_that_can_be_used_and_says_why(
    bundle: Path, manifest: Manifest, gpu: Callable[[Machine | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(bundle, manifest, "onnxruntime", "1.31.1")
    here = Pipeline.from_bundle(bundle, "auto")  # this ONNX Runtime has no CUDA
    assert here.fit_device == "cpu" and "H100 is not used: this ONNX Runtime has no CUDA" in str(here.choice)
    monkeypatch.setattr(choice, "check_provider", lambda device: device)
    monkeypatch.setattr(cuda_device, "cuda_driver", lambda ordinal: None)
    there = Pipeline.from_bundle(bundle, "auto")
    assert isinstance(there._backend, OnnxRuntimeEngines) and there.fit_device == "cuda"
    assert "H100 is here" in str(there.choice) and there.choice is not None and there.choice.notable

    def no_driver(ordinal: int) -> None:
        raise BackendError("no cuda-bindings")

    monkeypatch.setattr(cuda_device, "cuda_driver", no_driver)
    mixed = Pipeline.from_bundle(bundle, "auto")
    assert mixed.fit_device == "cpu" and "the fit runs on the CPU: no cuda-bindings" in str(mixed.choice)
    for asked in ({"device": "cuda"}, {"device": "auto", "fit_device": "cuda"}):
        with pytest.raises(BackendError, match="no cuda-bindings"):  # what was asked for is not replaced
            Pipeline.from_bundle(bundle, **asked)
    gpu(None)
    alone = Pipeline.from_bundle(bundle, "auto")
    assert "cpu" in str(alone.choice) and "no NVIDIA GPU was found" in str(alone.choice)


@pytest.mark.usefixtures("gpu")
def test_the_same_bits_each_time_are_for_those_who_ask(bundle: Path, manifest: Manifest) -> None:
    fast = build(bundle, manifest, "onnxruntime", "1.31.1")
    with pytest.raises(BackendError, match="its results differ in their last bits.*--deterministic"):
        choose(bundle, manifest, "cuda", deterministic=True)
    with pytest.raises(BackendError, match="the same bits each time"):  # and not the bundle's own in silence
        choose(bundle, manifest, "cuda", "bundle", deterministic=True)
    sure = build(bundle, manifest, "onnxruntime", "1.31.1", deterministic=True)
    for deterministic, folder in ((False, fast), (True, sure)):
        found = choose(bundle, manifest, "cuda", deterministic=deterministic).backend
        assert isinstance(found, OnnxRuntimeEngines) and found.folder == folder
        assert found.engines.deterministic == deterministic
    assert choose(bundle, manifest, "cpu", "bundle", deterministic=True).reason == "asked for"


@pytest.mark.usefixtures("gpu")
def test_a_precision_is_for_those_who_ask(
    bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "installed_version", lambda backend: "1.31.1")
    monkeypatch.setattr(choice, "misfits", lambda *_: [])
    with pytest.raises(BackendError, match="nothing in int8 fits .*nothing was built.*--precision int8"):
        choose(bundle, manifest, "cuda", precision="int8")
    for precision in ("fp8", "fp16", "fp16-int8-weights", "int8"):
        build(bundle, manifest, "tensorrt-rtx", "1.31.1", precision=precision)
    for asked, found in {"auto": "fp16", "fp16": "fp16", "int8": "int8", "fp8": "fp8"}.items():
        assert f"tensorrt-rtx, {found}, cuda" in str(choose(bundle, manifest, "cuda", precision=asked))
    with pytest.raises(BackendError, match="nothing in int8 fits --device cpu .*quantize"):
        choose(bundle, manifest, "cpu", precision="int8")
    with pytest.raises(BackendError, match="it is fp16.*--precision fp8"):
        shutil.rmtree(bundle / BUILT_NAME)
        build(bundle, manifest, "tensorrt-rtx", "1.31.1")
        choose(bundle, manifest, "cuda", precision="fp8")
    for wrong in ({"precision": "fp4"}, {"precision": "int8", "backend": "bundle"}):
        with pytest.raises(UsageError):
            choose(bundle, manifest, "cuda", **wrong)


@pytest.mark.usefixtures("gpu")
def test_what_does_not_fit_is_named_with_its_reason(bundle: Path, manifest: Manifest) -> None:
    build(bundle, manifest, "onnxruntime", "1.30.0")
    build(bundle, manifest, "tensorrt-rtx", "1.7.1")
    found = choose(bundle, manifest, "cuda")
    assert isinstance(found.backend, OnnxRuntimeBackend) and found.backend.device == "cuda"
    assert "fp32" in found.name
    assert "built by onnxruntime 1.30.0, installed is 1.31.1" in found.reason
    assert "built for sm_86, sm_120, but H100 is sm_90" in found.reason and found.notable
    assert "python -m export build-engines --backend onnxruntime" in found.reason
    with pytest.raises(BackendError, match="nothing that fits --device cuda .*1.30.0.*build-engines"):
        choose(bundle, manifest, "cuda", "onnxruntime")
    with pytest.raises(BackendError, match="nothing was built for it.*quantize"):
        choose(bundle, manifest, "cpu", "onnxruntime")


def test_a_part_that_is_missing_or_of_another_bundle(
    bundle: Path, manifest: Manifest, gpu: Callable[[Machine | None], None]
) -> None:
    folder = build(bundle, manifest, "onnxruntime", "1.31.1")
    other = replace(manifest.networks["unet"], sha256="0" * 64)
    changed = replace(manifest, networks={**manifest.networks, "unet": other})
    found = choose(bundle, changed, "cuda")
    assert all(f"{part} was built from another unet.onnx" in found.reason for part in UNET_PARTS)
    (folder / "unet_step_2.engine").write_bytes(b"x")
    assert "unet_step_2.engine was altered or damaged" in choose(bundle, manifest, "cuda").reason
    (folder / "unet_step_2.engine").unlink()
    assert "unet_step_2.engine is missing" in choose(bundle, manifest, "cuda").reason
    gpu(None)
    assert "no NVIDIA GPU was found" in choose(bundle, manifest, "cuda").reason
    (folder / "engines.json").write_text("{}")
    assert "is damaged" in choose(bundle, manifest, "cuda").reason


def test_an_engine_altered_after_it_was_chosen(bundle: Path, manifest: Manifest) -> None:
    folder = build(bundle, manifest, "onnxruntime", "1.31.1")
    engines = choice.load_engine_set(folder)
    (folder / "vae_decoder.engine").write_bytes(b"x")
    with pytest.raises(BundleError, match="vae_decoder.engine is missing or was altered.*build-engines"):
        OnnxRuntimeEngines(folder, engines).open(bundle, manifest, "vae_decoder")


def test_unknown_names(bundle: Path, manifest: Manifest) -> None:
    with pytest.raises(UsageError, match="unknown backend 'tensorflow'; choose one of auto, onnx"):
        choose(bundle, manifest, "cpu", "tensorflow")
    with pytest.raises(UsageError, match="unknown device 'tpu'; choose cpu, cuda, or cuda:N"):
        choose(bundle, manifest, "tpu")


def test_the_command_line_names_what_it_takes(
    run_cli: Callable[..., tuple[int, str, str]], object_png: Path, tmp_path: Path
) -> None:
    code, _, err = run_cli(object_png, "-o", tmp_path / "mesh.glb", "--backend", "directml")
    assert code == 2 and "unknown backend 'directml'" in err
