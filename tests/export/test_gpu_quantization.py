"""`quantize --for gpu` and `build-engines --precision`: rounded as written, measured, and refused."""

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from export import gpu_quantization
from export.__main__ import cli
from export.engine_plan import BuildOptions, plan_build
from export.engines import build
from export.quantized_graph import (
    RANGES_NAME,
    Accuracy,
    ActivationRanges,
    find_ranges,
    load_ranges,
    products,
    quantized_graph,
    save_ranges,
)
from export.typed_graph import cpu_session, folded, typed_graph
from export.verification import TypedBackend, verify
from uc3d_rt.contract import load_manifest, sha256_of
from uc3d_rt.errors import BackendError, BundleError

LARGEST = {"int8": 127.0, "fp8": 448.0}


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, onnx.ModelProto, dict[str, np.ndarray]]:
    """A convolution and a product, in a file, and their weights; a second product is left alone by name."""
    rng = np.random.default_rng(0)
    # Channels of very different size: one scale for all of them would lose the small ones.
    weights = {
        "kernel": (rng.standard_normal((5, 3, 3, 3)) * 10.0 ** np.arange(-2, 3)[:, None, None, None]),
        "bias": rng.standard_normal(5),
        "matrix": rng.standard_normal((5, 4)) * 10.0 ** np.arange(-1, 3),
        "last": rng.standard_normal((4, 4)),
    }
    weights = {name: value.astype(np.float32) for name, value in weights.items()}
    nodes = [
        helper.make_node(
            "Conv", ["image", "kernel", "bias"], ["c"], "/unet/mid_block/conv1/Conv", pads=[1] * 4
        ),
        helper.make_node("Transpose", ["c"], ["rows"], perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["rows", "matrix"], ["p"], "/unet/mid_block/attn1/to_q/MatMul"),
        helper.make_node("MatMul", ["p", "last"], ["out"], "/unet/up_blocks.0/attn1/to_q/MatMul"),
    ]
    shapes = {"image": [2, 3, 6, 6], "c": [2, 5, 6, 6], "p": [2, 6, 6, 4], "out": [2, 6, 6, 4]}
    values = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in shapes.items()
    }
    graph = helper.make_graph(
        nodes, "small", [values["image"]], [values["c"], values["p"], values["out"]],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    path = tmp_path / "small.onnx"
    onnx.save(model, path)
    return path, model, weights


def unchanged_session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """What is written, and no pair moved to where it would do as well."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def rounded(value: np.ndarray, scale: np.ndarray, precision: str) -> np.ndarray:
    """What a format keeps of a value, in float64."""
    scaled = value.astype(np.float64) / scale
    if precision == "int8":
        return np.clip(np.rint(scaled), -127, 127) * scale
    clipped = np.clip(scaled, -448, 448).astype(np.float32)
    return clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def convolved(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    padded = np.pad(image, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.einsum("bchwij,ocij->bohw", windows, kernel)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_products_are_rounded_as_the_format_does(
    small: tuple[Path, onnx.ModelProto, dict[str, np.ndarray]], precision: str
) -> None:
    path, model, weights = small
    calls = [{"image": np.random.default_rng(k).standard_normal((2, 3, 6, 6)).astype("f4")} for k in (1, 2)]
    ranges = find_ranges(path, model, calls)
    assert [node.name for node in products(model)] == list(ranges.largest)
    assert list(ranges.largest) == ["/unet/mid_block/conv1/Conv", "/unet/mid_block/attn1/to_q/MatMul"]
    exact = [cpu_session(model).run(["c"], call)[0] for call in calls]
    for found, seen in zip(ranges.largest.values(), ([c["image"] for c in calls], exact), strict=True):
        assert found == pytest.approx(max(float(np.abs(one).max()) for one in seen), rel=1e-5)

    before = model.SerializeToString()
    made = quantized_graph(model, ranges, precision)
    assert model.SerializeToString() == before
    found_c, found_p, found_out = unchanged_session(made).run(["c", "p", "out"], calls[0])
    largest = LARGEST[precision]
    in_image, in_rows = (value / largest for value in ranges.largest.values())
    kernel = rounded(
        weights["kernel"],
        np.abs(weights["kernel"]).max((1, 2, 3), keepdims=True).astype(np.float64) / largest,
        precision,
    )
    c = convolved(rounded(calls[0]["image"], in_image, precision), kernel) + weights["bias"][:, None, None]
    scale = np.abs(weights["matrix"]).max(0).astype(np.float64) / largest
    matrix = rounded(weights["matrix"], scale, precision)
    p = rounded(found_c.transpose(0, 2, 3, 1), in_rows, precision) @ matrix
    np.testing.assert_allclose(found_c, c, rtol=0, atol=2e-3 * np.abs(c).max())
    assert np.mean(np.abs(found_c - c) > 1e-5 * np.abs(c).max()) < 0.02  # ties may be broken otherwise
    np.testing.assert_allclose(found_p, p, rtol=0, atol=1e-4 * np.abs(p).max())
    np.testing.assert_allclose(found_out, found_p @ weights["last"], rtol=1e-5, atol=1e-4)  # left alone


def test_a_product_without_a_range_is_named(
    small: tuple[Path, onnx.ModelProto, dict[str, np.ndarray]],
) -> None:
    path, model, _ = small
    with pytest.raises(ValueError, match=r"/unet/mid_block/conv1/Conv and 1 more; run: .*--for gpu"):
        quantized_graph(model, ActivationRanges(sha256_of(path), 1, {}), "int8")


def test_the_finest_level_and_the_residual_stream_keep_fp16() -> None:
    edge = Path(__file__).parents[2] / "engines/edge"
    model = folded(edge / "unet.onnx", {}, keep_int8=False)
    names = [node.name for node in products(model)]
    assert len([name for name in names if name.endswith("/Conv")]) == 16
    for word in ("down_blocks.0", "up_blocks.2", "shortcut", "sampler", "net.2", "conv_in", "conv_out"):
        assert not any(word in name for name in names), word
    ranges = load_ranges(edge, sha256_of(edge / "unet.onnx"))  # those that ship
    assert set(ranges.largest) == set(names)
    kinds = {
        precision: {t.data_type for t in quantized_graph(model, ranges, precision).graph.initializer}
        for precision in LARGEST
    }
    assert TensorProto.INT8 in kinds["int8"] and TensorProto.FLOAT8E4M3FN in kinds["fp8"]
    assert TensorProto.INT8 not in kinds["fp8"]


def test_from_pictures_to_engines(copy: Path, object_png: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="builds engines; install the extra `engines`")
    monkeypatch.setattr(gpu_quantization, "STEPS", 2)
    result = run("quantize", "--for", "gpu", "--bundle", copy, object_png)
    assert result.exit_code == 0, result.output
    manifest = load_manifest(copy)
    ranges = load_ranges(copy, manifest.networks["unet"].sha256)
    errors = [ranges.accuracy[precision].relative_error for precision in ("fp16", "int8", "fp8")]
    assert errors == sorted(errors) and 1e-4 < errors[0] < 5e-3 < errors[2] < 0.2
    assert f"{len(ranges.largest)} products" in result.output and "fp8" in result.output
    good = {name: replace(one, sample_db=(40.0,)) for name, one in ranges.accuracy.items()}
    save_ranges(replace(ranges, accuracy=good), copy)  # random weights sample noise

    plan = plan_build(BuildOptions(copy, "tensorrt-rtx", ("sm_89", "sm_120"), precision="fp8"))
    some = tuple(job for job in plan.jobs if job.name in ("unet", "vae_decoder"))
    engines = build(replace(plan, jobs=some))
    assert engines.precision == "fp8" and engines.targets == ("sm_89", "sm_120")
    exact, rounded_ = engines.engines["vae_decoder"], engines.engines["unet"]
    assert exact.relative_error < 5e-3 < rounded_.relative_error
    command = ("build-engines", "--bundle", copy, "--backend", "tensorrt-rtx", "--target", "sm_89,sm_120")
    assert run(*command, "--precision", "fp8", "--dry-run").output.count("would be built") == 3
    assert run(*command, "--precision", "int8", "--dry-run").output.count("would be built") == 5
    plan = plan_build(BuildOptions(copy, "tensorrt-rtx", ("sm_86",), precision="int8"))
    unet = build(replace(plan, jobs=tuple(job for job in plan.jobs if job.name == "unet"))).engines["unet"]
    assert rounded_.relative_error > unet.relative_error > 1e-3

    # Other ranges, another UNet; the other networks stay.
    doubled = {name: 2 * value for name, value in ranges.largest.items()}
    save_ranges(replace(ranges, accuracy=good, largest=doubled), copy)
    plan = plan_build(BuildOptions(copy, "tensorrt-rtx", engines.targets, precision="fp8"))
    assert {job.name for job in plan.jobs if job.done} == {"vae_decoder"}


def test_verify_compares_what_can_be_built(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = load_manifest(copy)
    model = folded(copy / "unet.onnx", {}, keep_int8=False)
    largest = {node.name: 4.0 for node in products(model)}
    save_ranges(ActivationRanges(manifest.networks["unet"].sha256, 1, largest), copy)
    made = []

    class Recorded(TypedBackend):
        def __init__(self, precision: str = "fp16", ranges: ActivationRanges | None = None) -> None:
            made.append(precision)
            super().__init__(precision, ranges)

    monkeypatch.setattr("export.verification.TypedBackend", Recorded)
    checks = list(verify(copy, steps=2))
    assert made == ["fp16", "int8", "fp8"]
    samples = [check for check in checks if check.what.startswith("sample")]
    assert [check.form for check in samples] == ["fp16"] * 2 + ["int8"] * 2 + ["fp8"] * 2
    assert {check.limit for check in samples[2:]} == {28.0}


def test_bad_input(copy: Path, tmp_path: Path) -> None:
    build = ("build-engines", "--bundle", copy, "--backend", "tensorrt-rtx", "--dry-run", "--precision")
    result = run(*build, "int8")
    assert result.exit_code == 6 and "run: python -m export quantize --for gpu" in result.output
    manifest = load_manifest(copy)
    (copy / RANGES_NAME).write_text("{}")
    assert run(*build, "int8").exit_code == 4
    model = folded(copy / "unet.onnx", {}, keep_int8=False)
    ranges = ActivationRanges(
        manifest.networks["unet"].sha256, 1, {node.name: 4.0 for node in products(model)},
        {"int8": Accuracy(0.01, (40.0, 27.0)), "fp8": Accuracy(0.02, (40.0,))},
    )  # fmt: skip
    save_ranges(ranges, copy)
    result = run(*build, "int8")
    assert result.exit_code == 6 and "changes the bundle's views too much" in result.output
    assert "27.0 dB, limit 28" in " ".join(result.output.split())
    assert "for sm_89, sm_120" in run(*build, "fp8").output  # of all known, those that can
    result = run(*build, "fp8", "--target", "sm_86,sm_120")
    assert result.exit_code == 2 and "sm_86 cannot multiply fp8 numbers" in result.output
    assert run(*build, "int8", "--weights", "int8").exit_code == 2
    result = run("build-engines", "--bundle", copy, "--backend", "onnxruntime", "--precision", "fp8")
    assert result.exit_code == 2 and "ONNX Runtime multiplies no fp8 numbers" in result.output
    save_ranges(replace(ranges, source_sha256="0" * 64), copy)
    with pytest.raises(BackendError, match="made for another UNet"):
        load_ranges(copy, manifest.networks["unet"].sha256)
    data = json.loads((copy / RANGES_NAME).read_text()) | {"largest": {"a": -1.0}}
    (copy / RANGES_NAME).write_text(json.dumps(data))
    with pytest.raises(BundleError, match="no positive number"):
        load_ranges(copy, manifest.networks["unet"].sha256)
    with pytest.raises(ValueError, match="needs the ranges"):
        typed_graph(copy / "unet.onnx", {}, precision="int8")
    assert run("quantize", "--for", "gpu", "--bundle", copy, tmp_path / "none.png").exit_code == 3
    assert run("quantize", "--for", "gpu", "--bundle", tmp_path / "none", "x.png").exit_code == 4
    assert not list(copy.glob(".*tmp"))
