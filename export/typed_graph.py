"""A bundle's ONNX file as a strongly typed fp16 graph: precision is written in the graph, nowhere else.

TensorRT 11 and TensorRT-RTX know no other way, and TensorRT 10 takes it too.  ONNX Runtime folds the
constants and converts; what stays here is which parts keep fp32, and the proof that nothing was lost.
Needs no torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.data_file import data_path, is_apart, load_graph, openable
from export.quantized_graph import ActivationRanges, quantized_graph

FloatArray = NDArray[np.float32]

WEIGHTS = ("fp16", "int8")
"""fp16: int8-stored weights are dequantised; int8: they stay, and kernels dequantise as they read."""

FP32_OPS = ("GroupNormalization", "InstanceNormalization", "LayerNormalization", "Softmax")
"""The square of anything above 255 overflows fp16, and norms square what enters them; a softmax sums
exponentials."""

OPSET = 19  # the first whose DequantizeLinear has fp16 scales
OLDEST_OPSET = 18
IR_VERSION = 9
SMALLEST_SCALE = 3e-6  # fp16 is subnormal there, and keeps 1 % of it
MOVES = frozenset(
    ("Concat", "Expand", "Flatten", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose",
     "Unsqueeze")
)  # fmt: skip
"""Operators that only move values: nothing is rounded there."""


def typed_graph(
    source: Path, sizes: Mapping[str, int], weights: str = "fp16", precision: str = "fp16",
    ranges: ActivationRanges | None = None,
) -> onnx.ModelProto:  # fmt: skip
    """The network of an ONNX file in fp16, with norms, softmax and sine embeddings in fp32.

    Inputs and outputs stay float32, as in the contract.  The same file and arguments give the same
    bytes.

    Args:
        source: file of a bundle, fp32, its weights stored as fp32 or int8.
        sizes: free dimensions to fix, by name; what is left out stays free.
        weights: one of `WEIGHTS`.
        precision: "int8" and "fp8" quantise what `quantized_graph` chooses; the rest is fp16 in any case.
        ranges: of the network, where it is quantised.

    Raises:
        ValueError: ONNX Runtime or the checker refuses the graph, a scale is too small for fp16, or the
            file has its weights beside it.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    if data_path(source) is not None:
        raise ValueError(f"{source} is too large to be typed as a whole; build it with --backend onnxruntime")
    model = folded(source, sizes, keep_int8=weights == "int8")
    if precision != "fp16":
        if ranges is None:
            raise ValueError(f"{precision} needs the ranges of {source}")
        model = quantized_graph(model, ranges, precision)
    for opset in model.opset_import:
        if opset.domain == "" and opset.version < OLDEST_OPSET:
            raise ValueError(
                f"{source} is of opset {opset.version}; export the bundle again ({OLDEST_OPSET})"
            )
        if opset.domain == "":
            opset.version = max(opset.version, OPSET)  # what we use means the same in both
    model.ir_version = max(model.ir_version, IR_VERSION)
    _check_scales(model, source)
    model = convert_float_to_float16(
        model, keep_io_types=True, op_block_list=list(FP32_OPS), node_block_list=sine_embeddings(model)
    )
    model = tidied(model)
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as error:
        raise ValueError(f"{source} cannot be typed as fp16: {error}") from error
    return model


