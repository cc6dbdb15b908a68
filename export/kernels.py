"""The CUDA kernels as one fatbin, so that no user needs a compiler."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from uc3d_rt.cuda_device import FATBIN
from uc3d_rt.errors import BackendError, OutputError, UsageError

SOURCES = FATBIN.parent
TARGETS: tuple[str, ...] = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
PTX = "compute_75"
"""GPUs without code of their own compile this when the kernels are loaded."""


@dataclass(frozen=True)
class Kernels:
    """What stands in `kernels.json` beside the fatbin."""

    sources_sha256: str
    nvcc: str
    targets: tuple[str, ...]


def sources_sha256() -> str:
    """Hash of all CUDA sources, names and contents."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def find_nvcc() -> Path:
    """The CUDA compiler: of CUDA_HOME, else of PATH.

    Raises:
        BackendError: there is none.
    """
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if found is None:
        where = f"CUDA_HOME={home}" if home else "PATH"
        raise BackendError(f"no nvcc in {where}; install the CUDA toolkit, 12.8 or later, or set CUDA_HOME")
    return Path(found)


def build_kernels(targets: Sequence[str] = TARGETS, fatbin: Path = FATBIN) -> Kernels:
    """Compile the kernels for some GPUs, and as PTX for all later ones.

    Args:
        targets: compute capabilities, "sm_90" and the like.
        fatbin: file to write, `kernels.json` beside it; replaced when whole.

    Raises:
        UsageError: a target that nvcc does not know.
        BackendError: no nvcc, or it fails.
        OutputError: the files cannot be written.
    """
    nvcc = find_nvcc()
    version = _run([nvcc, "--version"]).rpartition("release ")[2].partition(",")[0]
    known = _run([nvcc, "--list-gpu-code"]).split()
    unknown = [target for target in targets if target not in known]
    if unknown:
        raise UsageError(f"nvcc {version} does not know {', '.join(unknown)}, only {', '.join(known)}")
    code = [f"-gencode=arch=compute_{target[3:]},code={target}" for target in targets]
    try:
        with tempfile.TemporaryDirectory(dir=fatbin.parent) as temporary:
            made = Path(temporary) / fatbin.name
            _run(
                [nvcc, "-O3", "--fatbin", "--compress-mode=size", "--threads=0", *code,
                 f"-gencode=arch={PTX},code={PTX}", "-o", made, SOURCES / "kernels.cu"]
            )  # fmt: skip
            kernels = Kernels(sources_sha256(), version, tuple(targets))
            record = Path(temporary) / "kernels.json"
            record.write_text(json.dumps(asdict(kernels), indent=2) + "\n", encoding="utf-8")
            os.replace(made, fatbin)
            os.replace(record, fatbin.with_name(record.name))
    except OSError as error:
        raise OutputError(f"cannot write {fatbin} ({error.strerror or error})") from error
    return kernels


def _run(command: Sequence[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BackendError(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[:2000]}")
    return done.stdout
