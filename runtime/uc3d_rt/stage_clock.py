"""What a run of the pipeline tells of its stages: time, memory of the GPU, progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from uc3d_rt.gpu_memory import ProcessMemory

STAGES: tuple[str, ...] = ("preprocess", "encode", "diffuse", "decode", "fit", "mesh")

Progress = Callable[[str, int, int], None]
"""Told `(stage, done, total)`; stages are those of `STAGES`, in order."""


class StageClock:
    """Times stages, reads the GPU's memory in them, and passes progress on."""

    def __init__(self, on_progress: Progress | None = None, gpu_memory: ProcessMemory | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.gpu_mib: dict[str, int] = {}
        self._stage = ""
        self._on_progress = on_progress or (lambda stage, done, total: None)
        self._gpu_memory = gpu_memory

    def read_memory(self) -> None:
        """Note what is in use now, if it is the stage's most so far."""
        mib = None if self._gpu_memory is None else self._gpu_memory.mib()
        if mib is not None:
            self.gpu_mib[self._stage] = max(self.gpu_mib.get(self._stage, 0), mib)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Time a stage; gives the function to tell `(done, total)`."""
        started = time.perf_counter()
        self._stage, told = name, False

        def tick(done: int, total: int) -> None:
            nonlocal told
            told = True
            self._on_progress(name, done, total)

        self._on_progress(name, 0, 1)
        yield tick
        if not told:
            self._on_progress(name, 1, 1)
        self.read_memory()
        self.seconds[name] = time.perf_counter() - started
