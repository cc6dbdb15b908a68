"""NVML's figures through a library that is a stand-in, in C as the real one; which stage's are kept."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import object_rgba
from uc3d_rt import gpu_memory, pipeline
from uc3d_rt.cli import closing_lines
from uc3d_rt.gpu_memory import ProcessMemory
from uc3d_rt.neus.fit_plan import FitOptions
from uc3d_rt.pipeline import Pipeline
from uc3d_rt.stage_clock import STAGES

FAST = FitOptions(resolution=32, iterations=(4, 4), blurred_iterations=(4, 4))
MIB = 2**20
SOURCE = """
typedef struct {
    unsigned pid;
    unsigned long long usedGpuMemory;
    unsigned gpuInstanceId, computeInstanceId;
} nvmlProcessInfo_t;
typedef struct { unsigned count; int status; nvmlProcessInfo_t listed[64]; } Gpu;
static Gpu gpus[2];
int begun = 0;
void set_process(int gpu, unsigned slot, unsigned pid, unsigned long long used) {
    nvmlProcessInfo_t one = {pid, used, 0xffffffff, 0xffffffff};
    gpus[gpu].listed[slot] = one;
    if (gpus[gpu].count <= slot) gpus[gpu].count = slot + 1;
}
void set_status(int gpu, int status) { gpus[gpu].status = status; }
int nvmlInit_v2(void) { begun++; return 0; }
int nvmlShutdown(void) { begun--; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, Gpu **gpu) { *gpu = gpus + index; return 0; }
int nvmlDeviceGetComputeRunningProcesses_v3(Gpu *gpu, unsigned *count, nvmlProcessInfo_t *infos) {
    unsigned room = *count;
    *count = gpu->count;
    if (gpu->status) return gpu->status;
    if (room < gpu->count) return 7;
    for (unsigned i = 0; i < gpu->count; i++) infos[i] = gpu->listed[i];
    return 0;
}
"""


@pytest.fixture
def nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = tmp_path / "nvml.c", tmp_path / "libnvml.so"
    source.write_text(SOURCE, encoding="utf-8")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True, capture_output=True)
    monkeypatch.setattr(gpu_memory, "LIBRARY", str(library))
    found = ctypes.CDLL(str(library))
    found.set_process.argtypes = (ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_ulonglong)
    yield found


def test_memory_of_this_process_alone_on_the_gpu_with_most(nvml: ctypes.CDLL) -> None:
    memory = ProcessMemory.opened()
    assert memory is not None and memory.mib() is None  # it has none yet
    own = os.getpid()
    nvml.set_process(0, 0, own + 1, 9000 * MIB)
    assert memory.mib() is None
    nvml.set_process(0, 1, own, 500 * MIB)
    nvml.set_process(1, 0, own, 6000 * MIB)
    assert memory.mib() == 6000
    nvml.set_process(1, 1, own, 10 * MIB)  # another instance of the same GPU
    assert memory.mib() == 6010
    nvml.set_status(1, 15)  # GPU is lost
    assert memory.mib() == 500
    nvml.set_process(0, 1, own, 2**64 - 1)  # as Windows has it
    assert memory.mib() is None


def test_more_processes_than_expected(nvml: ctypes.CDLL) -> None:
    memory = ProcessMemory.opened()
    assert memory is not None
    for slot in range(50):
        nvml.set_process(0, slot, os.getpid() + slot, (slot + 1) * MIB)
    assert memory.mib() == 1
    nvml.set_process(0, 0, 1, MIB)
    nvml.set_process(0, 49, os.getpid(), 7 * MIB)
    assert memory.mib() == 7


def test_nvml_is_let_go_of(nvml: ctypes.CDLL) -> None:
    begun = ctypes.c_int.in_dll(nvml, "begun")
    memory = ProcessMemory.opened()
    assert memory is not None and begun.value == 1
    del memory
    assert begun.value == 0


def test_without_nvml_there_is_no_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("libno-such-library.so.1", "libc.so.6"):
        monkeypatch.setattr(gpu_memory, "LIBRARY", name)
        assert ProcessMemory.opened() is None


def test_the_layout_is_nvmls() -> None:
    real = pytest.importorskip("cuda.bindings.nvml").process_info_dtype
    ours = gpu_memory._Process
    assert ctypes.sizeof(ours) == real.itemsize
    offsets = [getattr(ours, name).offset for name, _ in ours._fields_]
    assert offsets == [real.fields[name][1] for name in real.names]


class Figures(ProcessMemory):
    """Readings in their order, then none."""

    def __init__(self, figures: list[int | None]) -> None:
        self.figures = figures

    def mib(self) -> int | None:
        return self.figures.pop(0) if self.figures else None


def test_the_most_of_each_stage_is_kept(tiny_bundle: Path) -> None:
    """Outside of `with`, a network's memory is read before it is freed, and again at the stage's end."""
    made = Pipeline.from_bundle(tiny_bundle, threads=1)
    #            preprocess, two encoders, end, unet, end, decoder, end; fit, mesh
    made._gpu_memory = Figures([None, 110, 130, 50, 900, 60, 300, 70, 400, 80])
    result = made(object_rgba(), fit_options=FAST)
    assert result.views.gpu_mib == {"encode": 130, "diffuse": 900, "decode": 300}
    assert result.gpu_mib == {"encode": 130, "diffuse": 900, "decode": 300, "fit": 400, "mesh": 80}
    assert (result.views.gpu_peak_mib, result.gpu_peak_mib) == (900, 900)
    assert closing_lines(result)[1:] == ["GPU memory in use at most: 900 MiB, in diffuse"]


def test_on_a_cpu_nothing_is_said(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.ProcessMemory, "opened", lambda: pytest.fail("there is no GPU to read"))
    result = Pipeline.from_bundle(tiny_bundle, threads=1)(object_rgba(), fit_options=FAST)
    assert result.gpu_mib == result.views.gpu_mib == {} and result.gpu_peak_mib is None
    assert len(closing_lines(result)) == 1 and tuple(result.timings) == STAGES
