"""GPU memory that this process has, as the driver's NVML counts it."""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Any, Self

LIBRARY = "libnvidia-ml.so.1"
"""Comes with NVIDIA's driver.  `cuda-bindings` has it too, but from release 13 on alone."""

_TOO_SMALL = 7  # NVML_ERROR_INSUFFICIENT_SIZE
_UNKNOWN = 2**64 - 1  # NVML_VALUE_NOT_AVAILABLE


class _Process(ctypes.Structure):
    """`nvmlProcessInfo_t`."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),  # bytes
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class ProcessMemory:
    """Reads how much memory of a GPU this process has.

    All of it counts, whoever took it: networks, the fit, the CUDA context, and the code of libraries.  No
    context is made for it, and nothing waits for the GPU.
    """

    def __init__(self, library: Any) -> None:
        """Find the GPUs; `library` is NVML, begun."""
        self._library = library
        self._room = (_Process * 32)()
        count = ctypes.c_uint()
        library.nvmlDeviceGetCount_v2(ctypes.byref(count))
        handles = [ctypes.c_void_p() for _ in range(count.value)]
        self._gpus = [
            handle
            for index, handle in enumerate(handles)
            if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == 0
        ]
        weakref.finalize(self, library.nvmlShutdown)

    @classmethod
    def opened(cls) -> Self | None:
        """A reader; None where there is no NVML."""
        try:
            library = ctypes.CDLL(LIBRARY)
            return cls(library) if library.nvmlInit_v2() == 0 else None
        except (OSError, AttributeError):  # none there, or one without these functions
            return None

    def mib(self) -> int | None:
        """MiB now, of the GPU on which this process has most.

        None where NVML does not say: the process has none, or runs where its number is not the driver's, as
        in some containers.
        """
        most = max((self._used(gpu) for gpu in self._gpus), default=0)
        return round(most / 2**20) or None

    def _used(self, gpu: ctypes.c_void_p) -> int:
        """Bytes of a GPU."""
        listed = self._library.nvmlDeviceGetComputeRunningProcesses_v3
        count = ctypes.c_uint(len(self._room))
        status = listed(gpu, ctypes.byref(count), self._room)
        if status == _TOO_SMALL:
            self._room = (_Process * (2 * count.value))()
            count = ctypes.c_uint(len(self._room))
            status = listed(gpu, ctypes.byref(count), self._room)
        if status != 0:
            return 0
        own = os.getpid()
        mine = (process.used for process in self._room[: count.value] if process.pid == own)
        return sum(used for used in mine if used != _UNKNOWN)
