"""The fit's kernels on a GPU against what its memory and arithmetic allow.

    python benchmarks/roofline.py --views views.npz --device cuda [--limit 3]

`views.npz` is of `python benchmarks/fit.py --objects DIR --save-views views.npz`.  Each object is fitted
three times: as it is (medians of --runs), once with the work of every launch counted from the arrays
that it finds (`fit_work.py`), and once with every launch between two events.  The table is per iteration
of a stage:

- moved: megabytes that memory cannot be spared, each sector a launch touches once;
- asked: megabytes that threads load and store, most of them from caches;
- Mop, atomics: millions of floating-point operations as written, of 64-bit additions in memory;
- floor: microseconds for `moved` at the bandwidth of a large copy, or for the operations at the peak of
  fp32, whichever is longer;
- measured: between two events around a launch, queued while the stream is held so that the host's time is
  not in it, but some microseconds of the GPU's own a launch are; share: floor / measured.

What one launch left in the L2 cache for the next need not be moved again, so a share may exceed 1.

One iteration under Nsight Compute (counting from 1, here the tenth on the finest grid):

    ncu --profile-from-start off --set full -o iteration \\
        python benchmarks/roofline.py --views views.npz --device cuda --profile 260
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fit_work import START, Counted, Observed, Work
from benchmarks.ground_truth import GroundTruth, load_truths
from uc3d_rt.cuda_device import CudaDevice, cuda_driver
from uc3d_rt.device import Buffer, Launch, Scope
from uc3d_rt.errors import BackendError
from uc3d_rt.neus.device_fit import fit_on_device
from uc3d_rt.neus.fit import fit
from uc3d_rt.neus.fit_plan import FitOptions

COPY_BYTES = 2**30
"""Of the copy that bandwidth is measured with: far more than any cache holds."""

MAPPED = 2
"""CU_MEMHOSTALLOC_DEVICEMAP: the GPU reads it too."""

AT_LEAST = 0
"""CU_STREAM_WAIT_VALUE_GEQ."""

FP32_LANES = 128
"""Of a multiprocessor, since sm_86 and on sm_90; each does a product and a sum a clock."""


@dataclass(frozen=True)
class Peak:
    """What a GPU can do at most."""

    memory: float  # bytes/s, by clock and bus width
    copied: float  # bytes/s read and written by a large copy
    fp32: float  # operations/s

    def floor_us(self, work: Work) -> float:
        """Least time in microseconds for some work."""
        return 1e6 * max(work.moved / self.copied, work.operations / self.fp32)


class Events:
    """Times on a device's stream, from the driver."""

    def __init__(self, device: CudaDevice, driver: Any) -> None:
        self._device, self._driver = device, driver
        with device.current():
            self._flag = int(_checked(driver.cuMemHostAlloc(4, MAPPED)))
            self._seen_flag = _checked(driver.cuMemHostGetDevicePointer(self._flag, 0))
        self._turn = ctypes.c_uint32.from_address(self._flag)
        self._turn.value = 0

    def close(self) -> None:
        """Give the flag's memory back."""
        with self._device.current():
            _checked(self._driver.cuMemFreeHost(self._flag))

    @contextmanager
    def held(self) -> Iterator[None]:
        """The stream does nothing of what is queued within `with` until its end."""
        turn = self._turn.value + 1
        wanted = self._driver.cuuint32_t(turn)
        with self._device.current():
            _checked(self._driver.cuStreamWaitValue32(self._device.stream, self._seen_flag, wanted, AT_LEAST))
        try:
            yield
        finally:
            self._turn.value = turn

    def mark(self) -> Any:
        """An event, after all that is queued."""
        with self._device.current():
            event = _checked(self._driver.cuEventCreate(0))
            _checked(self._driver.cuEventRecord(event, self._device.stream))
        return event

    def between_us(self, start: Any, end: Any) -> float:
        """Microseconds between two events that have come, which are given back."""
        with self._device.current():
            passed = _checked(self._driver.cuEventElapsedTime(start, end))
            for event in (start, end):
                _checked(self._driver.cuEventDestroy(event))
        return 1e3 * float(passed)


def _checked(answer: tuple[Any, ...]) -> Any:
    status, *results = answer
    if int(status) != 0:
        raise BackendError(f"the driver answered {status}")
    return results[0] if results else None


