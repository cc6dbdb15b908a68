"""Running sums on a device, with the kernels of `cuda/scan.cu`."""

from __future__ import annotations

import numpy as np

from uc3d_rt.device import Buffer, Device, Scope

RUN = 64
"""Counts that one thread adds up, as in `cuda/scan.cu`."""

SCAN_LANES = 128
"""Threads that add up the runs of a list, as in `cuda/scan.cu`."""


def running_sums(device: Device, counts: Buffer) -> list[int]:
    """Make of every count (lists, N) int32 the sum of those before it in its list; the sums of whole lists.

    Raises:
        BackendError: the device failed, for example for want of memory.
    """
    lists, count = counts.shape
    runs = -(-count // RUN)
    with Scope(device) as scratch:
        sums, totals = scratch.empty((lists, runs), np.int32), scratch.empty((lists,), np.int32)
        shape = np.int32(count), np.int32(lists), np.int32(runs)
        scratch.launch("sum_runs", lists * runs, counts, *shape, sums)
        scratch.launch("scan_runs", lists * SCAN_LANES, sums, *shape[1:], totals)
        scratch.launch("spread_runs", lists * runs, sums, *shape, counts)
        return [int(total) for total in scratch.download(totals)]
