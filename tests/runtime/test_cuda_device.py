"""`CudaDevice` on a driver that is a stand-in, and what users read where there is none."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.conftest import ellipsoid_views
from uc3d_rt import cuda_device
from uc3d_rt.cuda_device import CudaDevice, cuda_driver
from uc3d_rt.errors import BackendError, OutOfMemoryError
from uc3d_rt.neus.fit import fit
from uc3d_rt.neus.fit_plan import FitOptions

Run = Callable[..., tuple[int, str, str]]


class Anything:
    """An enumeration, or a structure, with whatever members the driver's has."""

    def __getattr__(self, name: str) -> Anything:
        return self.__dict__.setdefault(name, Anything())

    def __call__(self) -> Anything:
        return self


class Status(IntEnum):
    """What a call says, printed as cuda-bindings prints it."""

    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209

    def __str__(self) -> str:
        return f"<CUresult.{self.name}: {self.value}>"


class Driver(ModuleType):
    """Answers every call with success, keeps a list of them, and fails where it is told to."""

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.calls: list[tuple[str, tuple[object, ...]]] = []
        self.fails: dict[str, int] = {}
        self.gpus = 1
        self.pools = True
        self.memory: dict[int, int] = {}
        self.words: list[list[int]] = []  # the first three arguments of each kernel, as eight bytes

    def __getattr__(self, name: str) -> Any:
        if name.startswith("CU"):
            return Anything()
        if name == "cuuint64_t":
            return int
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: object) -> tuple[object, ...]:
            self.calls.append((name, arguments))
            if name in self.fails:
                return (Status(self.fails[name]),)
            if name == "cuDeviceGetCount":
                return 0, self.gpus
            if name == "cuDeviceGetAttribute":
                return 0, int(self.pools)
            if name in ("cuMemAlloc", "cuMemAllocFromPoolAsync"):
                self.memory[4096 * (len(self.calls) + 1)] = int(arguments[0])  # type: ignore[call-overload]
                return 0, 4096 * (len(self.calls) + 1)
            if name == "cuLaunchKernel":
                pointers = (ctypes.c_uint64 * 3).from_address(int(arguments[9]))  # type: ignore[call-overload]
                self.words.append([ctypes.c_uint64.from_address(at).value for at in pointers])
            if name in ("cuMemFree", "cuMemFreeAsync"):
                del self.memory[int(arguments[0])]  # type: ignore[call-overload]
            return 0, object()

        return call

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", ModuleType("cuda.bindings"))
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", found)
    return found


@pytest.mark.parametrize("pools", [True, False])
def test_what_is_taken_is_given_back(driver: Driver, pools: bool) -> None:
    driver.pools = pools
    with CudaDevice() as device:
        a, b = device.empty((3, 5), np.float32), device.empty((0,), np.int64)
        assert sorted(driver.memory.values()) == [1, 60]
        device.free([b])
        device.clear(a)
        device.launch("bend", 1000, a, None, np.int32(7))
        blocks, threads = driver.calls[-2][1][1], driver.calls[-2][1][4]
        assert driver.calls[-2][0] == "cuLaunchKernel" and blocks * threads >= 1000  # type: ignore[operator]
        kept = [device.capture(lambda: device.clear(a)) for _ in range(3)]
        device.forget(kept[:1])
        device.replay(kept[1])
        assert driver.calls[-2] == ("cuGraphLaunch", (kept[1], device._stream))
        device.trim()
    assert driver.memory == {}
    assert ("cuMemAlloc" in driver.names()) != pools
    for taken, given in (
        ("cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease"),
        ("cuStreamCreate", "cuStreamDestroy"),
        ("cuModuleLoadData", "cuModuleUnload"),
        *([("cuMemPoolCreate", "cuMemPoolDestroy")] if pools else []),
    ):
        assert driver.names().count(taken) == driver.names().count(given) == 1
    assert driver.names().count("cuGraphExecDestroy") == driver.names().count("cuGraphDestroy") == 3
    device.close()  # twice does nothing
    assert driver.names().count("cuDevicePrimaryCtxRelease") == 1


def test_a_thread_keeps_the_context_it_had(driver: Driver) -> None:
    """Each call finds ours, whichever thread makes it, and none leaves it behind, also when it fails."""
    with CudaDevice() as device, ThreadPoolExecutor(1) as other:
        buffer = other.submit(device.empty, (4,), np.float32).result()
        device.clear(buffer)
        driver.fails["cuMemAllocFromPoolAsync"] = 2
        with pytest.raises(BackendError):
            device.empty((4,), np.float32)
    before = ("cuInit", "cuDeviceGetCount", "cuDeviceGet")
    names = [name for name in driver.names() if name not in before]
    depth = 0
    for name in names:
        depth += {"cuCtxPushCurrent": 1, "cuCtxPopCurrent": -1}.get(name, 0)
        assert depth == 1 or name in (
            "cuCtxPopCurrent", "cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease"
        )  # fmt: skip
    assert depth == 0


