"""TensorRT and TensorRT-RTX: engines that `build-engines` made, through the one API that both have.

Neither has run on a GPU of ours yet (`docs/engines.md`): what is tested here is everything but the
libraries themselves.  Their own CUDA graphs are used where they offer them; contexts of one engine share
their activation memory.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.backends.base import Backend, Network, check_inputs
from uc3d_rt.contract import Manifest, NetworkSpec, network_specs
from uc3d_rt.cuda_device import CudaBuffer, CudaDevice
from uc3d_rt.engines import LIBRARY_MODULES, REBUILD, EngineSet, verified_engine_path
from uc3d_rt.errors import BackendError
from uc3d_rt.ladder import LowMemory, rung_of

FloatArray = NDArray[np.float32]


class TensorRtEngines(Backend):
    """Opens the engines of one folder."""

    def __init__(
        self, folder: Path, engines: EngineSet, low_memory: LowMemory = False, ordinal: int = 0
    ) -> None:
        """Take the engines of a folder.

        Raises:
            BackendError: their library does not load.
        """
        self.low_memory = rung_of(low_memory)
        self.ordinal = ordinal  # of the GPU
        self.folder = folder
        self.engines = engines
        try:
            self.library = importlib.import_module(LIBRARY_MODULES[engines.backend])
        except ImportError as error:
            raise BackendError(f"{engines.backend} does not load ({error}); install it again") from error

    def open(self, bundle: Path, manifest: Manifest, name: str) -> Network:
        """Verify and load one network; raises as `Backend.open`."""
        path = verified_engine_path(self.engines, self.folder, name)
        spec, views = network_specs(manifest.shape)[name], manifest.shape.views
        batches = self.engines.engines[name].batches
        batch = batches[0] if len(batches) == 1 else None
        return TensorRtNetwork(self.library, path, spec, views, batch, self.ordinal)


class _Call:
    """One engine at one set of shapes: its context, and a buffer for each tensor."""

    def __init__(self, context: Any, buffers: dict[str, CudaBuffer]) -> None:
        self.context, self.buffers = context, buffers


class TensorRtNetwork(Network):
    """An engine and its contract."""

    def __init__(
        self,
        library: ModuleType,
        path: Path,
        spec: NetworkSpec,
        views: int,
        batch: int | None,
        ordinal: int = 0,
    ) -> None:
        """Load an engine file.

        Args:
            library: `tensorrt` or `tensorrt_rtx`.
            path: of the engine.
            spec: what it must take and give.
            views: of a sample.
            batch: how many a call takes, where that is fixed.
            ordinal: of the GPU.

        Raises:
            BackendError: the library refuses the engine, or there is no GPU.
        """
        self.batch = batch
        self._library, self._path, self._spec, self._views = library, path, spec, views
        self._calls: dict[tuple[tuple[int, ...], ...], _Call] = {}
        self._scratch: CudaBuffer | None = None
        self._cache: Any = None
        self._device: CudaDevice | None = CudaDevice(ordinal)
        try:
            self._logger = library.Logger(library.Logger.ERROR)
            with self._device.current():
                self._runtime = library.Runtime(self._logger)
                self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            if self._engine is None:
                raise BackendError(
                    f"{library.__name__} {library.__version__} does not open {path} on this GPU; {REBUILD}"
                )
            self._names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
            wanted = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
            if set(self._names) != wanted:
                raise BackendError(
                    f"{path} has the tensors {sorted(self._names)}, not {sorted(wanted)}; {REBUILD}"
                )
        except BaseException:
            self.close()
            raise

    def __call__(self, **inputs: FloatArray) -> dict[str, FloatArray]:
        """Run once; raises as `Network.__call__`."""
        if self._device is None:
            raise ValueError(f"{self._spec.name} is closed; open it again")
        check_inputs(self._spec, inputs, self._views)
        shapes = tuple(inputs[tensor.name].shape for tensor in self._spec.inputs)
        if shapes not in self._calls:
            with self._device.current():
                self._calls[shapes] = self._prepared({name: value.shape for name, value in inputs.items()})
        call = self._calls[shapes]
        for name, value in inputs.items():
            self._device.upload(value.astype(call.buffers[name].dtype, copy=False), call.buffers[name])
        with self._device.current():
            queued = call.context.execute_async_v3(self._device.stream)
        if not queued:
            raise BackendError(
                f"{self._spec.name} failed in {self._library.__name__}; "
                "if memory ran out, free some of the GPU's"
            )
        return {
            tensor.name: np.asarray(self._device.download(call.buffers[tensor.name]), np.float32)
            for tensor in self._spec.outputs
        }

    def close(self) -> None:
        """Free engine and memory, and keep what the library compiled for this GPU for the next time."""
        device, self._device = self._device, None
        if device is None:
            return
        with device.current():
            if self._cache is not None:
                _keep(bytes(self._cache.serialize()), self._cache_path)
            self._calls.clear()  # contexts go before their engine, the engine before its runtime
            self._cache = self._engine = self._runtime = None
        device.close()

    @property
    def _cache_path(self) -> Path:
        return self._path.with_name(f"{self._path.stem}.runtime-cache")

    def _prepared(self, shapes: dict[str, tuple[int, ...]]) -> _Call:
        """A context for some input shapes, in the profile made for them."""
        engine, device = self._engine, self._device
        assert device is not None
        profiles = range(max(engine.num_optimization_profiles, 1))
        profile = next((p for p in profiles if all(self._takes(p, n, s) for n, s in shapes.items())), None)
        if profile is None:
            raise BackendError(f"{self._path} was not built for inputs of {shapes}; {REBUILD}")
        context = self._context()
        scratch = self._scratch_of(profile)
        context.set_device_memory(scratch.address, scratch.nbytes)
        if not context.set_optimization_profile_async(profile, device.stream):
            raise BackendError(f"{self._path} refuses its profile {profile}; {REBUILD}")
        buffers = {}
        for name in self._names:
            if name in shapes:
                context.set_input_shape(name, shapes[name])
        for name in self._names:
            kind = np.dtype(self._library.nptype(engine.get_tensor_dtype(name)))
            buffers[name] = device.empty(tuple(context.get_tensor_shape(name)), kind.type)
            context.set_tensor_address(name, buffers[name].address)
        device.wait()
        return _Call(context, buffers)

    def _scratch_of(self, profile: int) -> CudaBuffer:
        """Activation memory that is large enough for a profile; all contexts share it."""
        device, old = self._device, self._scratch
        assert device is not None
        needed = max(int(self._engine.get_device_memory_size_for_profile_v2(profile)), 1)
        if old is not None and old.nbytes >= needed:
            return old
        calls, self._calls, self._scratch = self._calls, {}, None  # none are left if there is not enough
        if old is not None:
            device.free([old])
        self._scratch, self._calls = device.empty((needed,), np.uint8), calls
        for call in calls.values():
            call.context.set_device_memory(self._scratch.address, self._scratch.nbytes)
        return self._scratch

    def _takes(self, profile: int, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a profile's smallest and largest shape of an input are this one or lie around it."""
        fixed = tuple(self._engine.get_tensor_shape(name))
        if -1 not in fixed:
            return fixed == shape
        low, _, high = self._engine.get_tensor_profile_shape(name, profile)
        low, high = tuple(low), tuple(high)
        return len(low) == len(shape) and all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True))

    def _context(self) -> Any:
        """A new context whose activation memory is ours, with the library's CUDA graphs if it has them."""
        library, engine = self._library, self._engine
        given = library.ExecutionContextAllocationStrategy.USER_MANAGED
        config = engine.create_runtime_config() if hasattr(engine, "create_runtime_config") else None
        if config is None or not hasattr(config, "create_runtime_cache"):  # TensorRT itself
            return engine.create_execution_context(given)
        config.set_execution_context_allocation_strategy(given)
        config.cuda_graph_strategy = library.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._cache_path.is_file():  # one of another GPU or release is refused, and made anew
                self._cache.deserialize(self._cache_path.read_bytes())
        config.set_runtime_cache(self._cache)
        return engine.create_execution_context(runtime_config=config)


def _keep(content: bytes, path: Path) -> None:
    """Write a cache whole or not at all; a folder that cannot be written to only costs the time again."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
