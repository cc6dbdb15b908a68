"""A CUDA device: the one module that calls the driver, through NVIDIA's `cuda-bindings`.

`cuda-bindings` comes as wheels, where PyCUDA is compiled on the user's machine.  The kernels were compiled
beforehand (`python -m export build-kernels`) and stand beside their sources in `cuda/` as one fatbin.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.device import Buffer, Captured, Launch, Scalar
from uc3d_rt.errors import BackendError, OutOfMemoryError

FATBIN = Path(__file__).parent / "cuda" / "kernels.fatbin"
BLOCK = 128
OUT_OF_MEMORY = 2  # the driver's status
MENDS = {  # by the driver's status
    OUT_OF_MEMORY: "free memory of the GPU, use a smaller --resolution, or add --fit-device cpu",
    100: "no NVIDIA GPU was found; use --device cpu",
    209: "the kernels were not built for this GPU; run: python -m export build-kernels",
    222: "the kernels need a newer NVIDIA driver",
}
MAX_BLOCKS = 65535
"""Threads of a kernel take several elements where there are more."""


@dataclass(frozen=True)
class CudaBuffer:
    """Memory of the GPU."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def cuda_driver(ordinal: int = 0) -> Any:
    """The driver's Python module, after checking that the fit can run on a GPU; opens nothing on it.

    Raises:
        BackendError: no `cuda-bindings`, driver, GPU or kernels.
    """
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise BackendError(
            f"the fit on a GPU needs NVIDIA's cuda-bindings ({error}); run: pip install 'uc3d-rt[cuda]', "
            "or add --fit-device cpu"
        ) from error
    if not FATBIN.is_file():
        raise BackendError(f"{FATBIN} is missing; run: python -m export build-kernels")
    try:
        _call(driver, "cuInit", 0)
    except RuntimeError as error:  # the driver's library does not load
        raise BackendError(f"no NVIDIA driver ({error}); install it, or use --device cpu") from error
    (count,) = _call(driver, "cuDeviceGetCount")
    if ordinal >= count:
        raise BackendError(f"there is no GPU {ordinal}: the driver knows {count}; use --device cpu")
    return driver


def _call(driver: Any, name: str, *arguments: Any) -> tuple[Any, ...]:
    """Call the driver; its results without the status.

    Raises:
        BackendError: the driver says that it failed; OutOfMemoryError: for want of memory.
    """
    status, *results = getattr(driver, name)(*arguments)
    if int(status) == 0:
        return tuple(results)
    what = status.name
    mend = MENDS.get(int(status), "if another program broke the GPU's state, start this one again")
    if int(status) == OUT_OF_MEMORY:
        raise OutOfMemoryError(f"{name} failed on the GPU: {what}", mend)
    raise BackendError(f"{name} failed on the GPU: {what}; {mend}")


