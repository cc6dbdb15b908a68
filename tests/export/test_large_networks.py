"""Networks whose weights stand beside their graph: sdxl's structure, narrow, with limits lowered for it.

Each is held against the same network exported and built the ordinary way.
"""

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result

from export import data_file, fused_block, onnx_bundle
from export.__main__ import cli
from export.data_file import Constants, DataFile, array_of, data_path, graph_bytes, is_apart, load_graph
from export.engine_plan import BuildOptions, engine_batches, plan_build
from export.engines import build
from export.example_inputs import example_inputs
from export.onnx_bundle import export_network, network_file, parity_error
from export.onnxruntime_builder import build_part
from export.plain_graph import plain_graph
from export.step_graph import step_graph
from export.typed_graph import cpu_session, rounded_session, typed_graph
from export.weights import store_weights_int8
from train.checkpoint import save_checkpoint
from train.model import MultiviewModel
from train.multiview_unet import MultiviewUNet
from train.presets import PRESETS, SDXL, EncoderSpec, HeadSpec, KlVaeSpec
from train.pretrained import KlVae
from uc3d_rt.backends.onnxruntime import OnnxRuntimeBackend
from uc3d_rt.backends.onnxruntime_engines import OnnxRuntimeEngines
from uc3d_rt.contract import NETWORK_NAMES, load_manifest, sha256_of
from uc3d_rt.engines import EngineSet, Machine, built_folders, load_engine_set, misfits
from uc3d_rt.errors import BundleError
from uc3d_rt.sampler import ddim_steps

NARROW = replace(
    SDXL,
    unet=replace(SDXL.unet, latent_px=8, channels=(32, 64, 128), token_dim=64, norm_groups=16,
        layers_per_block=1, transformer_layers=(1, 1, 2)),
    encoder=EncoderSpec(image_px=64, stem_channels=(16, 32, 64), token_dim=64, layers=1),
    vae=KlVaeSpec(
        image_px=64, latent_channels=4, channels=(32, 32, 32, 64), layers_per_block=1,
        scaling_factor=SDXL.vae.scaling_factor, norm_groups=16,
    ),
    heads=HeadSpec(pooled_px=16, channels=(16, 32), embedding_dim=32),
)  # fmt: skip
"""sdxl with few channels: one transformer block and two in a row, heads of 64, eps, its schedule, its VAE."""


@pytest.fixture(scope="module")
def unet() -> MultiviewUNet:
    torch.manual_seed(0)
    network = MultiviewUNet(NARROW.unet).eval().requires_grad_(False)
    for parameter in network.parameters():
        if not parameter.any():
            parameter.normal_(std=0.05)  # what starts as zero would hide
    return network


