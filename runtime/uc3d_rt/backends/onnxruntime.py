"""ONNX Runtime on the CPU or, when asked for, on a CUDA device."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.backends.base import Backend, Network, Place, check_inputs
from uc3d_rt.contract import Manifest, NetworkSpec, network_specs, verified_network_path
from uc3d_rt.engines import EngineSet, verified_engine_path
from uc3d_rt.errors import BackendError, BundleError, OutOfMemoryError
from uc3d_rt.ladder import OFF, LowMemory, Rung, lower_rungs, rung_of

FloatArray = NDArray[np.float32]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_NO_MORE_THAN_ASKED = {"arena_extend_strategy": "kSameAsRequested"}  # else powers of two
_NO_TRIALS = {"cudnn_conv_algo_search": "HEURISTIC"}  # of algorithms, which take memory while they are tried
_ERRORS_ONLY = 3  # ONNX Runtime's log severity
_NO_MEMORY = re.compile(
    r"failed to allocate memory|out of memory|_alloc_failed|bad.alloc|smaller than requested bytes"
    r"|resource allocation failed|cu(blas|dnn)_status_not_initialized|library was not initialized",
    re.IGNORECASE,
)
"""What the errors of its arenas, of CUDA, cuBLAS, cuDNN and C++ have in them where memory ran out.

cuBLAS and cuDNN that cannot allocate their handles say that they are not initialized.
"""
_CUDA_FAILURE = re.compile(r"\b(?:CUDA|CUBLAS|CUBLAS_LT|CUDNN|CUDNN_FE|CURAND|CUFFT) failure\b[^;]*")
"""What a failed call of CUDA's libraries said, behind some hundred characters of C++ signature."""


class OnnxRuntimeBackend(Backend):
    """Opens bundle networks as ONNX Runtime sessions."""

    def __init__(
        self, device: str = "cpu", threads: int | None = None, low_memory: LowMemory = False
    ) -> None:
        self.low_memory = rung_of(low_memory)
        self.device = device
        self.threads = threads

    def open(self, bundle: Path, manifest: Manifest, name: str) -> OnnxRuntimeNetwork:
        """Verify and load one network; raises as `Backend.open`."""
        path = verified_network_path(bundle, manifest, name)
        spec = network_specs(manifest.shape)[name]
        options = provider_options(self.device, {"use_tf32": "0"}, self.low_memory)  # fp32 is fp32
        session = open_session(path, self.device, self.threads, options, low_memory=self.low_memory)
        _check_session(session, spec, path)
        return OnnxRuntimeNetwork(session, spec, manifest.shape.views)


class OnnxRuntimeQuantized(OnnxRuntimeBackend):
    """The bundle's networks on the CPU, but for those that `python -m export quantize` made int8."""

    def __init__(
        self, folder: Path, engines: EngineSet, threads: int | None = None, low_memory: LowMemory = False
    ) -> None:
        super().__init__("cpu", threads, low_memory)
        self.folder = folder
        self.engines = engines

    def open(self, bundle: Path, manifest: Manifest, name: str) -> OnnxRuntimeNetwork:
        """Verify and load one network; raises as `Backend.open`."""
        if name not in self.engines.engines:
            return super().open(bundle, manifest, name)
        path = verified_engine_path(self.engines, self.folder, name)
        spec = network_specs(manifest.shape)[name]
        session = open_session(path, "cpu", self.threads, int8_kernels=True, low_memory=self.low_memory)
        _check_session(session, spec, path)
        return OnnxRuntimeNetwork(session, spec, manifest.shape.views)


class OnnxRuntimeNetwork(Network):
    """A session and its contract."""

    def __init__(self, session: Any, spec: NetworkSpec, views: int, batch: int | None = None) -> None:
        self.batch = batch
        self._session = session
        self._spec = spec
        self._views = views
        self._outputs = [tensor.name for tensor in spec.outputs]

    def __call__(self, **inputs: FloatArray) -> dict[str, FloatArray]:
        """Run once; raises as `Network.__call__`."""
        if self._session is None:
            raise ValueError(f"{self._spec.name} is closed; open it again")
        check_inputs(self._spec, inputs, self._views)
        with explained(self._spec.name):
            values = self._session.run(self._outputs, inputs)
        return dict(zip(self._outputs, values, strict=True))

    def close(self) -> None:
        """Free the session."""
        self._session = None


@contextmanager
def explained(name: str) -> Iterator[None]:
    """ONNX Runtime's errors while it runs a network as ours.

    Raises:
        BackendError: naming the network and what may help; OutOfMemoryError: for want of memory.
    """
    try:
        yield
    except _runtime_errors() as error:
        raise _out_of_memory(name, error) or BackendError(
            f"{name} failed in ONNX Runtime ({_one_line(error)}); run: uc3d-rt doctor; "
            f"if memory may have run out, {lower_rungs(OFF)}"
        ) from error


