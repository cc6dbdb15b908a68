"""What int8 and fp8 on GPUs need and what they cost: ranges found on real samples, and samples compared."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.quantization import recorded_calls, sampled
from export.quantized_graph import (
    QUANTIZED,
    QUANTIZED_NETWORK,
    Accuracy,
    ActivationRanges,
    find_ranges,
    save_ranges,
)
from export.typed_graph import folded
from export.verification import TypedBackend, views_psnr
from uc3d_rt.backends.base import Backend
from uc3d_rt.backends.onnxruntime import OnnxRuntimeBackend
from uc3d_rt.contract import Manifest, load_manifest, verified_network_path
from uc3d_rt.errors import OutputError, UsageError

FloatArray = NDArray[np.float32]

STEPS = 8
"""Of the samples: few, for every fp16 value is rounded on a CPU, and as good as many."""

COMPARED_CALLS = 10


def quantize_for_gpus(
    bundle: Path, pictures: Sequence[Path], *, say: Callable[[str], None] = lambda text: None
) -> ActivationRanges:
    """Find the ranges of a bundle's UNet on pictures, and what fp16, int8 and fp8 make of their samples.

    Writes `activation_ranges.json` into the bundle, which `build-engines --precision int8|fp8` reads.
    Needs no GPU: precisions are compared on graphs that round as a GPU would.

    Args:
        bundle: folder with `manifest.json`.
        pictures: of objects; the more like those to come, the better.
        say: told what is done.

    Raises:
        UsageError: no pictures.
        ImageError: a picture cannot be read or shows no object.
        OutputError: the bundle's folder cannot be written to.
    """
    if not pictures:
        raise UsageError("give at least one picture to find ranges on")
    manifest = load_manifest(bundle)
    source = verified_network_path(bundle, manifest, QUANTIZED_NETWORK)
    plain = OnnxRuntimeBackend("cpu")
    say(f"sampling {len(pictures)} pictures in fp32, {STEPS} steps")
    calls, truth = recorded_calls(bundle, manifest, plain, pictures, STEPS)
    say(f"finding ranges on {len(calls)} calls")
    ranges = find_ranges(source, folded(source, {}, keep_int8=False), calls)
    accuracy = {}
    for precision in ("fp16", *QUANTIZED):
        say(f"sampling in {precision}")
        backend = TypedBackend(precision, ranges)
        views = sampled(bundle, manifest, backend, pictures, STEPS)
        pairs = zip(views, truth, strict=True)
        decibels = tuple(round(views_psnr(view, true)["colour"], 2) for view, true in pairs)
        error = float(f"{_call_error(bundle, manifest, plain, backend, calls):.3g}")
        accuracy[precision] = Accuracy(error, decibels)
    ranges = replace(ranges, accuracy=accuracy)
    try:
        save_ranges(ranges, bundle)
    except OSError as error:
        raise OutputError(f"cannot write to {bundle} ({error.strerror or error})") from error
    return ranges


def _call_error(
    bundle: Path, manifest: Manifest, plain: Backend, backend: Backend,
    calls: Sequence[Mapping[str, FloatArray]],
) -> float:  # fmt: skip
    """Median relative 2-norm error of some calls, spread over all."""
    errors = []
    with (
        plain.open(bundle, manifest, QUANTIZED_NETWORK) as exact,
        backend.open(bundle, manifest, QUANTIZED_NETWORK) as rounded,
    ):
        for inputs in calls[:: max(1, len(calls) // COMPARED_CALLS)]:
            true, found = (network(**inputs)["prediction"] for network in (exact, rounded))
            errors.append(float(np.linalg.norm(found - true) / np.linalg.norm(true)))
    return statistics.median(errors)