@pytest.fixture(scope="module")
def bundle(unet: MultiviewUNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the command line, weights as int8; beside it the UNet's files as they were in fp32.  Read only."""
    folder = tmp_path_factory.mktemp("large")
    model, vae = MultiviewModel(NARROW, unet), KlVae(NARROW.vae)
    ema = {name: value.detach() for name, value in model.state_dict().items()}
    state = {"step": 7, "batch": 8, "seed": 3, "history": []}
    checkpoint = folder / "checkpoint"
    save_checkpoint(checkpoint, preset=NARROW, model=model, ema=ema, vae=vae, optimizers=(), state=state)

    def kept(source: Path, target: Path) -> tuple[int, int]:
        if source.name == "unet.onnx":
            for path in (source, data_path(source)):
                shutil.copy(path, folder)  # type: ignore[arg-type]
        return store_weights_int8(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "sdxl", NARROW)
        patch.setattr(data_file, "LARGE_BYTES", 1 << 20)
        patch.setattr(data_file, "APART_ENTRIES", 4096)
        patch.setattr(onnx_bundle, "store_weights_int8", kept)
        result = run("onnx", "--checkpoint", checkpoint, "--out", folder / "sdxl", "--guidance-rescale", 0.5)
    assert result.exit_code == 0, result.output
    return folder / "sdxl"


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def files(unet: MultiviewUNet, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The UNet in one file; with its weights beside it; the same with weights as int8."""
    whole = tmp_path_factory.mktemp("whole") / "unet.onnx"
    export_network(NARROW, "unet", unet, whole)
    return {"whole": whole, "apart": bundle.parent / "unet.onnx", "int8": bundle / "unet.onnx"}


def test_a_large_network_is_exported_with_its_weights_beside_it(
    unet: MultiviewUNet, files: dict[str, Path]
) -> None:
    assert data_path(files["whole"]) is None
    beside = data_path(files["apart"])
    assert beside is not None and files["apart"].stat().st_size < 0.3 * files["whole"].stat().st_size
    model = load_graph(files["apart"])
    stored = {t.name: array_of(t) for t in model.graph.initializer if is_apart(t)}
    assert all(array.size >= 4096 for array in stored.values())
    for name, parameter in unet.named_parameters():
        if parameter.numel() >= 4096:
            values = parameter.numpy()
            assert any(np.array_equal(stored[name], v) for v in (values, values.T)), name
    assert parity_error(NARROW, "unet", unet, files["apart"]) < 1e-5


def test_the_manifest_says_what_stands_beside_a_network(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    beside = {file.weights.file: file.weights for file in manifest.networks.values() if file.weights}
    assert {path.name for path in bundle.iterdir()} == {"manifest.json", *beside} | {
        f"{name}.onnx" for name in NETWORK_NAMES
    }
    assert network_file(bundle / "unet.onnx") == manifest.networks["unet"]
    weights = manifest.networks["unet"].weights
    assert weights is not None and weights.bytes == (bundle / weights.file).stat().st_size
    assert weights.sha256 == hashlib.sha256((bundle / weights.file).read_bytes()).hexdigest()
    assert weights.file == f"weights-{weights.sha256[:16]}.bin"
    figures = manifest.parity["unet"]
    assert figures["fp32_relative_error"] < 1e-5 < 1e-3 < figures["int8_weights_relative_error"] < 0.05
    assert "weights" not in json.loads((bundle / "manifest.json").read_text())["networks"]["projection_heads"]


@pytest.mark.parametrize(("source", "batch"), [("apart", 2), ("int8", 1)])
def test_a_step_is_the_same_graph_wherever_its_weights_stand(
    files: dict[str, Path], tmp_path: Path, source: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_block, "SPLIT_GELU_WIDTHS", (512, 1024))  # as sdxl's widths are
    whole = step_graph(files["whole"], NARROW.shape, batch, 0.5)
    with DataFile(tmp_path / "weights", 4096) as data:
        apart = step_graph(files[source], NARROW.shape, batch, 0.5, data)
        count, expected = (Counter(n.op_type for n in model.graph.node) for model in (apart, whole))
        assert (
            expected["BiasSplitGelu"] == 3 + 2 * 4 and not expected["Softmax"]
        )  # every block, in a row or not
        assert count.pop("Concat") - expected.pop("Concat") == (batch - 1) * 11  # one a block
        assert count == expected
        large = [t for t in apart.graph.initializer if is_apart(t)]
        assert {t.data_type for t in large} == {onnx.TensorProto.FLOAT16}
        assert all(
            is_apart(t) or np.prod(t.dims) < 4096 or t.data_type != 10 for t in apart.graph.initializer
        )
        assert apart.ByteSize() < 0.3 * whole.ByteSize()
        given = inputs_of(whole)
        found, truth = (rounded_session(plain_graph(m)).run(["z_next"], given)[0] for m in (apart, whole))
    error = np.linalg.norm(found - truth) / np.linalg.norm(truth)
    assert error < 1e-6 if source == "apart" else 1e-5 < error < 3e-2
    assert not (tmp_path / "weights").exists()


def inputs_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    rng, given = np.random.default_rng(1), {}
    for value in model.graph.input:
        size = [d.dim_value for d in value.type.tensor_type.shape.dim]
        given[value.name] = rng.standard_normal(size).astype(np.float32)
    return given | {"step": np.array([3])}


@pytest.mark.parametrize("part", ["unet_time", "unet_context", "unet_step_2"])
def test_parts_of_a_large_unet_are_checked(files: dict[str, Path], tmp_path: Path, part: str) -> None:
    with DataFile(tmp_path / "weights", 4096) as data:
        model, error = build_part(part, files["int8"], load_manifest(files["int8"].parent), 2, data)
        assert error is not None and 1e-5 < error < 5e-3
        assert any(is_apart(tensor) for tensor in model.graph.initializer)
        assert {Path(t.external_data[0].value) for t in model.graph.initializer if is_apart(t)} == {data.path}
        assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_weights_are_read_as_they_were_stored(files: dict[str, Path]) -> None:
    """Made fp32 on the way as ONNX Runtime makes them."""
    graph = load_graph(files["int8"]).graph
    constants = Constants(graph)
    name = next(node.output[0] for node in graph.node if node.op_type == "DequantizeLinear")
    reader = next(node for node in graph.node if name in node.input)
    assert constants.shapes()[name] == constants[name].shape and name in constants
    cut = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(onnx.load(files["int8"]))).extract_model(
        [], [name]
    )
    (expected,) = cpu_session(cut).run(None, {})
    np.testing.assert_array_equal(constants[name], expected)
    assert reader.op_type in ("Conv", "MatMul", "Gemm")


def test_tensorrt_says_that_it_takes_none(files: dict[str, Path]) -> None:
    with pytest.raises(
        ValueError, match="too large to be typed as a whole; build it with --backend onnxruntime"
    ):
        typed_graph(files["apart"], {"batch": 1, "samples": 6})


@pytest.fixture(scope="module")
def built(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle with engines, unchecked but for the contexts; read only."""
    copy = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("built") / "sdxl"))
    result = run("build-engines", "--bundle", copy, "--backend", "onnxruntime", "--no-check")
    assert result.exit_code == 0, result.output
    assert result.output.count("relative error not checked") == len(
        engine_batches(NARROW.shape, "onnxruntime")
    )
    assert "warning:" in result.output and "never held against the bundle's network" in result.output
    return copy