def provider_options(device: str, usual: dict[str, str], low_memory: Rung) -> dict[str, str]:
    """Options of a device's execution provider: the usual ones, and what a rung of the ladder adds."""
    if Place.named(device).kind == "cpu":
        return {}
    least = _NO_MORE_THAN_ASKED if low_memory.frees_stages else {}
    return usual | least | (_NO_TRIALS if low_memory.small_buffers else {})


def check_provider(device: str) -> str:
    """The execution provider of a device.

    Raises:
        BackendError: the installed ONNX Runtime has none for it.
    """
    import onnxruntime

    provider = _PROVIDERS[Place.named(device).kind]
    if provider not in onnxruntime.get_available_providers():
        raise BackendError(
            f"this ONNX Runtime has no {provider}; run: pip uninstall -y onnxruntime onnxruntime-gpu && "
            "pip install 'onnxruntime-gpu[cuda,cudnn]', or use --device cpu"
        )
    return provider


def open_session(
    path: Path,
    device: str,
    threads: int | None = None,
    provider_options: dict[str, str] | None = None,
    int8_kernels: bool = False,
    deterministic: bool = False,
    low_memory: Rung = OFF,
) -> Any:
    """A session on a device, and on no other.

    Args:
        path: ONNX file.
        device: a name of `uc3d_rt.backends.base.Place`.
        threads: CPU threads; None leaves the choice to ONNX Runtime.
        provider_options: of the device's execution provider.
        int8_kernels: compute in int8 what the file quantises; else such values are dequantised first.
        deterministic: take the kernels that give the same bits each time, where there are such.
        low_memory: rung of the ladder.

    Raises:
        BackendError: ONNX Runtime has no such provider, or it does not start, or refuses the file;
            OutOfMemoryError: for want of memory.
    """
    import onnxruntime

    provider = check_provider(device)
    place, given = Place.named(device), dict(provider_options or {})
    if place.kind == "cuda":
        if place.ordinal:  # naming the first one too makes ONNX Runtime 1.31 warn
            given["device_id"] = str(place.ordinal)
        onnxruntime.preload_dlls()  # finds the CUDA libraries that pip installed
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _ERRORS_ONLY
    options.use_deterministic_compute = deterministic
    # A block for all activations is taken at the second run, beside what the first one took in pieces.
    # (With CUDA graphs ONNX Runtime takes none in any case.)
    options.enable_mem_pattern = not low_memory.frees_stages
    if not int8_kernels:
        # Else int8-stored weights are fused into integer kernels that round activations too.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        # Without `enable_fallback=0` a session that cannot be made is tried again on the CPU.
        session = onnxruntime.InferenceSession(
            path, options, providers=[(provider, given)], enable_fallback=0
        )
    except _runtime_errors() as error:
        raise _out_of_memory(path.stem, error) or BackendError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {path} ({_one_line(error)}); "
            "upgrade it, or export the bundle again"
        ) from error
    # A provider that fails to start is replaced by the CPU without an error.
    running = session.get_providers()[0]
    if running != provider:
        raise BackendError(
            f"{provider} did not start and ONNX Runtime chose {running}; install the CUDA and cuDNN "
            "versions that onnxruntime-gpu asks for, or use --device cpu"
        )
    return session


def _check_session(session: Any, spec: NetworkSpec, path: Path) -> None:
    """Hold the file's inputs and outputs against the contract."""
    for kind, tensors, found in (
        ("input", spec.inputs, session.get_inputs()),
        ("output", spec.outputs, session.get_outputs()),
    ):
        shapes = {node.name: node for node in found}
        if set(shapes) != {tensor.name for tensor in tensors}:
            raise BundleError(
                f"{path} has the {kind}s {sorted(shapes)} instead of "
                f"{sorted(tensor.name for tensor in tensors)}; export the bundle again"
            )
        for tensor in tensors:
            node = shapes[tensor.name]
            fits = len(node.shape) == len(tensor.shape) and all(
                isinstance(want, str) or not isinstance(got, int) or want == got
                for want, got in zip(tensor.shape, node.shape, strict=True)
            )
            if not fits or node.type != "tensor(float)":
                raise BundleError(
                    f"{path}: {kind} {tensor.name} is {node.type} {node.shape} instead of "
                    f"{tensor.dtype} {tensor.shape}; export the bundle again"
                )


def _out_of_memory(name: str, error: Exception) -> OutOfMemoryError | None:
    """The error where a network's memory ran out, which ONNX Runtime says in words alone; else None."""
    if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
        return None
    return OutOfMemoryError(
        f"{name} ran out of memory in ONNX Runtime ({_one_line(error)})", lower_rungs(OFF)
    )


def _runtime_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises; calls with bindings and memory of its own raise Python's."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = (
        "EPFail",
        "Fail",
        "InvalidArgument",
        "InvalidGraph",
        "InvalidProtobuf",
        "NoModel",
        "NoSuchFile",
        "NotImplemented",
        "RuntimeException",
    )
    return (RuntimeError, MemoryError, *(getattr(state, name) for name in names))


def _one_line(error: Exception) -> str:
    told = " ".join(str(error).split())
    failure = _CUDA_FAILURE.search(told)
    return failure[0].strip() if failure else told[:300]
