"""The UNet for GPUs with some products in int8 or fp8: which, with what scales, and the graph of it.

ONNX Runtime's calibrator finds how large what enters a product gets, and its quantizer writes int8
quantise-dequantise pairs; fp8 takes the same pairs with other numbers in them.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from uc3d_rt.contract import sha256_of
from uc3d_rt.errors import BackendError, BundleError

FloatArray = NDArray[np.float32]

QUANTIZED = ("int8", "fp8")
QUANTIZED_NETWORK = "unet"
"""The one that is called often; the others are called once a picture."""

LARGEST = {"int8": 127.0, "fp8": 448.0}
"""Largest number of each format: int8 without -128, and E4M3."""

LEAST_SAMPLE_DB = 28.0
"""Smallest PSNR of a sample's views against fp32's that int8 and fp8 may have."""

RANGES_NAME = "activation_ranges.json"
FORMAT_VERSION = 1

LEFT_IN_FP16 = re.compile(
    r"/conv_in/|/conv_out/"  # thin, and they hold the detail
    r"|conv_shortcut|samplers\."  # read the residual stream, whose noise late calls see most of
    r"|/ff/net\.2/"  # reads products of two activations: few of them are large, and set the scale
    r"|time_|/down_blocks\.0/"  # the finest level, at both ends
)
"""Modules whose products keep fp16, by their names in the graph; so does the last of the `up_blocks`."""


@dataclass(frozen=True)
class Accuracy:
    """What a precision does to a bundle's samples, on a CPU that rounds as a GPU would."""

    relative_error: float  # of a call, 2-norm, the median
    sample_db: tuple[float, ...]  # colour views against fp32's, a picture each


@dataclass(frozen=True)
class ActivationRanges:
    """`activation_ranges.json` of a bundle: how large what enters the UNet's products gets."""

    source_sha256: str  # of the UNet's ONNX file
    calls: int  # that they were found on
    largest: dict[str, float]  # by the product's name in the graph
    accuracy: dict[str, Accuracy] = field(default_factory=dict)  # by precision, fp16 among them
    format_version: int = FORMAT_VERSION