def test_a_capture_that_fails_ends(driver: Driver) -> None:
    """The stream can be used again; what was captured until then is gone."""
    with CudaDevice() as device:
        driver.fails["cuLaunchKernel"] = 1
        with pytest.raises(BackendError, match="cuLaunchKernel failed"):
            device.capture(lambda: device.launch("bend", 1, None, None, None))
        names = driver.names()
        assert names.count("cuStreamBeginCapture") == names.count("cuStreamEndCapture") == 1
        assert names.count("cuGraphDestroy") == 1 and "cuGraphInstantiate" not in names


def test_kernels_get_their_arguments(driver: Driver) -> None:
    with CudaDevice() as device:
        a = device.empty((3, 5), np.float32)
        first = ("bend", 1000, (a, None, np.int32(-7)))
        second = ("relax", 1, (np.float32(1.5), np.float64(2.5), a))
        device.repeat([first, second], 2)
    floats = [int(np.array(x).view(kind)) for x, kind in ((np.float32(1.5), "u4"), (np.float64(2.5), "u8"))]
    expected = [[a.address, 0, 2**32 - 7], [*floats, a.address]]
    assert driver.words == expected * 2 and driver.names().count("cuModuleGetFunction") == 2


@pytest.mark.parametrize(
    "name, status, mend",
    [
        ("cuModuleLoadData", 209, "build-kernels"),
        ("cuMemAllocFromPoolAsync", 2, "--resolution"),
        ("cuInit", 100, "--device cpu"),
    ],
)
def test_errors_of_the_driver_say_the_mend(driver: Driver, name: str, status: int, mend: str) -> None:
    driver.fails[name] = status
    told = f"{name} failed on the GPU: {Status(status).name}; .*{mend}"
    with pytest.raises(BackendError, match=told) as caught, CudaDevice() as device:
        device.empty((4,), np.float32)
        device.launch("bend", 1, None, None, None)
    assert isinstance(caught.value, OutOfMemoryError) is (status == 2)
    assert driver.names().count("cuDevicePrimaryCtxRetain") == driver.names().count(
        "cuDevicePrimaryCtxRelease"
    )


def test_no_such_gpu_no_kernels_no_driver(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver.gpus = 0
    with pytest.raises(BackendError, match="no GPU 0: the driver knows 0"):
        cuda_driver()

    def no_library(*_: object) -> None:
        raise RuntimeError("libcuda.so.1 is not there")

    driver.cuInit = no_library  # type: ignore[attr-defined]
    with pytest.raises(BackendError, match="no NVIDIA driver .*--device cpu"):
        cuda_driver()
    monkeypatch.setattr(cuda_device, "FATBIN", tmp_path / "kernels.fatbin")
    with pytest.raises(BackendError, match="build-kernels"):
        cuda_driver()


def test_a_fit_on_a_gpu_that_cannot_be_is_refused_before_any_work(
    run_cli: Run, tiny_bundle: Path, object_png: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    files = (object_png, "-o", tmp_path / "m.glb", "--views", tmp_path / "views", "--bundle", tiny_bundle)
    code, _, err = run_cli(*files, "--fit-device", "cuda")
    assert code == 6 and "pip install 'uc3d-rt[cuda]'" in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "views").exists()
    code, _, err = run_cli(*files, "--fit-device", "gpu")
    assert code == 2 and "unknown device 'gpu'; choose cpu, cuda, or cuda:N" in err


@pytest.mark.gpu
def test_torch_and_several_devices_share_a_process() -> None:
    """The primary context is everybody's: who closes first takes nothing from the others."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA")
    before = torch.arange(1000, device="cuda", dtype=torch.float64)
    color, normal = ellipsoid_views(64)
    options = FitOptions(resolution=32, iterations=(2, 3), rays_per_iteration=1000)
    with CudaDevice() as first:
        with CudaDevice() as second:
            found = [fit(color, normal, options, device=device) for device in (first, second, first)]
            assert float((before * 2).sum()) == 999000.0
        found.append(fit(color, normal, options, device=first))
    assert len({field.sdf.tobytes() for field in found}) == 1
    assert float((before + torch.ones(1000, device="cuda")).sum()) == 500500.0
    with CudaDevice() as third:
        assert fit(color, normal, options, device=third).sdf.tobytes() == found[0].sdf.tobytes()
