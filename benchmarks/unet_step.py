"""Time a step of the UNet with guidance (12 views) on a GPU: the runtime's engines beside torch.

    python -m export build-engines --backend onnxruntime
    python benchmarks/unet_step.py [--bundle engines/edge] [--compile reduce-overhead] [--steps 50]
    python benchmarks/unet_step.py --random-weights sdxl --compile default --compile reduce-overhead

torch runs the same network, fp16, channels last, its weights random: eagerly and compiled.  Each is
warmed up and synchronised at every call; medians.  The runtime's step is the whole step: UNet, guidance
and DDIM, as a CUDA graph; two lines time all steps of a sample as users run them.

With --random-weights the bundle and its engines are made first, in a folder of their own, and torch has
the same weights: the step is held against torch's.  Then rungs of low memory and whole pictures are measured.
Memory is what the device lacks more than before: weights, working memory and CUDA graphs, at its peak.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from export.data_file import graph_bytes, load_graph
from export.engine_plan import BuildOptions, plan_build
from export.engines import build
from export.example_inputs import example_inputs
from export.plain_graph import plain_graph
from uc3d_rt.backends.base import Backend
from uc3d_rt.backends.choice import choose
from uc3d_rt.backends.onnxruntime_engines import OnnxRuntimeEngines, StepSampler
from uc3d_rt.contract import Manifest, load_manifest, sha256_of
from uc3d_rt.engines import load_engine_set
from uc3d_rt.errors import Uc3dError
from uc3d_rt.ladder import LADDER
from uc3d_rt.pipeline import Pipeline
from uc3d_rt.sampler import Step, ddim_steps

if TYPE_CHECKING:
    from train.multiview_unet import MultiviewUNet
    from train.presets import Preset

WARM_UP = 10
GUIDANCE = 3.0
PICTURE_STEPS = 4  # of the whole pictures whose memory is measured


@click.command(help=__doc__.split("\n")[0])
@click.option("--bundle", type=click.Path(path_type=Path), default=Path("engines/edge"), show_default=True)
@click.option("--random-weights", "profile", help="Make a bundle of this profile instead: sdxl, edge, toy.")
@click.option(
    "--folder", type=click.Path(file_okay=False, path_type=Path), help="For that bundle; sdxl takes 25 GB."
)
@click.option("--compile", "modes", multiple=True, default=("reduce-overhead",), show_default=True)
@click.option("--calls", default=200, show_default=True)
@click.option("--steps", default=50, show_default=True, help="Of the sample.")
@click.option("--jobs", default=3, show_default=True, help="Engines built at once.")
@click.option(
    "--pictures/--no-pictures", default=True, show_default=True,
    help="Measure whole pictures of the made bundle too.",
)  # fmt: skip
@click.option(
    "--low-memory", "rungs", multiple=True, type=click.Choice([rung.name for rung in LADDER]),
    default=("off", "unet"), show_default=True, help="Of the made bundle; torch is compared with the first.",
)  # fmt: skip
@click.option(
    "--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True,
    help="cpu tries this program out, with plain operators; its figures mean nothing.",
)  # fmt: skip
def main(
    bundle: Path, profile: str | None, folder: Path | None, modes: tuple[str, ...], calls: int, steps: int,
    jobs: int, pictures: bool, rungs: tuple[str, ...], device: str,
) -> None:  # fmt: skip
    try:
        if profile is None:
            manifest = load_manifest(bundle)
            choice = choose(bundle, manifest, device, "onnxruntime")
            print(choice)
            step_ms = measure(bundle, manifest, choice.backend, device, calls, steps)
            _measure_torch(None, manifest, device, modes, calls, step_ms)
            return
        from train.presets import PRESETS

        with tempfile.TemporaryDirectory(dir=folder) as work:
            measure_random(PRESETS[profile], Path(work), device, modes, calls, steps, jobs, pictures, rungs)
    except Uc3dError as error:
        raise click.ClickException(str(error)) from error


def measure_random(
    preset: Preset, bundle: Path, device: str, modes: tuple[str, ...], calls: int, steps: int, jobs: int,
    pictures: bool, rungs: tuple[str, ...],
) -> None:  # fmt: skip
    """Make a bundle of random weights and its engines, and measure all that runs them."""
    from export.random_bundle import random_bundle

    timed = _Stopwatch()
    _say_machine(device)
    unet = random_bundle(preset, bundle, device, timed)
    unet = (unet if device == "cpu" else unet.half()).to(memory_format=_channels_last())
    plan = plan_build(BuildOptions(bundle, "onnxruntime", jobs=jobs, check=False))
    build(plan, lambda event, job, _: timed(f"engine {job.name}") if event == "done" else None)
    if device == "cpu":
        _make_plain(plan.folder)
    timed("engines built, not checked on the CPU: the step is held against torch's below")
    manifest = load_manifest(bundle)
    step_ms: dict[str, float] = {}
    for rung in rungs:
        print(f"low memory: {rung}", flush=True)
        backend = OnnxRuntimeEngines(plan.folder, load_engine_set(plan.folder), device, rung)
        step_ms[rung] = measure(bundle, manifest, backend, device, calls, steps, unet)
        timed("measured")
        if not pictures:
            continue
        with _peak(device) as peak, Pipeline(bundle, manifest, backend) as pipeline:
            views = pipeline.views(_picture(preset.shape.image_px), steps=PICTURE_STEPS, focal_mm=0.0)
        assert np.isfinite(views.color).all()
        seconds = ", ".join(f"{stage} {value:.2f} s" for stage, value in views.timings.items())
        print(f"a picture, {PICTURE_STEPS} steps: peak of GPU memory {peak[0]:.0f} MiB; {seconds}")
        timed("a picture made")
    _measure_torch(unet, manifest, device, modes, calls, step_ms[rungs[0]], timed)


def measure(
    bundle: Path, manifest: Manifest, backend: Backend, device: str, calls: int, steps: int,
    unet: MultiviewUNet | None = None,
) -> float:  # fmt: skip
    """The runtime's steps, against torch's where it has the same weights; milliseconds of a guided one."""
    inputs = example_inputs(manifest.shape, "unet", 2, seed=1)
    given = {
        "tokens": inputs["tokens"][:1], "image_latent": inputs["image_latent"][:1], "focal": 0.0,
        "z_T": inputs["sample"][: manifest.shape.views],
    }  # fmt: skip
    usual, rescale = manifest.sampling, manifest.sampling.guidance_rescale
    guided = ddim_steps(manifest.schedule, steps, guidance=GUIDANCE)
    plan = ddim_steps(
        manifest.schedule, steps, guidance=usual.guidance, guidance_interval=usual.guidance_interval,
        first_step_to=usual.first_step_to,
    )  # fmt: skip
    few = 20 if unet is None else 3

    def sampled(steps: tuple[Step, ...], scale: float) -> list[float]:
        def sample() -> None:
            sampler(**given, plan=steps, guidance=scale, guidance_rescale=rescale)

        return _times(sample, few, min(few, WARM_UP))

    with _peak(device) as peak, backend.open_sampler(bundle, manifest) as sampler:
        assert isinstance(sampler, StepSampler)
        step_ms = _line("runtime, step with guidance", sampler.timed_step(calls, guided=True))
        print(f"its peak of GPU memory: {peak[0]:.0f} MiB", flush=True)
        if unet is not None:
            only = [Step(500, guided=True, keep=0.0, add=1.0)]
            found = sampler(**given, plan=only, guidance=GUIDANCE, guidance_rescale=rescale)
            error = _error(found, unet, given, rescale)
            print(f"guided prediction against torch: relative error {error:.1e}", flush=True)
            assert error < 5e-2, "the runtime's step is not torch's"
        all_guided = sampled(guided, GUIDANCE)
        share = statistics.median(all_guided) / (steps * step_ms)
        _line(f"{steps} steps, all with guidance", all_guided, f"{share:.2f} of {steps} x the step")
        if plan != guided:
            _line(f"{steps} steps, as the bundle has it", sampled(plan, usual.guidance))
        if unet is None or not backend.low_memory.one_object:
            _line("runtime, step without", sampler.timed_step(calls, guided=False))
    print(f"peak of GPU memory with all of its CUDA graphs: {peak[0]:.0f} MiB", flush=True)
    return step_ms


class _Stopwatch:
    """Says what was done, when, and how long it took: where a run that is cut off stood."""

    def __init__(self) -> None:
        self._begin = self._last = time.perf_counter()

    def __call__(self, what: str) -> None:
        now = time.perf_counter()
        print(f"[{now - self._begin:6.1f} s, +{now - self._last:5.1f}] {what}", flush=True)
        self._last = now


@contextmanager
def _peak(device: str) -> Iterator[list[float]]:
    """MiB of the GPU taken since it began, the most so far; other programs on it count too."""
    found = [0.0]
    if device == "cpu":
        yield found
        return
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before, ended = torch.cuda.mem_get_info()[0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            found[0] = max(found[0], (before - torch.cuda.mem_get_info()[0]) / 2**20)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def _times(call: Callable[[], object], calls: int, warm_up: int = WARM_UP) -> list[float]:
    """Milliseconds of calls that return when their work is done."""
    for _ in range(warm_up):
        call()
    found = []
    for _ in range(calls):
        started = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - started))
    return found


def _line(name: str, milliseconds: list[float], note: str = "") -> float:
    median = statistics.median(milliseconds)
    low, high = np.percentile(milliseconds, [10, 90])
    print(f"{name:40s} {median:8.3f} ms  ({low:.3f} to {high:.3f})  {note}", flush=True)
    return median


def _error(found: np.ndarray, unet: MultiviewUNet, given: dict[str, object], rescale: float) -> float:
    """Of a guided prediction at t = 500 against torch's, 2-norms."""
    import torch

    from uc3d_rt.sampler import guided

    def both(name: str) -> np.ndarray:
        return np.concatenate([given[name], np.zeros_like(given[name])])

    z = given["z_T"]
    values = [np.concatenate([z, z]), np.full(2, 500.0), both("tokens"), both("image_latent"), np.zeros(2)]
    parameter = next(unet.parameters())
    with torch.no_grad():
        made = unet(*(torch.from_numpy(v).to(parameter.device, parameter.dtype) for v in values))
    conditional, unconditional = np.split(made.float().cpu().numpy(), 2)
    expected = guided(conditional, unconditional, GUIDANCE, rescale)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _measure_torch(
    unet: MultiviewUNet | None, manifest: Manifest, device: str, modes: tuple[str, ...], calls: int,
    step_ms: float, timed: Callable[[str], None] = lambda _: None,
) -> None:  # fmt: skip
    """Eager and compiled, against the runtime's step; on a CPU eager alone."""
    import torch

    from train.multiview_unet import MultiviewUNet
    from train.presets import PRESETS

    if unet is None:
        unet = MultiviewUNet(PRESETS[manifest.profile].unet).half().to(device)
        unet = unet.to(memory_format=torch.channels_last)
    unet.eval()
    kind = next(unet.parameters()).dtype
    inputs = example_inputs(manifest.shape, "unet", 2, seed=1)
    tensors = [torch.from_numpy(value).to(device, kind) for value in inputs.values()]

    def call(network: Callable[..., object]) -> Callable[[], None]:
        def run() -> None:
            network(*tensors)
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    weights = sum(p.numel() * p.element_size() for p in unet.parameters()) / 2**20
    for mode in ("eager", *(modes if device == "cuda" else ())):
        torch._dynamo.reset()
        network = unet if mode == "eager" else torch.compile(unet, mode=mode)
        with torch.no_grad(), _peak(device) as peak:
            times = _times(call(network), calls)
            _line(f"torch, {mode}", times, f"runtime / torch {step_ms / statistics.median(times):.2f}")
        print(f"its peak of GPU memory: {weights:.0f} MiB of weights and {peak[0]:.0f} MiB", flush=True)
        timed(f"torch, {mode}")


def _make_plain(folder: Path) -> None:
    """Write engines with operators that a CPU has."""
    engines = load_engine_set(folder)
    for engine in engines.engines.values():
        path, weights = folder / engine.file, engine.weights.file if engine.weights else ""
        path.write_bytes(graph_bytes(plain_graph(load_graph(path)), weights))
    from uc3d_rt.engines import save_engine_set

    changed = {name: replace(e, sha256=sha256_of(folder / e.file)) for name, e in engines.engines.items()}
    save_engine_set(replace(engines, engines=changed), folder)


def _picture(size_px: int) -> np.ndarray:
    """An RGBA disc."""
    v, u = np.mgrid[-1.0 : 1.0 : size_px * 1j, -1.0 : 1.0 : size_px * 1j]
    rgba = np.full((size_px, size_px, 4), 128, np.uint8)
    rgba[..., 3] = np.where(np.hypot(u, v) < 0.7, 255, 0)
    return rgba


def _channels_last() -> object:
    import torch

    return torch.channels_last


def _say_machine(device: str) -> None:
    import onnxruntime
    import torch

    gpu = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{gpu}, torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}", flush=True)


if __name__ == "__main__":
    main()
