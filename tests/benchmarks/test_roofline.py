"""What the roofline counts, against the kernels themselves built with numbers that count."""

import ctypes
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from numba import njit

from benchmarks import roofline
from benchmarks.fit_work import (
    Counted,
    Work,
    each_array_once,
    sectors,
    with_neighbours,
)
from benchmarks.ray_counts import RayCounts, count_rays
from tests.conftest import ellipsoid_views
from tests.runtime.host_device import SOURCES, HostDevice, compiler, stage_of, uploaded_pixels
from uc3d_rt.device import Scope, uploaded
from uc3d_rt.neus.device_fit import DeviceState, iterate, turns_of
from uc3d_rt.neus.fit import check_views, fit
from uc3d_rt.neus.fit_plan import FitOptions
from uc3d_rt.neus.rays import Pixels, select_pixels, trace_rays
from uc3d_rt.neus.render import MAX_SAMPLES, _march

OPTIONS = FitOptions(
    resolution=32, iterations=(3, 7), blurred_iterations=(2, 4), rays_per_iteration=1000, carve_steps=1
)

COUNTING = """
#include "host.h"
static long long operations;
struct Number {
    float v;
    Number() = default;
    Number(float x) : v(x) {}
    Number(double x) : v((float)x) {}
    Number(int x) : v((float)x) {}
    explicit operator int() const { return (int)v; }
    explicit operator long long() const { return (long long)v; }
    explicit operator double() const { return v; }
    Number operator-() const { return -v; }
    friend Number operator+(Number a, Number b) { ++operations; return a.v + b.v; }
    friend Number operator-(Number a, Number b) { ++operations; return a.v - b.v; }
    friend Number operator*(Number a, Number b) { ++operations; return a.v * b.v; }
    friend Number operator/(Number a, Number b) { ++operations; return a.v / b.v; }
    Number& operator+=(Number b) { return *this = *this + b; }
    Number& operator-=(Number b) { return *this = *this - b; }
    Number& operator*=(Number b) { return *this = *this * b; }
    friend bool operator<(Number a, Number b) { return a.v < b.v; }
    friend bool operator>(Number a, Number b) { return a.v > b.v; }
    friend bool operator<=(Number a, Number b) { return a.v <= b.v; }
    friend bool operator>=(Number a, Number b) { return a.v >= b.v; }
    friend bool operator!=(Number a, Number b) { return a.v != b.v; }
};
static Number fmaxf(Number a, Number b) { return a.v > b.v ? a : b; }
static Number fminf(Number a, Number b) { return a.v < b.v ? a : b; }
static Number fabsf(Number a) { return a.v < 0 ? -a : a; }
static Number floorf(Number a) { return std::floor(a.v); }
static Number sqrtf(Number a) { ++operations; return std::sqrt(a.v); }
static Number expf(Number a) { ++operations; return std::exp(a.v); }
static Number logf(Number a) { ++operations; return std::log(a.v); }
#define float Number
#include "render.cu"
#include "optimize.cu"
#include "redistance.cu"
#undef float
extern "C" long long counted() { return operations; }
"""


class CountingHost(HostDevice):
    """Runs the kernels of the iterations as built with `COUNTING`, and knows each one's operations.

    It has what the roofline takes of `CudaDevice` besides.
    """

    stream = 0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "kernels.so")
        (folder / "counting.cpp").write_text(COUNTING)
        subprocess.run(
            [compiler(), "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-I", SOURCES, "-o",
             folder / "counting.so", folder / "counting.cpp"],
            check=True, capture_output=True,
        )  # fmt: skip
        self.usual, self.counting = self.library, ctypes.CDLL(str(folder / "counting.so"))
        self.counting.counted.restype = ctypes.c_longlong
        self.operations: dict[str, int] = {}

    def launch(self, kernel: str, threads: int, *arguments: np.ndarray | np.generic | None) -> None:
        self.library = self.counting if hasattr(self.counting, kernel) else self.usual
        before = self.counting.counted()
        super().launch(kernel, threads, *arguments)
        self.operations[kernel] = self.operations.get(kernel, 0) + self.counting.counted() - before

    def current(self) -> Scope:
        return Scope(self)

    def wait(self) -> None:
        pass


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> CountingHost:
    if compiler() is None:
        pytest.skip("no C++ compiler")
    return CountingHost(tmp_path_factory.mktemp("counting"))