class Timed(Observed):
    """Puts two events around every launch, or around launches that are repeated."""

    def __init__(self, device: CudaDevice, events: Events) -> None:
        super().__init__(device)
        self._events = events
        self._marks: list[tuple[tuple[str, str], int, Any, Any]] = []

    def observe_clear(self, buffer: Buffer) -> None:
        """See `Observed`."""
        with self._events.held():
            start = self._events.mark()
            self.device.clear(buffer)
            self._marks.append((self.group("clear"), 1, start, self._events.mark()))

    def observe(self, launches: Sequence[Launch], times: int) -> None:
        """See `Observed`."""
        for kernel, _, arguments in launches:
            self.follow(kernel, arguments, before=True)
        where = self.group(launches[0][0])
        with self._events.held():
            start = self._events.mark()
            self.device.repeat(launches, times)
            self._marks.append((where, times * len(launches), start, self._events.mark()))
        for kernel, _, arguments in launches:
            self.follow(kernel, arguments, before=False)

    def measured(self) -> dict[tuple[str, str], tuple[float, int]]:
        """Microseconds and launches of every group, once all is done."""
        out: dict[tuple[str, str], tuple[float, int]] = {}
        for where, count, start, end in self._marks:
            us, launches = out.get(where, (0.0, 0))
            out[where] = us + self._events.between_us(start, end), launches + count
        self._marks.clear()
        return out


def peak_of(device: CudaDevice, driver: Any, ordinal: int = 0) -> Peak:
    """Peaks by the driver's attributes, and by a copy."""
    handle = _checked(driver.cuDeviceGet(ordinal))

    def attribute(name: str) -> int:
        kind = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(_checked(driver.cuDeviceGetAttribute(kind, handle)))

    memory = 2.0 * 1e3 * attribute("MEMORY_CLOCK_RATE") * attribute("GLOBAL_MEMORY_BUS_WIDTH") / 8.0
    fp32 = 2.0 * FP32_LANES * 1e3 * attribute("CLOCK_RATE") * attribute("MULTIPROCESSOR_COUNT")
    return Peak(memory, copy_bandwidth(device, driver), fp32)


def copy_bandwidth(device: CudaDevice, driver: Any, runs: int = 10) -> float:
    """Bytes/s that a copy within the device reads and writes, the best of some runs."""
    import numpy as np

    events = Events(device, driver)
    source, target = (device.empty((COPY_BYTES,), np.uint8) for _ in range(2))
    device.clear(source)
    best = 0.0
    for _ in range(runs):
        start = events.mark()
        with device.current():
            _checked(driver.cuMemcpyDtoDAsync(target.address, source.address, COPY_BYTES, device.stream))
        end = events.mark()
        device.wait()
        best = max(best, 2e6 * COPY_BYTES / events.between_us(start, end))
    device.free([source, target])
    events.close()
    return best


@dataclass(frozen=True)
class Line:
    """A group of kernels in one iteration of a stage; of the start, in all."""

    stage: str
    group: str
    launches: float
    work: Work
    floor_us: float
    measured_us: float


def lines_of(
    work: dict[tuple[str, str], Work],
    measured: dict[tuple[str, str], tuple[float, int]],
    iterations: dict[str, int],
    peak: Peak,
) -> list[Line]:
    """What was counted and measured, per iteration."""
    lines = []
    for where, total in work.items():
        count = iterations.get(where[0], 1)
        us, launches = measured.get(where, (float("nan"), 0))
        one = Work(*(round(value / count) for value in vars(total).values()))
        lines.append(Line(*where, launches / count, one, peak.floor_us(total) / count, us / count))
    return lines


