"""Time picture to mesh, stage by stage, in one warm process; watch that memory does not grow.

    python benchmarks/pipeline.py examples/*.png [--device cuda] [--low-memory unet] [--runs 10] [--out DIR]

The first run of the process is told apart: it compiles, loads and captures.  Medians are of the others,
which take the pictures in turn.  GPU memory is the most that the process had in each stage of any run, its
libraries with it; and beside it what `nvidia-smi` says of the process at the end, when networks are still
loaded unless --low-memory frees them.  --poll reads it all the while too, which takes some of the time: it
shows whether a stage had more between its readings.  Exits with 1 if the same picture gives another mesh than
before (on a GPU --deterministic alone promises the same), or the process' memory grows by more than a tenth
after the third run.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from uc3d_rt.errors import Uc3dError
from uc3d_rt.gpu_memory import ProcessMemory
from uc3d_rt.ladder import LADDER, OFF
from uc3d_rt.pipeline import Pipeline
from uc3d_rt.stage_clock import STAGES


@click.command(help=__doc__.split("\n")[0])
@click.argument("pictures", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--bundle", type=click.Path(path_type=Path), help="Model bundle; else the one that ships.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--backend", default="auto", show_default=True)
@click.option("--fit-device", help="As --device if left out.")
@click.option("--mesh-device", help="cpu, or the fit's; that if left out.")
@click.option("--deterministic", is_flag=True, help="Engines that give the same bits each time.")
@click.option(
    "--low-memory", type=click.Choice([rung.name for rung in LADDER]), default=OFF.name, show_default=True
)
@click.option("--poll", is_flag=True, help="Read the GPU's memory every 5 ms too.")
@click.option("--runs", default=10, show_default=True, help="After the first.")
@click.option("--steps", type=int, help="Else the bundle's.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Keep the meshes here.")
def main(
    pictures: tuple[Path, ...], bundle: Path | None, device: str, backend: str, fit_device: str | None,
    mesh_device: str | None, deterministic: bool, low_memory: str, poll: bool, runs: int, steps: int | None,
    out: Path | None,
) -> None:  # fmt: skip
    began = time.perf_counter()
    try:
        pipeline = Pipeline.from_bundle(
            bundle,
            device,
            backend=backend,
            fit_device=fit_device,
            deterministic=deterministic,
            low_memory=low_memory,
            mesh_device=mesh_device,
        )
    except Uc3dError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{pipeline.choice}; the fit: {pipeline.fit_device}, the mesh: {pipeline.mesh_device}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    digests: dict[Path, str] = {}
    stages: list[dict[str, float]] = []
    walls: list[float] = []
    memory: list[float] = []
    gpu_mib: dict[str, int] = {}
    sound = True
    with _polled(poll) as polled, pipeline:
        for run in range(runs + 1):
            picture = pictures[run % len(pictures)]
            started = began if run == 0 else time.perf_counter()
            result = pipeline(picture, steps=steps)
            mesh = result.mesh.export(file_type="glb")
            wall = time.perf_counter() - started
            digest = hashlib.sha256(mesh).hexdigest()
            if digests.setdefault(picture, digest) != digest and (deterministic or device == "cpu"):
                click.echo(f"{picture}: another mesh than before", err=True)
                sound = False
            if out is not None:
                (out / f"{picture.stem}.glb").write_bytes(mesh)
            memory.append(_resident_mib())
            gpu_mib |= {stage: max(mib, gpu_mib.get(stage, 0)) for stage, mib in result.gpu_mib.items()}
            if run == 0:
                click.echo(f"first run, opening with it: {wall:.2f} s")
            else:
                stages.append(result.timings)
                walls.append(wall)
        gpu = _gpu_mib()
    for stage in STAGES:
        seconds = [timings[stage] for timings in stages]
        click.echo(
            f"{stage:12s} {statistics.median(seconds):8.3f} s  ({min(seconds):.3f} to {max(seconds):.3f})"
        )
    click.echo(f"{'all':12s} {statistics.median(walls):8.3f} s  ({min(walls):.3f} to {max(walls):.3f})")
    click.echo(f"{runs} runs, {len(digests)} pictures, medians; memory {memory[-1]:.0f} MiB")
    if gpu_mib:
        each = ", ".join(f"{stage} {mib}" for stage, mib in gpu_mib.items())
        click.echo(f"GPU memory of this process at most, --low-memory {low_memory}: {each} MiB")
    if polled:
        mib, ms = ([reading[k] for reading in polled] for k in (0, 1))
        takes = f"a reading takes {statistics.median(ms):.2f} ms, at most {max(ms):.2f}"
        click.echo(f"GPU memory of this process at most, polled: {max(mib):.0f} MiB; {takes}")
    if gpu is not None:
        click.echo(f"GPU memory of this process at the end, by nvidia-smi: {gpu} MiB")
    if len(memory) > 3 and memory[-1] > 1.1 * memory[3]:
        thirds = ", ".join(f"{memory[3 + (len(memory) - 4) * k // 3]:.0f}" for k in range(4))
        click.echo(f"memory grew: {thirds} MiB after run 3 and each third of the others", err=True)
        sound = False
    raise SystemExit(0 if sound else 1)


def _resident_mib() -> float:
    """Memory of this process, MiB, as Linux counts it."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def _polled(wanted: bool) -> Iterator[list[tuple[float, float]]]:
    """Readings of this process' GPU memory, MiB, and milliseconds that each took."""
    memory, ended = ProcessMemory.opened() if wanted else None, threading.Event()
    found: list[tuple[float, float]] = []

    def watch() -> None:
        while memory is not None and not ended.wait(0.005):
            started = time.perf_counter()
            mib = memory.mib()
            if mib is not None:
                found.append((mib, 1e3 * (time.perf_counter() - started)))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def _gpu_mib() -> int | None:
    """What `nvidia-smi` says that this process has; None without it."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    used = [line.split(",") for line in lines.splitlines() if line.count(",") == 1]
    mine = [int(value) for pid, value in used if int(pid) == os.getpid() and value.strip().isdigit()]
    return sum(mine) if mine else None


if __name__ == "__main__":
    main()