def save_ranges(ranges: ActivationRanges, bundle: Path) -> None:
    """Write them into a bundle's folder, atomically."""
    temporary = bundle / f".{RANGES_NAME}.{os.getpid()}.tmp"
    try:
        temporary.write_text(json.dumps(asdict(ranges), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, bundle / RANGES_NAME)
    finally:
        temporary.unlink(missing_ok=True)


def load_ranges(bundle: Path, unet_sha256: str) -> ActivationRanges:
    """Read and check a bundle's ranges.

    Raises:
        BackendError: there are none, or they are of another UNet.
        BundleError: the file is damaged.
    """
    path, mend = bundle / RANGES_NAME, "run: python -m export quantize --for gpu PICTURES"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format_version"] != FORMAT_VERSION:
            raise BackendError(f"{path} is of another version of this tool; {mend}")
        accuracy = {
            name: Accuracy(float(one["relative_error"]), tuple(one["sample_db"]))
            for name, one in data.pop("accuracy").items()
        }
        ranges = ActivationRanges(**data, accuracy=accuracy)
        if not all(0.0 < float(value) < np.inf for value in ranges.largest.values()):
            raise ValueError("a range is no positive number")
    except FileNotFoundError as error:
        raise BackendError(f"{path} is missing, and int8 and fp8 need it; {mend}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{path} is damaged ({error}); {mend}") from error
    if ranges.source_sha256 != unet_sha256:
        raise BackendError(f"{path} was made for another UNet than the bundle's; {mend}")
    return ranges


def products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Convolutions and matrix products with constant weights that may be quantised, in order."""
    weights = {tensor.name for tensor in model.graph.initializer}
    found = [
        node for node in model.graph.node if node.op_type in ("Conv", "MatMul") and node.input[1] in weights
    ]
    levels = {int(n) for node in found for n in re.findall(r"/up_blocks\.(\d+)/", node.name)}
    last = f"/up_blocks.{max(levels, default=0)}/"
    return [node for node in found if not LEFT_IN_FP16.search(node.name) and last not in node.name]


def find_ranges(
    source: Path, model: onnx.ModelProto, calls: Sequence[Mapping[str, FloatArray]]
) -> ActivationRanges:
    """How large what enters each product gets in some calls.

    Args:
        source: file of the bundle that `model` was made of.
        model: fp32, its constants folded: see `typed_graph.folded`.
        calls: inputs of the network, as real samples have them.
    """
    from onnxruntime.quantization import CalibrationDataReader, create_calibrator

    class Calls(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(calls)

        def get_next(self) -> Mapping[str, FloatArray] | None:
            return next(self._left, None)

    with tempfile.TemporaryDirectory() as folder:
        plain, augmented = Path(folder) / "plain.onnx", Path(folder) / "augmented.onnx"
        onnx.save(model, plain)
        calibrator = create_calibrator(plain, ["Conv", "MatMul"], augmented_model_path=str(augmented))
        calibrator.collect_data(Calls())
        data = calibrator.compute_data().data
        del calibrator  # it holds the file
    largest = {}
    for node in products(model):
        low, high = (float(np.asarray(bound).item()) for bound in data[node.input[0]].range_value)
        largest[node.name] = float(f"{max(-low, high, 1e-6):.6g}")
    return ActivationRanges(sha256_of(source), len(calls), largest)


def quantized_graph(model: onnx.ModelProto, ranges: ActivationRanges, precision: str) -> onnx.ModelProto:
    """An fp32 graph whose products get what int8 or fp8 can hold, by quantise-dequantise pairs.

    Args:
        model: fp32, its constants folded, of opset 19 or later for fp8; left as it is.
        ranges: of it.
        precision: one of `QUANTIZED`.

    Raises:
        ValueError: a product of the graph has no range.
    """
    from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, TensorsData

    chosen = products(model)
    missing = [node.name for node in chosen if node.name not in ranges.largest]
    if missing:
        raise ValueError(
            f"{RANGES_NAME} knows nothing of {missing[0]} and {len(missing) - 1} more; "
            "run: python -m export quantize --for gpu PICTURES"
        )
    bounds = {node.input[0]: np.float32(ranges.largest[node.name]) for node in chosen}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    exact = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    quantizer = QDQQuantizer(
        copy,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8,
        tensors_range=TensorsData(
            CalibrationMethod.MinMax, {name: (-bound, bound) for name, bound in bounds.items()}
        ),
        nodes_to_quantize=[node.name for node in chosen],
        nodes_to_exclude=[],
        op_types_to_quantize=["Conv", "MatMul"],
        extra_options={
            "ActivationSymmetric": True,  # TensorRT knows no zero points
            "WeightSymmetric": True,
            "QuantizeBias": False,  # nor int32 biases
            "OpTypesToExcludeOutputQuantization": ["Conv", "MatMul"],
        },
    )
    quantizer.quantize_model()
    made: onnx.ModelProto = quantizer.model.model
    if precision == "fp8":
        _as_fp8(made, exact)
    return made


def _as_fp8(model: onnx.ModelProto, exact: Mapping[str, NDArray[Any]]) -> None:
    """Turn int8 pairs into E4M3 ones of the same ranges; weights are rounded from their exact values."""
    import ml_dtypes

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    ratio = np.float32(LARGEST["int8"] / LARGEST["fp8"])
    done: set[str] = set()
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero = (constants[name] for name in node.input[1:3])
        if zero.data_type not in (TensorProto.INT8, TensorProto.FLOAT8E4M3FN):
            continue  # weights that the bundle stores as int8
        if scale.name not in done:
            done.add(scale.name)
            scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * ratio, scale.name))
            count = int(np.prod(zero.dims))
            zero.CopyFrom(helper.make_tensor(zero.name, TensorProto.FLOAT8E4M3FN, zero.dims, np.zeros(count)))
        if node.input[0] in constants:
            weight = constants[node.input[0]]
            scales = numpy_helper.to_array(scale)
            value = exact[weight.name.removesuffix("_quantized")]
            if scales.ndim:
                axis = next(a.i for a in node.attribute if a.name == "axis") % value.ndim
                scales = scales.reshape([-1 if k == axis else 1 for k in range(value.ndim)])
            rounded = np.clip(value / scales, -LARGEST["fp8"], LARGEST["fp8"])
            weight.CopyFrom(numpy_helper.from_array(rounded.astype(ml_dtypes.float8_e4m3fn), weight.name))
