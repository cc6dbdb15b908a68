"""The very first run compiles the fit, later ones load it: both must compute the same bits.

A compiled function that is called by another, and not inlined into it, is there twice, rounded
differently; which of the two is called depends on what was loaded first.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.conftest import ellipsoid_views

SCRIPT = """
import hashlib, sys
import numpy as np
from uc3d_rt.neus.fit import fit
from uc3d_rt.neus.fit_plan import FitOptions
views = np.load(sys.argv[1])
surface = fit(views["color"], views["normal"], FitOptions(resolution=80))
print(hashlib.sha256(surface.sdf.tobytes() + surface.color.tobytes()).hexdigest())
"""


def test_the_first_run_gives_what_later_ones_give(tmp_path: Path) -> None:
    color, normal = ellipsoid_views(128)
    np.savez(tmp_path / "views.npz", color=color, normal=normal)
    environment = os.environ | {
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(__file__).parents[2] / "runtime"),
    }

    def digest() -> str:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "views.npz")],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = digest()
    assert list((tmp_path / "cache").rglob("*.nbc"))
    assert digest() == first