@pytest.fixture(scope="module")
def counted(host: CountingHost) -> Counted:
    host.operations.clear()
    device = Counted(host)
    fit(*ellipsoid_views(48), OPTIONS, device=device)
    return device


def total(counted: Counted, group: str) -> Work:
    return sum((work for (_, name), work in counted.work.items() if name == group), Work())


def test_operations_are_those_that_the_kernels_do(host: CountingHost, counted: Counted) -> None:
    done = host.operations
    assert total(counted, "rays").operations == pytest.approx(done["fit_rays"], rel=0.01)
    both = done["bend"] + done["regularize"]
    assert total(counted, "regularise").operations == pytest.approx(both, rel=0.01)
    assert total(counted, "adam").operations == pytest.approx(done["adam_step"], rel=0.01)
    near = done["near_nodes"] + done["keep_in_hull"]
    assert total(counted, "near nodes").operations == pytest.approx(near, rel=0.01)
    # The rest of the restoring belongs to the start.
    assert 0 < total(counted, "distance").operations < done["relax"]


def test_counting_changes_nothing(host: CountingHost) -> None:
    views = ellipsoid_views(48)
    assert np.array_equal(
        fit(*views, OPTIONS, device=Counted(host)).sdf, fit(*views, OPTIONS, device=host).sdf
    )


def test_stages_are_told_apart(counted: Counted) -> None:
    assert counted.iterations == {"16": 3 + 2 + 4, "32": 7}
    groups = {"rays", "regularise", "adam", "density", "near nodes", "distance"}
    assert {group for stage, group in counted.work if stage == "16"} >= groups
    assert ("16", "choice of start") in counted.work
    assert ("32", "next grid") in counted.work and ("start", "hull and carving") in counted.work
    for stage, nodes in (("16", 16), ("32", 32)):
        rays = counted.rays[stage]
        assert len(rays) == counted.iterations[stage]
        for found in rays:
            assert 0.5 * 1000 * nodes / 32 < found.rays < 2 * 1000 * nodes / 32
            assert found.lookups > found.samples > found.joined >= found.opaque > 0
            assert found.samples >= found.blended
        assert all(0 < count < nodes**3 for count in counted.nodes[stage])
    for work in counted.work.values():
        assert work.operations >= 0 and work.moved > 0


@njit
def samples_of(sdf, rays, offset, step, band, cutoff, inv_s):  # type: ignore[no-untyped-def]
    slab, weight_y, entry, direction, length = rays
    t, f, alpha = np.empty(MAX_SAMPLES), np.empty(MAX_SAMPLES), np.empty(MAX_SAMPLES)
    out = np.empty(len(slab), np.int64)
    for n in range(len(slab)):
        out[n] = _march(
            sdf, slab[n], weight_y[n], entry[n, 0], entry[n, 1], direction[n, 0], direction[n, 1],
            length[n], offset[n], step, band, cutoff, inv_s, t, f, alpha,
        )  # fmt: skip
    return out


def test_samples_are_those_that_the_fit_on_the_cpu_marches() -> None:
    pixels, sdf = scene(40)
    stride, start, inv_s, band, step, cutoff = 3, 1, 3.0, 1.5, 0.9, 1e-3
    key = 12345
    arrays = (pixels.origin, pixels.direction, pixels.color, pixels.normal, pixels.mask)
    counts, seen, blended = count_rays(sdf, arrays, start, stride, key, inv_s, band, step, cutoff)
    rays, crosses = trace_rays(pixels, slice(start, None, stride), 40)
    offset = np.array(
        [jitter(key, int(n)) for n in np.arange(start, len(pixels.mask), stride)[crosses]], np.float32
    )
    fields = (rays.slab, rays.weight_y, rays.entry, rays.direction, rays.length)
    wanted = samples_of(sdf, fields, offset, step, band, cutoff, inv_s)
    assert counts.crossing == crosses.sum() and counts.rays == len(crosses)
    assert counts.samples == pytest.approx(wanted.sum(), rel=1e-3)
    assert counts.samples > 3000
    # What has a share in a ray lies inside, or within the band of the surface and a cell around it.
    assert (sdf[blended] < band + 2.0).all() and not (blended & ~seen).any()


