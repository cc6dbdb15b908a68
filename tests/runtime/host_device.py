"""The kernels of `uc3d_rt/cuda` compiled as plain C++: they run where no GPU is, a thread at a time."""

import ctypes
import math
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import uc3d_rt
from uc3d_rt.device import Device, Launch, uploaded
from uc3d_rt.errors import BackendError, OutOfMemoryError
from uc3d_rt.neus.device_views import DevicePixels
from uc3d_rt.neus.fit_plan import FitOptions, Stage
from uc3d_rt.neus.rays import Pixels

SOURCES = Path(uc3d_rt.__file__).parent / "cuda"


def compiler() -> str | None:
    """A C++ compiler of this machine."""
    return shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")


def uploaded_pixels(device: Device, pixels: Pixels) -> DevicePixels:
    """Pixels in the order of the host."""
    arrays = (pixels.origin, pixels.direction, pixels.color, pixels.normal, pixels.mask)
    origin, direction, color, normal, mask = (uploaded(device, array) for array in arrays)
    return DevicePixels(len(pixels.mask), (origin, direction), (color, normal, mask))


def stage_of(resolution: int, inv_s: float = 2.0, iterations: int = 1) -> Stage:
    """A stage on one grid."""
    return Stage(resolution, iterations, 0, (inv_s, *FitOptions().inv_s_range), rays=1000)


class HostDevice:
    """A `Device` whose memory is NumPy's."""

    kept: list[Callable[[], None]] | None = None  # while something is captured

    def __init__(self, library: Path) -> None:
        subprocess.run(
            [compiler(), "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-x", "c++", "-o", library,
             SOURCES / "kernels.cu"],
            check=True, capture_output=True,
        )  # fmt: skip
        self.library = ctypes.CDLL(str(library))
        self.live = 0
        self.blocks = (0,)  # in which order; each is one thread

    def empty(self, shape: Sequence[int], dtype: type[np.generic]) -> np.ndarray:
        assert self.kept is None
        self.live += 1
        kind = np.dtype(dtype)
        return np.full(shape, np.nan if kind.kind == "f" else 77, kind)  # nobody may count on zeros

    def clear(self, buffer: np.ndarray) -> None:
        if self.kept is not None:
            self.kept.append(lambda: self.clear(buffer))
        else:
            buffer[...] = 0

    def upload(self, array: np.ndarray, buffer: np.ndarray) -> None:
        assert array.shape == buffer.shape and array.dtype == buffer.dtype and self.kept is None
        buffer[...] = array

    def download(self, buffer: np.ndarray) -> np.ndarray:
        assert self.kept is None
        return buffer.copy()

    def wait(self) -> None:
        assert self.kept is None

    def free(self, buffers: Sequence[np.ndarray]) -> None:
        self.live -= len(buffers)
        for buffer in buffers:
            buffer.view(np.uint8)[...] = 255

    def launch(self, kernel: str, threads: int, *arguments: np.ndarray | np.generic | None) -> None:
        if self.kept is not None:
            self.kept.append(lambda: self.launch(kernel, threads, *arguments))
            return
        kinds = {"i4": ctypes.c_int, "u4": ctypes.c_uint, "f4": ctypes.c_float, "f8": ctypes.c_double}
        values = [
            ctypes.c_void_p(a if a is None else a.ctypes.data)
            if a is None or isinstance(a, np.ndarray)
            else kinds[a.dtype.str[1:]](a.item())
            for a in arguments
        ]
        for block in self.blocks:
            self.library.choose_block(block, len(self.blocks))
            getattr(self.library, kernel)(*values)

    def repeat(self, launches: Sequence[Launch], times: int) -> None:
        for _ in range(times):
            for kernel, threads, arguments in launches:
                self.launch(kernel, threads, *arguments)

    def capture(self, work: Callable[[], None]) -> list[Callable[[], None]]:
        assert self.kept is None
        self.kept = kept = []
        try:
            work()
        finally:
            self.kept = None
        self.live += 1
        return kept

    def replay(self, captured: list[Callable[[], None]]) -> None:
        for launch in captured:
            launch()

    def forget(self, captured: Sequence[list[Callable[[], None]]]) -> None:
        self.live -= len(captured)


class OpenDevice(HostDevice):
    """The stand-in as the pipeline opens and closes it."""

    opened: list["OpenDevice"] = []
    library_path: Path
    limit = 2**40
    """Bytes that it has."""

    def __init__(self, ordinal: int = 0) -> None:
        super().__init__(self.library_path)
        self.ordinal = ordinal
        self.closed, self.fails_at, self.bytes = False, "", 0
        self.opened.append(self)

    def __enter__(self) -> "OpenDevice":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def empty(self, shape: Sequence[int], dtype: type[np.generic]) -> np.ndarray:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if self.bytes + nbytes > self.limit:
            raise OutOfMemoryError("cuMemAlloc failed on the GPU: CUDA_ERROR_OUT_OF_MEMORY", "free memory")
        self.bytes += nbytes
        return super().empty(shape, dtype)

    def free(self, buffers: Sequence[np.ndarray]) -> None:
        self.bytes -= sum(buffer.nbytes for buffer in buffers)
        super().free(buffers)

    def free_memory(self) -> tuple[int, int]:
        return self.limit - self.bytes, self.limit

    def close(self) -> None:
        assert not self.closed and self.live == 0, f"{self.live} buffers were never given back"
        self.closed = True

    def launch(self, kernel: str, threads: int, *arguments: np.ndarray | np.generic | None) -> None:
        assert not self.closed
        if kernel == self.fails_at:
            raise BackendError("the GPU has no memory left")
        super().launch(kernel, threads, *arguments)