def folded(
    source: Path, sizes: Mapping[str, int], *, keep_int8: bool, room: Path | None = None
) -> onnx.ModelProto:
    """The graph after ONNX Runtime's basic optimisations: constants folded, standard operators only.

    Weights that stand beside the file are no constants to it: they are not read, and those stored as
    int8 stay so.

    Args:
        source: file of a bundle.
        sizes: free dimensions to fix, by name.
        keep_int8: keep weights that are stored so.
        room: folder for large constants of a graph whose weights stand beside it; it must outlast the graph.

    Raises:
        ValueError: ONNX Runtime refuses the graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it warns that a saved model should be run by the same version
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.disable_quant_qdq", "0" if keep_int8 else "1")
    for name, size in sizes.items():
        options.add_free_dimension_override_by_name(name, size)
    with tempfile.TemporaryDirectory() as folder:
        target, given, beside = Path(folder) / "folded.onnx", source, []
        if data_path(source) is not None:
            graph = load_graph(source)
            beside = [tensor for tensor in graph.graph.initializer if is_apart(tensor)]
            given = _with_weights_as_inputs(graph, Path(folder) / "given.onnx")
        if beside and room is not None:
            target = Path(tempfile.mkdtemp(dir=room)) / "folded.onnx"
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", "folded.bin"
            )
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_min_size_in_bytes", str(1 << 20)
            )
        options.optimized_model_filepath = str(target)
        try:
            onnxruntime.InferenceSession(
                str(given), options, providers=["CPUExecutionProvider"],
                # The first makes Gemm of what TensorRT fuses by itself; the second copies shared weights.
                disabled_optimizers=["MatMulAddFusion", "EnsureUniqueDQForNodeUnit"],
            )  # fmt: skip
        except Exception as error:  # its own classes share no base but Exception
            raise ValueError(
                f"ONNX Runtime refuses {source}: {' '.join(str(error).split())[:300]}"
            ) from error
        model = load_graph(target)
    names = {tensor.name for tensor in beside}
    inputs = [value for value in model.graph.input if value.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.graph.initializer.extend(beside)
    used = {node.domain for node in model.graph.node}
    kept = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return model


def _with_weights_as_inputs(model: onnx.ModelProto, target: Path) -> Path:
    """Write a graph that is given the weights which stand beside it."""
    kept = []
    for tensor in model.graph.initializer:
        if is_apart(tensor):
            value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            model.graph.input.append(value)
        else:
            kept.append(tensor)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    target.write_bytes(model.SerializeToString())
    return target


def relative_error(source: Path, model: onnx.ModelProto, inputs: Sequence[Mapping[str, FloatArray]]) -> float:
    """Largest relative 2-norm error of a typed graph's outputs against the file it was made from.

    ONNX Runtime on a CPU computes fp16 graphs in fp32 from cast to cast; here every fp16 value is
    rounded, as it would be on a GPU.  A value that is no number makes the error NaN.
    """
    truth = cpu_session(source)
    rounded = rounded_session(model)
    names = [output.name for output in truth.get_outputs()]
    errors = []
    for given in inputs:
        pairs = zip(rounded.run(names, dict(given)), truth.run(names, dict(given)), strict=True)
        errors += [np.linalg.norm(value - true) / np.linalg.norm(true) for value, true in pairs]
    return float(np.max(errors))


def cpu_session(model: onnx.ModelProto | Path) -> Any:
    """An ONNX Runtime session on the CPU that dequantises weights and computes as the graph is typed."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # as the runtime does
    if isinstance(model, Path):
        return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    with openable(model) as given:
        return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def rounded_session(model: onnx.ModelProto) -> Any:
    """An ONNX Runtime session on the CPU of a typed graph, with every fp16 value rounded."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Optimisations would take the rounding for a cast to and fro, and remove it.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with openable(with_rounding(model)) as emulated:
        return onnxruntime.InferenceSession(emulated, options, providers=["CPUExecutionProvider"])


def with_rounding(model: onnx.ModelProto) -> onnx.ModelProto:
    """The typed graph in fp32, with every value that was fp16 rounded to it and back."""
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    graph = model.graph
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    nodes = []
    for tensor in graph.initializer:
        if is_apart(tensor) and tensor.data_type == TensorProto.FLOAT16:
            name, tensor.name = tensor.name, f"{tensor.name}__stored"  # not read here
            nodes.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
        else:
            _widen(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                _widen(attribute.t)
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
        nodes.append(node)
        if node.op_type in MOVES:
            continue
        for position, name in enumerate(node.output):
            if types.get(name) == TensorProto.FLOAT16:
                exact, half = f"{name}__exact", f"{name}__half"
                node.output[position] = exact
                nodes.append(helper.make_node("Cast", [exact], [half], to=TensorProto.FLOAT16))
                nodes.append(helper.make_node("Cast", [half], [name], to=TensorProto.FLOAT))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return model


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT16:
        wide = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))


def sine_embeddings(model: onnx.ModelProto) -> list[str]:
    """Names of sines, cosines and all that leads to them: t times a frequency needs more than 11 bits."""
    maker: dict[str, Any] = {name: node for node in model.graph.node for name in node.output}
    found: set[str] = set()
    waiting = [node for node in model.graph.node if node.op_type in ("Sin", "Cos")]
    while waiting:
        node = waiting.pop()
        if node.name not in found:
            found.add(node.name)
            waiting += [maker[name] for name in node.input if name in maker]
    return sorted(found)


def tidied(model: onnx.ModelProto) -> onnx.ModelProto:
    """What the converter left, in order, each cast once, and no value rounded on its way to fp32.

    It appends its casts at the end, and casts an input to fp16 and back for every fp32 reader, each
    time to the same name.
    """
    seen: set[bytes] = set()
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Cast":
            what = b"|".join(name.encode() for name in (*node.input, "", *node.output))
            if what in seen:
                continue
            seen.add(what)
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _reach_past_rounding(model)
    ordered = in_order(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(ordered)
    return model


def in_order(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Nodes so that each stands behind those whose outputs it reads, else as they were.

    ONNX Runtime's own sort of its graph tools takes a second for a UNet, as long as all else here.
    """
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    maker = {name: index for index, node in enumerate(copies) for name in node.output if name}
    ordered: list[onnx.NodeProto] = []
    done = [False] * len(copies)
    for start in range(len(copies)):
        waiting = [start]
        while waiting:
            index = waiting[-1]
            before = [maker[name] for name in copies[index].input if name in maker]
            left = [other for other in before if not done[other]]
            if done[index] or not left:
                waiting.pop()
                if not done[index]:
                    done[index] = True
                    ordered.append(copies[index])
            else:
                waiting += reversed(left)
    return ordered


def _reach_past_rounding(model: onnx.ModelProto) -> None:
    """Readers of an fp32 input that was cast to fp16 and back read the input itself."""
    given = {value.name for value in model.graph.input}
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    halved = {node.output[0]: node.input[0] for node in casts if node.input[0] in given}
    whole = {
        node.output[0]: halved[node.input[0]]
        for node in casts
        if node.input[0] in halved and node.attribute[0].i == TensorProto.FLOAT
    }
    kept = []
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = whole.get(name, name)
        if not (node.output and node.output[0] in whole):
            kept.append(node)
    read = {name for node in kept for name in node.input} | {value.name for value in model.graph.output}
    kept = [node for node in kept if node.op_type != "Cast" or node.output[0] in read]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _check_scales(model: onnx.ModelProto, source: Path) -> None:
    """Scales of int8 weights become fp16: none may vanish there."""
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[1] in values:
            smallest = float(np.abs(numpy_helper.to_array(values[node.input[1]])).min())
            if smallest < SMALLEST_SCALE:
                raise ValueError(
                    f"{source}: {node.input[1]} holds the scale {smallest:.1e}, too small for fp16; "
                    "build with --weights fp16 --precision fp16"
                )