def jitter(key: int, n: int) -> float:
    def hashed(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    return (hashed(key ^ hashed(n)) >> 8) / 2**24


def scene(resolution: int) -> tuple[Pixels, np.ndarray]:
    """Pixels of an ellipsoid, and a sphere's distance in node spacings."""
    color, normal, masks = check_views(*ellipsoid_views(48))
    axis = (np.arange(resolution) + 0.5) * 2.0 / resolution - 1.0
    y, z, x = np.meshgrid(axis, axis, axis, indexing="ij")
    sdf = (np.sqrt(x * x + y * y + z * z) - 0.55) * resolution / 2.0
    return select_pixels(color, normal, masks, seed=0), sdf.astype(np.float32)


def test_nodes_that_gradients_reach_are_those_marked(host: CountingHost) -> None:
    """One launch of the rays leaves gradients where the count says, and nowhere else."""
    pixels, sdf = scene(40)
    with Scope(host) as scope:
        state = DeviceState(scope, uploaded(scope, sdf), stage_of(40, 3.0))
        state.sdf, state.color = (
            uploaded(scope, sdf),
            uploaded(scope, np.full((40, 40, 40, 3), 0.4, np.float32)),
        )
        counted = Counted(host)
        state.device = counted
        left: list[np.ndarray] = []
        state.step = lambda *_: left.append(np.array(state.d_color))  # type: ignore[method-assign]
        stride = ray_arguments(pixels, 40)[1]
        turns = uploaded(scope, turns_of(OPTIONS, stage_of(40, 3.0, iterations=3), stride).view(np.uint8))
        iterate(state, uploaded_pixels(scope, pixels), 48, OPTIONS, turns, stride)
    reached = (left[0] != 0).any(-1)
    work = counted.work["start", "hull and carving"]
    assert reached.sum() > 1000
    assert work.atomics > 32 * reached.sum() / 8
    gradients = sectors(reached.reshape(-1), 8) + sectors(reached.reshape(-1), 24)
    rays = counted.rays["start"][0]
    again, seen, blended = count_rays(
        sdf, (pixels.origin, pixels.direction, pixels.color, pixels.normal, pixels.mask),
        *ray_arguments(pixels, 40), 3.0, 1.5, OPTIONS.sample_step, 1e-3,
    )  # fmt: skip
    assert again == rays and isinstance(again, RayCounts)
    assert not (reached & ~blended).any()
    assert reached.sum() > 0.95 * blended.sum() and gradients > 0


def ray_arguments(pixels: Pixels, resolution: int) -> tuple[int, int, int]:
    from uc3d_rt.neus.device_fit import ray_key

    wanted = OPTIONS.rays_per_iteration * resolution // OPTIONS.resolution
    stride = max(1, round(len(pixels.mask) / wanted))
    key = int(ray_key(OPTIONS.seed, 0, 0))
    return key % stride, stride, key


def test_sectors_of_touched_items() -> None:
    touched = np.zeros(64, bool)
    touched[[0, 7, 8, 63]] = True
    assert sectors(touched, 4) == 3 * 32
    assert sectors(touched, 12) == 32 * len(
        {0, 7 * 12 // 32, (7 * 12 + 11) // 32, 8 * 12 // 32, 63 * 12 // 32}
    )
    assert sectors(touched, 24) == 32 * len(
        {b // 32 for n in (0, 7, 8, 63) for b in range(24 * n, 24 * n + 24)}
    )
    assert sectors(np.ones(64, bool), 4) == 256
    nodes = np.zeros((5, 5, 5), bool)
    nodes[2, 2, 2] = nodes[0, 0, 0] = True
    assert with_neighbours(nodes).sum() == 7 + 4
    arrays = [np.zeros(8, np.float32), None, np.int32(3), np.zeros((2, 2), np.int64)]
    assert each_array_once(arrays) == Work(moved=64, asked=64)


class Driver(ModuleType):
    """Answers as a driver whose clock goes on by 5 us an event."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE=2_619_000,
        CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH=5120,
        CU_DEVICE_ATTRIBUTE_CLOCK_RATE=1_980_000,
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=132,
    )

    def __init__(self) -> None:
        super().__init__("driver")
        self.events = 0
        self.profiling: list[str] = []
        self.flag = ctypes.c_uint32(7)
        self.held = 0
        self.cuuint32_t = int

    def cuMemHostAlloc(self, size: int, _flags: int) -> tuple[int, int]:
        assert size == ctypes.sizeof(self.flag)
        return 0, ctypes.addressof(self.flag)

    def cuMemHostGetDevicePointer(self, address: int, _flags: int) -> tuple[int, int]:
        return 0, address

    def cuStreamWaitValue32(self, _stream: int, address: int, value: int, _flags: int) -> tuple[int]:
        assert address == ctypes.addressof(self.flag) and value == self.flag.value + 1
        self.held = value
        return (0,)

    def cuDeviceGet(self, ordinal: int) -> tuple[int, int]:
        return 0, ordinal

    def cuDeviceGetAttribute(self, value: int, _device: int) -> tuple[int, int]:
        return 0, value

    def cuEventCreate(self, _flags: int) -> tuple[int, int]:
        self.events += 1
        return 0, self.events

    def cuEventRecord(self, _event: int, _stream: int) -> tuple[int]:
        assert self.held == self.flag.value + 1 or not self.held  # queued while the stream waits
        return (0,)

    def cuEventElapsedTime(self, start: int, end: int) -> tuple[int, float]:
        return 0, 5e-3 * (end - start)

    def __getattr__(self, name: str) -> object:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*_arguments: object) -> tuple[int]:
            self.profiling += [name] if "Profiler" in name else []
            return (0,)

        return call


def test_the_table_holds_every_group(host: CountingHost, capsys: pytest.CaptureFixture[str]) -> None:
    color, normal = ellipsoid_views(48)
    driver, truth = Driver(), SimpleNamespace(name="thing", color=color, normal=normal)
    peak = roofline.Peak(3.35e12, 2.9e12, 6.7e13)
    lines = roofline.roofline(truth, host, driver, peak, OPTIONS, runs=1)  # type: ignore[arg-type]
    printed = capsys.readouterr().out
    for line in lines:
        assert line.group in printed and line.measured_us > 0.0
        bound = max(line.work.moved / 2.9e6, line.work.operations / 6.7e7)
        assert line.floor_us == pytest.approx(bound, rel=0.05, abs=1e-3)
    rays = next(line for line in lines if (line.stage, line.group) == ("32", "rays"))
    adam = next(line for line in lines if (line.stage, line.group) == ("32", "adam"))
    assert (rays.launches, adam.launches) == (1.0, 2.0)
    assert (rays.measured_us, adam.measured_us) == (pytest.approx(5.0), pytest.approx(10.0))
    assert "7 iterations of" in printed and "look-ups" in printed and "launches" in printed


def test_peaks_come_of_the_driver(host: CountingHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "COPY_BYTES", 1000)
    monkeypatch.setattr(host, "empty", lambda shape, _: SimpleNamespace(address=1))
    monkeypatch.setattr(host, "clear", lambda _: None)
    monkeypatch.setattr(host, "free", lambda _: None)
    peak = roofline.peak_of(host, Driver())  # type: ignore[arg-type]
    assert peak.memory == pytest.approx(3.352e12, rel=1e-3)
    assert peak.fp32 == pytest.approx(6.69e13, rel=1e-3)
    assert peak.copied == pytest.approx(2 * 1000 / 5e-6)
    assert peak.floor_us(Work(moved=400, operations=0)) == pytest.approx(1.0)
    assert math.isclose(peak.floor_us(Work(operations=round(6.69e8))), 10.0, rel_tol=1e-2)


def test_one_iteration_is_profiled(host: CountingHost) -> None:
    color, normal = ellipsoid_views(48)
    driver = Driver()
    truth = SimpleNamespace(color=color, normal=normal)
    roofline.profile(truth, host, driver, OPTIONS, 5)  # type: ignore[arg-type]
    assert driver.profiling == ["cuProfilerStart", "cuProfilerStop"]


def test_help_says_how_to_profile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["roofline.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        roofline.main()
    assert "ncu --profile-from-start off" in capsys.readouterr().out