def engines_of(bundle: Path) -> tuple[Path, EngineSet]:
    (folder,) = built_folders(bundle)
    return folder, load_engine_set(folder)


def test_engines_of_the_same_weights_share_them(built: Path) -> None:
    folder, engines = engines_of(built)
    weights = {name: engine.weights for name, engine in engines.engines.items()}
    assert weights["unet_step_1"] == weights["unet_step_2"] is not None
    beside = {file.file: file for file in weights.values() if file is not None}
    assert len(beside) >= 3 and {path.name for path in folder.glob("*.bin")} == set(beside)
    assert not [path for path in folder.iterdir() if path.name.startswith(".") and path.name != ".lock"]
    for file in beside.values():
        assert sha256_of(folder / file.file) == file.sha256
    for name, engine in engines.engines.items():
        path = data_path(folder / engine.file)
        assert (path.name if path else None) == (engine.weights.file if engine.weights else None), name


def test_what_was_not_checked_is_recorded_and_can_be_checked_later(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, engines = engines_of(built)
    assert {engine.relative_error for engine in engines.engines.values()} == {None}
    assert '"relative_error": null' in (folder / "engines.json").read_text()
    assert "relative error not checked; weights in weights-" in run("inspect", "--bundle", built).output
    again = BuildOptions(built, "onnxruntime", check=False)
    assert all(job.done for job in plan_build(again).jobs)
    assert not any(job.done for job in plan_build(replace(again, check=True)).jobs)


@pytest.mark.parametrize("harm", ["missing", "altered"])
def test_weights_that_are_not_the_ones_that_were_built(built: Path, tmp_path: Path, harm: str) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "sdxl"))
    folder, engines = engines_of(copy)
    weights = engines.engines["unet_step_1"].weights
    assert weights is not None
    spoil(folder / weights.file, harm)
    said = f"{weights.file} {'is missing' if harm == 'missing' else 'was altered or damaged'}"
    manifest = load_manifest(copy)
    found = misfits(engines, folder, manifest, Machine("H100", "sm_90", "580.1"), engines.version)
    assert found == [said, said]  # of both steps
    assert said in run("inspect", "--bundle", copy).output
    with pytest.raises(
        BundleError, match=f"{said}; delete the folder and run: python -m export build-engines"
    ):
        OnnxRuntimeEngines(folder, engines, device="cpu").session("unet_step_1")
    plan = plan_build(BuildOptions(copy, "onnxruntime", check=False))
    assert [job.name for job in plan.jobs if not job.done] == ["unet_step_1", "unet_step_2"]
    build(plan)
    assert sha256_of(folder / weights.file) == weights.sha256


