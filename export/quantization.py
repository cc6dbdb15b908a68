"""The UNet in int8 for CPUs, by ONNX Runtime's own quantizer: faster where it is faster, and measured.

Convolutions get fixed scales of what enters them, found on real pictures; matrix products get scales
at run time.  The first and the last convolution keep fp32: they are thin and hold the detail.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.folders import replace_folder
from export.typed_graph import IR_VERSION, OPSET, folded
from export.verification import SAMPLE_LIMIT_DB, views_psnr
from uc3d_rt.backends.base import Backend, Network
from uc3d_rt.backends.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeQuantized
from uc3d_rt.contract import Manifest, load_manifest, verified_network_path
from uc3d_rt.engines import BUILT_NAME, CPU, EngineFile, EngineSet, save_engine_set
from uc3d_rt.errors import BackendError, OutputError, UsageError
from uc3d_rt.pipeline import Pipeline, Views

FloatArray = NDArray[np.float32]
Inputs = dict[str, FloatArray]

RECIPE = 1
"""Counts changes of how the graph is made."""


@dataclass(frozen=True)
class Quantized:
    """What was made, and what it costs and gains on this machine."""

    folder: Path
    bytes: int
    relative_error: float  # of a call, 2-norm, the median over the calls of the pictures
    sample_db: tuple[float, ...]  # colour views in int8 against fp32, a picture each
    fp32_ms: float  # a call for one object
    int8_ms: float


def quantize(
    bundle: Path, pictures: Sequence[Path], *, say: Callable[[str], None] = lambda text: None
) -> Quantized:
    """Make the bundle's UNet int8 for CPUs; the runtime takes it from then on.

    Args:
        bundle: folder with `manifest.json`.
        pictures: what scales are found on, and samples compared on.
        say: told what is done.

    Raises:
        UsageError: no pictures.
        ImageError: a picture cannot be read or shows no object.
        BackendError: it is not faster on this machine, or changes the views too much; nothing is kept.
        OutputError: the bundle's folder cannot be written to.
    """
    import onnxruntime

    if not pictures:
        raise UsageError("give at least one picture to find scales on")
    manifest = load_manifest(bundle)
    source = verified_network_path(bundle, manifest, "unet")
    plain = OnnxRuntimeBackend("cpu")
    say(f"sampling {len(pictures)} pictures in fp32")
    calls, truth = recorded_calls(bundle, manifest, plain, pictures)
    say(f"finding scales on {len(calls)} calls")
    folder = bundle / BUILT_NAME / f"onnxruntime-{onnxruntime.__version__}-int8-cpu"
    with _new_folder(folder) as work:
        target = work / "unet.onnx"
        reduce_range = products_saturate()
        if reduce_range:
            say("this processor's int8 products saturate: weights get seven bits")
        int8_graph(source, target, calls, reduce_range)
        digest = hashlib.sha256(target.read_bytes()).hexdigest()
        key = hashlib.sha256(f"{manifest.networks['unet'].sha256} {RECIPE}".encode()).hexdigest()
        sha256 = manifest.networks["unet"].sha256

        def engines(error: float) -> EngineSet:
            entry = EngineFile(target.name, digest, target.stat().st_size, sha256, key, (1, 2), error)
            release = str(onnxruntime.__version__)
            return EngineSet("onnxruntime", release, (CPU,), "int8", manifest.profile, {"unet": entry})

        fast = OnnxRuntimeQuantized(work, engines(0.0))
        say("comparing calls")
        error, fp32_ms, int8_ms = _compared_calls(bundle, manifest, plain, fast, calls)
        if int8_ms >= fp32_ms:
            raise BackendError(
                f"int8 is not faster on this machine ({int8_ms:.0f} ms a call, fp32 {fp32_ms:.0f} ms); "
                "nothing was kept"
            )
        say("sampling in int8")
        found = sampled(bundle, manifest, fast, pictures)
        decibels = tuple(views_psnr(view, true)["colour"] for view, true in zip(found, truth, strict=True))
        limit = SAMPLE_LIMIT_DB["int8"]
        if min(decibels) < limit:
            raise BackendError(
                f"int8 changes the views too much ({min(decibels):.1f} dB, limit {limit:g}); nothing was "
                "kept: give more pictures, of the kind of things that you use it for"
            )
        save_engine_set(engines(error), work)
        size = target.stat().st_size
    return Quantized(folder, size, error, decibels, fp32_ms, int8_ms)


def products_saturate() -> bool:
    """Whether ONNX Runtime's int8 products overflow on this processor.

    Without VNNI they add two products in 16 bits, which 255 x 127 twice is too much for.
    """
    import onnxruntime

    values = [
        helper.make_tensor_value_info("a", TensorProto.UINT8, [32, 64]),
        helper.make_tensor_value_info("y", TensorProto.INT32, [32, 32]),
    ]
    weight = numpy_helper.from_array(np.full((64, 32), 127, np.int8), "b")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["y"])], "probe", values[:1], values[1:], [weight]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"a": np.full((32, 64), 255, np.uint8)})
    return bool((found != 64 * 255 * 127).any())


def int8_graph(source: Path, target: Path, calls: Sequence[Inputs], reduce_range: bool = False) -> None:
    """Write the quantised graph of a UNet's ONNX file.

    Args:
        source: the UNet in fp32.
        target: file to write.
        calls: inputs of the network to find ranges with.
        reduce_range: weights of seven bits, for processors on which `products_saturate`.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_dynamic as dynamic
    from onnxruntime.quantization import quantize_static as static

    class Calls(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(calls)

        def get_next(self) -> Inputs | None:
            return next(self._left, None)

    logger, level = logging.getLogger(), logging.getLogger().level
    with tempfile.TemporaryDirectory() as folder:
        exact, convolved = Path(folder) / "fp32.onnx", Path(folder) / "convolutions.onnx"
        model = folded(source, {}, keep_int8=False)
        onnx.save(model, exact)
        convolutions = [node.name for node in model.graph.node if node.op_type == "Conv"]
        try:
            logger.setLevel(logging.ERROR)  # it recommends a step that `folded` has done
            static(
                exact, convolved, Calls(), quant_format=QuantFormat.QDQ, op_types_to_quantize=["Conv"],
                nodes_to_exclude=[convolutions[0], convolutions[-1]], per_channel=True,
                reduce_range=reduce_range,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            )  # fmt: skip
            dynamic(
                convolved, target, op_types_to_quantize=["MatMul"], per_channel=True,
                reduce_range=reduce_range, weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )  # fmt: skip
        finally:
            logger.setLevel(level)


def recorded_calls(
    bundle: Path, manifest: Manifest, backend: Backend, pictures: Sequence[Path], steps: int | None = None
) -> tuple[list[Inputs], list[Views]]:
    """What the UNet is given, for one object, while pictures are sampled; and their views.

    Args:
        bundle: whose networks run.
        manifest: of the bundle.
        backend: that runs them.
        pictures: of objects.
        steps: of a sample; None takes the bundle's default.

    Returns:
        `(at most about CALIBRATION_CALLS inputs, spread over pictures and steps; views, a picture each)`.
    """
    calls: list[Inputs] = []

    class Recorder(Network):
        def __init__(self, network: Network) -> None:
            self._network = network

        def __call__(self, **inputs: FloatArray) -> dict[str, FloatArray]:
            batch = len(inputs["timestep"])
            calls.append({name: value[: len(value) // batch].copy() for name, value in inputs.items()})
            return self._network(**inputs)

        def close(self) -> None:
            self._network.close()

    class Recording(Backend):
        def open(self, bundle: Path, manifest: Manifest, name: str) -> Network:
            network = backend.open(bundle, manifest, name)
            return Recorder(network) if name == "unet" else network

    views = sampled(bundle, manifest, Recording(), pictures, steps)
    return calls[:: max(1, len(calls) // CALIBRATION_CALLS)], views


CALIBRATION_CALLS = 40
"""Calls that scales are found on, spread over pictures and steps."""


def sampled(
    bundle: Path, manifest: Manifest, backend: Backend, pictures: Sequence[Path], steps: int | None = None
) -> list[Views]:
    """The views of pictures; None takes the bundle's number of steps."""
    with Pipeline(bundle, manifest, backend) as pipeline:
        return [pipeline.views(picture, steps=steps) for picture in pictures]


def _compared_calls(
    bundle: Path, manifest: Manifest, plain: Backend, fast: Backend, calls: Sequence[Inputs]
) -> tuple[float, float, float]:
    """Median relative error, and the median milliseconds of both, each call made by one and the other."""
    errors: list[float] = []
    times: tuple[list[float], list[float]] = ([], [])
    with plain.open(bundle, manifest, "unet") as truth, fast.open(bundle, manifest, "unet") as network:
        for inputs in calls[: CALIBRATION_CALLS // 4]:
            found = []
            for one, spent in zip((truth, network), times, strict=True):
                started = time.perf_counter()
                found.append(one(**inputs)["prediction"])
                spent.append(1e3 * (time.perf_counter() - started))
            errors.append(float(np.linalg.norm(found[1] - found[0]) / np.linalg.norm(found[0])))
    return statistics.median(errors), statistics.median(times[0]), statistics.median(times[1])


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder that appears at its place when all in it is right, and not otherwise."""
    work = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        work.mkdir(parents=True)
        yield work
        replace_folder(target, work)
    except OSError as error:
        raise OutputError(f"cannot write to {target.parent} ({error.strerror or error})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