def print_lines(lines: list[Line], iterations: dict[str, int]) -> None:
    """The table."""
    print(
        f"{'nodes':>6s} {'kernels':18s} launches  moved MB  asked MB      Mop Matomics "
        "floor us  measured us  share"
    )
    for line in lines:
        work = line.work
        print(
            f"{line.stage:>6s} {line.group:18s} {line.launches:8.1f} {work.moved / 1e6:9.2f} "
            f"{work.asked / 1e6:9.2f} {work.operations / 1e6:8.2f} {work.atomics / 1e6:8.3f} "
            f"{line.floor_us:8.1f} {line.measured_us:12.1f} {line.floor_us / line.measured_us:6.2f}"
        )
    for stage in dict.fromkeys(line.stage for line in lines):
        own = [line for line in lines if line.stage == stage]
        floor, us = sum(line.floor_us for line in own), sum(line.measured_us for line in own)
        what = "in all" if stage == START else f"{iterations[stage]} iterations of"
        print(f"{stage:>6s} {what}: floor {floor:.1f} us, measured {us:.1f} us, share {floor / us:.2f}")


def roofline(
    truth: GroundTruth, device: CudaDevice, driver: Any, peak: Peak, options: FitOptions, runs: int
) -> list[Line]:
    """Fit one object as it is, counted and timed; print and return the table."""
    color, normal = truth.color, truth.normal
    seconds = []
    for _ in range(runs + 1):  # the first one loads
        began = time.perf_counter()
        with Scope(device) as scope:
            fit_on_device(scope, color, normal, options)
        seconds.append(time.perf_counter() - began)
    counted = Counted(device)
    fit(color, normal, options, device=counted)
    events = Events(device, driver)
    timed = Timed(device, events)
    fit(color, normal, options, device=timed)
    device.wait()
    measured = timed.measured()
    events.close()
    lines = lines_of(counted.work, measured, counted.iterations, peak)
    print(f"\n{truth.name}")
    for stage, rays in counted.rays.items():
        number = len(rays)
        print(
            f"{stage:>6s} nodes: {sum(c.rays for c in rays) / number:.0f} rays, "
            f"{sum(c.lookups for c in rays) / number:.0f} look-ups, "
            f"{sum(c.samples for c in rays) / number:.0f} samples, "
            f"{sum(c.blended for c in rays) / number:.0f} with a weight, "
            f"{statistics.fmean(counted.nodes[stage]):.0f} nodes near the surface"
        )
    print_lines(lines, counted.iterations)
    kernels = sum(us for us, _ in measured.values()) / 1e6
    print(
        f"fit: {statistics.median(seconds[1:]):.4f} s by the clock, views to a field on the GPU; kernels "
        f"{kernels:.4f} s in {sum(count for _, count in measured.values())} launches"
    )
    return lines


def profile(truth: GroundTruth, device: CudaDevice, driver: Any, options: FitOptions, iteration: int) -> None:
    """Fit one object with the profiler on in one iteration, from 1."""

    def between(done: int, _total: int) -> None:
        if done in (iteration - 1, iteration):
            device.wait()
            with device.current():
                _checked(driver.cuProfilerStop() if done == iteration else driver.cuProfilerStart())

    fit(truth.color, truth.normal, options, on_progress=between, device=device)


def main() -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--views", type=Path, required=True, help="file of benchmarks/fit.py --save-views")
    parser.add_argument("--device", choices=["cuda"], default="cuda")
    parser.add_argument("--limit", type=int, default=1, help="objects, evenly spaced")
    parser.add_argument("--resolution", type=int, default=160, help="nodes along an axis")
    parser.add_argument("--runs", type=int, default=5, help="of the fit as it is")
    parser.add_argument("--profile", type=int, metavar="ITERATION", help="this one alone, for a profiler")
    arguments = parser.parse_args()
    options = FitOptions(resolution=arguments.resolution)
    last = options.total_iterations
    if arguments.profile is not None and not 2 <= arguments.profile <= last:
        parser.error(f"--profile must be an iteration from 2 to {last}, got {arguments.profile}")
    truths = load_truths(arguments.views, arguments.limit, spread=True)
    try:
        driver = cuda_driver()
    except BackendError as error:
        parser.error(str(error))
    with CudaDevice() as device:
        if arguments.profile is not None:
            profile(next(truths), device, driver, options, arguments.profile)
            return 0
        peak = peak_of(device, driver)
        print(
            f"memory {peak.memory / 1e9:.0f} GB/s by its clock, {peak.copied / 1e9:.0f} GB/s copied; "
            f"fp32 {peak.fp32 / 1e12:.1f} Top/s"
        )
        for truth in truths:
            roofline(truth, device, driver, peak, options, arguments.runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