@pytest.mark.parametrize("harm", ["missing", "altered"])
def test_a_bundle_whose_weights_are_not_its_own(bundle: Path, tmp_path: Path, harm: str) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "sdxl"))
    weights = load_manifest(copy).networks["unet"].weights
    assert weights is not None
    spoil(copy / weights.file, harm)
    said = f"{weights.file} {'is missing' if harm == 'missing' else 'was altered or damaged'}"
    with pytest.raises(BundleError, match=f"{said}; fetch or export the bundle again"):
        OnnxRuntimeBackend("cpu").open(copy, load_manifest(copy), "unet")
    result = run("build-engines", "--bundle", copy, "--backend", "onnxruntime")
    assert result.exit_code == BundleError.exit_code and said in result.output


def spoil(path: Path, harm: str) -> None:
    if harm == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


def test_old_weights_go_when_nothing_reads_them(built: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "sdxl"))
    folder, _ = engines_of(copy)
    (folder / "weights-0000000000000000.bin").write_bytes(b"of an older build")
    (folder / "unet_context.onnx").unlink()
    build(plan_build(BuildOptions(copy, "onnxruntime", check=False)))
    assert not (folder / "weights-0000000000000000.bin").exists() and len(list(folder.glob("*.bin"))) >= 3


@pytest.fixture(scope="module")
def plain(built: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EngineSet]:
    """The engines with plain operators in the place of fused ones: a CPU runs them."""
    copy = Path(shutil.copytree(built, tmp_path_factory.mktemp("plain") / "sdxl"))
    folder, engines = engines_of(copy)
    changed = {}
    for name, engine in engines.engines.items():
        path, weights = folder / engine.file, engine.weights.file if engine.weights else ""
        path.write_bytes(graph_bytes(plain_graph(load_graph(path)), weights))
        changed[name] = replace(engine, sha256=sha256_of(path))
    return folder, replace(engines, engines=changed)


def test_steps_of_a_large_bundle(plain: tuple[Path, EngineSet], bundle: Path) -> None:
    """From files whose weights stand beside them, against the bundle's network and the host's steps."""
    manifest = load_manifest(bundle)
    inputs = example_inputs(manifest.shape, "unet", 1, seed=4)
    given = {
        "tokens": inputs["tokens"], "image_latent": inputs["image_latent"], "z_T": inputs["sample"],
        "focal": 2.0, "plan": ddim_steps(manifest.schedule, 5, guidance=3.0, guidance_interval=(0.3, 1.0)),
        "guidance": 3.0, "guidance_rescale": 0.5,
    }  # fmt: skip
    with (
        OnnxRuntimeEngines(*plain, device="cpu").open_sampler(bundle, manifest) as sampler,
        OnnxRuntimeEngines(*plain, device="cpu", low_memory=True).open_sampler(bundle, manifest) as low,
        OnnxRuntimeBackend("cpu").open_sampler(bundle, manifest) as host,
    ):
        found, split, expected = sampler(**given), low(**given), host(**given)
    assert np.linalg.norm(found - expected) < 2e-2 * np.linalg.norm(expected)
    assert np.linalg.norm(split - found) < 1e-3 * np.linalg.norm(found)
