"""How far a training run goes, how fast it learns, and the random numbers of each step."""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from accelerate import Accelerator


def step_generator(device: torch.device, seed: int, rank: int, step: int) -> torch.Generator:
    """All random numbers of one step on one process."""
    key = np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0]
    return torch.Generator(device=device).manual_seed(int(key) >> 1)


def learning_rate(step: int, total: int, warmup: int, peak: float, final: float, drop: int = 0) -> float:
    """Linear warm-up, then a cosine from `peak` to `final` at `total`.

    With `drop` no cosine: `peak` up to that step, `final` from it on.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if drop:
        return peak if step < drop else final
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + 0.5 * (peak - final) * (1.0 + math.cos(math.pi * progress))


class Planner:
    """Fixes the number of steps: given, or what fits into the minutes at the speed measured.

    The speed is the mean since the first look, when compiling is over: other work on the machine
    comes and goes, and a few slow steps must not end a run early.
    """

    def __init__(self, steps: int, minutes: float | None, first: int = 200, every: int = 120) -> None:
        self.total, self.minutes, self.first, self.every = steps, minutes, first, every
        self.begin = self.mark = time.monotonic()

    def update(self, step: int, accelerator: Accelerator) -> None:
        """Call after every step of a run that counts from 0; the main process decides for all."""
        since = step - self.first
        if self.minutes is None or since < 0 or since % self.every:
            return
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.monotonic()
        if since == 0:
            self.mark = now
            return
        rate = since / (now - self.mark)
        left = self.minutes * 60 - (now - self.begin)
        decided = torch.tensor([step + max(1, int(rate * left))], device=accelerator.device)
        if accelerator.num_processes > 1:
            torch.distributed.broadcast(decided, 0)
        self.total = int(decided.item())
        if since == self.every or since % (10 * self.every) == 0:
            accelerator.print(
                f"{rate:.2f} steps/s: {self.total} steps fit into {self.minutes} minutes", flush=True
            )