class CudaDevice:
    """The primary context of a GPU, which other libraries of the process share, and our kernels in it.

    Use it with `with`, from one thread at a time, whichever; all work goes into one stream.
    """

    def __init__(self, ordinal: int = 0) -> None:
        """Retain the context.

        Raises:
            BackendError: no `cuda-bindings`, driver, GPU or kernels.
        """
        self._driver = cuda_driver(ordinal)
        self._buffers: dict[int, CudaBuffer] = {}
        self._kernels: dict[str, Any] = {}
        self._context: Any = None
        self._module: Any = None
        self._stream: Any = None
        self._pool: Any = None
        self._graphs: list[Any] = []
        try:
            (self._device,) = self._call("cuDeviceGet", ordinal)
            (self._context,) = self._call("cuDevicePrimaryCtxRetain", self._device)
            (self._stream,) = self._call("cuStreamCreate", 1)  # does not wait for the default stream
            self._pool = self._new_pool(ordinal)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Free all memory and let go of the context; nothing else works any more."""
        driver, context = self._driver, self._context
        if context is None:
            return
        self._context = None
        driver.cuCtxPushCurrent(context)
        if self._stream is not None:
            driver.cuStreamSynchronize(self._stream)
        for graph in self._graphs:
            driver.cuGraphExecDestroy(graph)
        for address in self._buffers:
            driver.cuMemFree(address)
        self._graphs.clear()
        self._buffers.clear()
        if self._pool is not None:
            driver.cuMemPoolDestroy(self._pool)
        if self._module is not None:
            driver.cuModuleUnload(self._module)
        if self._stream is not None:
            driver.cuStreamDestroy(self._stream)
        driver.cuCtxPopCurrent()
        driver.cuDevicePrimaryCtxRelease(self._device)

    def _new_pool(self, ordinal: int) -> Any:
        """A pool that keeps what is freed, for what is taken next; None where the GPU has no pools."""
        driver = self._driver
        supported = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED
        if not self._call("cuDeviceGetAttribute", supported, self._device)[0]:
            return None
        properties = driver.CUmemPoolProps()
        properties.allocType = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = ordinal
        (pool,) = self._call("cuMemPoolCreate", properties)
        threshold = driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
        self._call("cuMemPoolSetAttribute", pool, threshold, driver.cuuint64_t(2**64 - 1))
        return pool

    def trim(self) -> None:
        """Give the memory that is free in our pool back to the GPU, for others."""
        self.wait()
        if self._pool is not None:
            self._call("cuMemPoolTrimTo", self._pool, 0)

    def empty(self, shape: Sequence[int], dtype: type[np.generic]) -> CudaBuffer:
        """See `Device`."""
        kind: np.dtype[Any] = np.dtype(dtype)
        nbytes = max(math.prod(shape) * kind.itemsize, 1)
        if self._pool is None:
            (address,) = self._call("cuMemAlloc", nbytes)
        else:
            (address,) = self._call("cuMemAllocFromPoolAsync", nbytes, self._pool, self._stream)
        buffer = CudaBuffer(int(address), tuple(shape), kind)
        self._buffers[buffer.address] = buffer
        return buffer

    def clear(self, buffer: Buffer) -> None:
        """See `Device`."""
        own = cast(CudaBuffer, buffer)
        self._call("cuMemsetD8Async", own.address, 0, own.nbytes, self._stream)

    def upload(self, array: NDArray[Any], buffer: Buffer) -> None:
        """See `Device`."""
        own = cast(CudaBuffer, buffer)
        if array.shape != own.shape or array.dtype != own.dtype:
            raise ValueError(f"{array.dtype} {array.shape} does not fit into {own.dtype} {own.shape}")
        source = np.ascontiguousarray(array)
        # From memory that may be swapped: the driver has copied it when the call returns.
        self._call("cuMemcpyHtoDAsync", own.address, source.ctypes.data, own.nbytes, self._stream)
        self.wait()

    def download(self, buffer: Buffer) -> NDArray[Any]:
        """See `Device`."""
        own = cast(CudaBuffer, buffer)
        array = np.empty(own.shape, own.dtype)
        self._call("cuMemcpyDtoHAsync", array.ctypes.data, own.address, own.nbytes, self._stream)
        self.wait()
        return array

    def free(self, buffers: Sequence[Buffer]) -> None:
        """See `Device`."""
        if self._pool is None:
            self.wait()
        for buffer in buffers:
            own = cast(CudaBuffer, buffer)
            del self._buffers[own.address]
            if self._pool is None:
                self._call("cuMemFree", own.address)
            else:
                self._call("cuMemFreeAsync", own.address, self._stream)

    def launch(self, kernel: str, threads: int, *arguments: Buffer | Scalar | None) -> None:
        """See `Device`."""
        self.repeat([(kernel, threads, arguments)], 1)

    def repeat(self, launches: Sequence[Launch], times: int) -> None:
        """See `Device`."""
        packed = [self._packed(*launch) for launch in launches]
        with self.current():
            for _ in range(times):
                for function, blocks, pointers, _values in packed:
                    size = (blocks, 1, 1, BLOCK, 1, 1)
                    _call(self._driver, "cuLaunchKernel", function, *size, 0, self._stream, pointers, 0)

    def capture(self, work: Callable[[], None]) -> Captured:
        """See `Device`: a CUDA graph."""
        # Relaxed: kernels may be loaded on the way.
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self._call("cuStreamBeginCapture", self._stream, mode)
        graph = None
        try:
            try:
                work()
            finally:
                (graph,) = self._call("cuStreamEndCapture", self._stream)
            (runnable,) = self._call("cuGraphInstantiate", graph, 0)
        finally:
            if graph is not None:
                self._call("cuGraphDestroy", graph)
        self._graphs.append(runnable)
        return runnable

    def replay(self, captured: Captured) -> None:
        """See `Device`."""
        self._call("cuGraphLaunch", captured, self._stream)

    def forget(self, captured: Sequence[Captured]) -> None:
        """See `Device`."""
        if not captured:
            return
        self.wait()
        for graph in captured:
            self._graphs = [kept for kept in self._graphs if kept is not graph]
            self._call("cuGraphExecDestroy", graph)

    def _packed(
        self, kernel: str, threads: int, arguments: Sequence[Buffer | Scalar | None]
    ) -> tuple[Any, int, int, tuple[NDArray[np.uint64], ...]]:
        """A kernel, its blocks, the address of its arguments' addresses, and what must live until then."""
        if self._module is None:
            (self._module,) = self._call("cuModuleLoadData", FATBIN.read_bytes())
        if kernel not in self._kernels:
            (self._kernels[kernel],) = self._call("cuModuleGetFunction", self._module, kernel.encode())
        words = [  # of eight bytes each, the value in the first of them
            argument.tobytes()
            if isinstance(argument, np.generic)
            else (argument.address if isinstance(argument, CudaBuffer) else 0).to_bytes(8, "little")
            for argument in arguments
        ]
        values = np.frombuffer(b"".join(word.ljust(8, b"\0") for word in words), np.uint64)
        pointers = np.arange(len(words), dtype=np.uint64) * np.uint64(8) + np.uint64(values.ctypes.data)
        blocks = min(max(-(-threads // BLOCK), 1), MAX_BLOCKS)
        return self._kernels[kernel], blocks, int(pointers.ctypes.data), (values, pointers)

    @property
    def stream(self) -> int:
        """Handle of the stream that all work goes into, for other libraries."""
        return int(self._stream)

    def wait(self) -> None:
        """See `Device`."""
        self._call("cuStreamSynchronize", self._stream)

    def free_memory(self) -> tuple[int, int]:
        """Bytes of the GPU that are free once our pool has given back what it can, and all."""
        self.trim()
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Our context in this thread, for other libraries too; it gets back the one it had."""
        _call(self._driver, "cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._driver.cuCtxPopCurrent()

    def _call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        if self._context is None:
            return _call(self._driver, name, *arguments)
        with self.current():
            return _call(self._driver, name, *arguments)
