"""Time one training step of the multiview model, with random weights, on random latents.

    python benchmarks/train_step.py [--profile edge] [--batch 64] [--compile blocks] [--channels-last]
    python benchmarks/train_step.py --profile sdxl --processes 1,8 --json scaling.json
    python -m torch.distributed.run --nproc_per_node 4 benchmarks/train_step.py ... [--bf16-gradients]

Prints objects a second of all processes (median of the timed steps, after warm-up), the processor's
share of a step (the time until everything is queued), and the peak GPU memory.  With `--processes`
each number of processes is started after the other, and a table says how well they scale:
efficiency = throughput of N processes / (N x throughput of 1).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch

from train.average import update_average
from train.cache import LatentCache
from train.checkpoint import build_vae
from train.model import MultiviewModel
from train.normal_probe import NormalProbe
from train.optimizer import build_optimizers
from train.presets import PRESETS
from train.schedule import step_generator
from train.trainer import compile_model, make_accelerator, recompute_blocks

WARM_UP = 5


@dataclass(frozen=True)
class Result:
    """One measurement."""

    profile: str
    device: str
    processes: int
    batch: int  # objects a step and process
    step_ms: float  # median
    queued_ms: float  # median time until the processor had a step queued
    objects_per_s: float  # of all processes
    warm_up_s: float
    peak_gib: float | None  # of the fullest GPU; None on a CPU


def scaling_table(results: Sequence[Result]) -> str:
    """Markdown; efficiency stands where one process was measured too."""
    alone = next((r.objects_per_s for r in results if r.processes == 1), None)
    lines = [
        "| processes | objects a step | ms a step | objects/s | peak GiB | efficiency |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in results:
        peak = "–" if r.peak_gib is None else f"{r.peak_gib:.1f}"
        share = "–" if alone is None else f"{100 * r.objects_per_s / (r.processes * alone):.0f} %"
        lines.append(
            f"| {r.processes} | {r.processes * r.batch} | {r.step_ms:.1f} | {r.objects_per_s:.2f} "
            f"| {peak} | {share} |"
        )
    return "\n".join(lines)


def measure_each(counts: Sequence[int], arguments: Sequence[str]) -> list[Result]:
    """This program with each number of processes, one after the other."""
    results = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "result.json"
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            launch += ["--nproc_per_node", str(count), __file__, *arguments, "--json", str(out)]
            # Without a GPU processes only find each other if accelerate is told so.
            settings = {} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"}
            subprocess.run(launch, check=True, env=os.environ | settings)
            results += [Result(**entry) for entry in json.loads(out.read_text(encoding="utf-8"))]
    return results


@click.command(help=__doc__.split("\n")[0])
@click.option("--profile", type=click.Choice(sorted(PRESETS)), default="edge", show_default=True)
@click.option("--batch", type=int, help="Objects a step and process; default: the preset's.")
@click.option("--steps", default=20, show_default=True)
@click.option("--compile", "part", type=click.Choice(["blocks", "unet"]))
@click.option("--cuda-graphs", is_flag=True, help="As of `python -m train model`.")
@click.option("--channels-last", is_flag=True)
@click.option("--bf16-gradients", is_flag=True, help="With several processes: exchange them in bfloat16.")
@click.option("--kernels", default=0, help="Print this many of the kernels that take longest.")
@click.option("--processes", help="Start it with each of these numbers of processes, as 1,2,8.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Gets the results.")
def main(
    profile: str, batch: int | None, steps: int, part: str | None, cuda_graphs: bool, channels_last: bool,
    bf16_gradients: bool, kernels: int, processes: str | None, out: Path | None,
) -> None:  # fmt: skip
    if cuda_graphs and (part != "unet" or not torch.cuda.is_available()):
        raise click.UsageError("--cuda-graphs is for CUDA devices, with --compile unet")
    if processes is not None:
        given = {"--profile": profile, "--batch": batch, "--steps": steps, "--compile": part}
        arguments = [str(word) for name, v in given.items() if v is not None for word in (name, v)]
        flags = {
            "--cuda-graphs": cuda_graphs,
            "--channels-last": channels_last,
            "--bf16-gradients": bf16_gradients,
        }
        arguments += [name for name, on in flags.items() if on]
        results = measure_each([int(count) for count in processes.split(",")], arguments)
        click.echo(f"{profile} on {results[0].device}, random weights\n\n{scaling_table(results)}")
        save(out, results)
        return
    preset = PRESETS[profile]
    accelerator = make_accelerator(bf16_gradients)
    device = accelerator.device
    half = device.type == "cuda"
    torch.set_float32_matmul_precision("high")
    with device:  # billions of random numbers take a minute on a CPU
        model, vae = MultiviewModel(preset), build_vae(preset)
    model, vae = model.to(device), vae.to(device).eval().requires_grad_(False)
    probe = NormalProbe(preset.unet.latent_channels).to(device).eval().requires_grad_(False)
    if preset.train.gradient_checkpointing:
        recompute_blocks(model, vae)
    if channels_last:
        model.unet = model.unet.to(memory_format=torch.channels_last)
    if part is not None:
        compile_model(model, part, cuda_graphs)
    torch.backends.cudnn.benchmark = cuda_graphs
    count, shape = 128, preset.shape
    latent = torch.randn(count, 6, 2 * shape.latent_channels, shape.latent_px, shape.latent_px, device=device)
    picture = torch.randint(
        0, 255, (count, 1, shape.image_px, shape.image_px, 3), dtype=torch.uint8, device=device
    )
    wrapped = accelerator.prepare_model(model)
    cache = LatentCache(
        z_0=latent.half(),
        image=picture,
        image_latent=latent[:, :1, : shape.latent_channels].half(),
        focal=torch.zeros(count, 1, device=device),
        objects=count,
    )
    parameters = list(model.parameters())
    train = preset.train
    optimizers = build_optimizers(parameters, train.optimizer, train.lr, train.weight_decay, cuda_graphs)
    average: dict[str, torch.Tensor] = {}
    size = batch or preset.train.batch
    times: list[float] = []
    queueing: list[float] = []
    begin = time.perf_counter()

    def one_step(step: int) -> None:
        generator = step_generator(device, 0, accelerator.process_index, step)
        with accelerator.autocast():
            losses = wrapped(cache.draw(size, generator), vae, generator, probe)
        accelerator.backward(losses["total"])
        torch.nn.utils.clip_grad_norm_(parameters, train.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_average(average, model, train.ema_decay)

    for step in range(steps + WARM_UP):
        start = time.perf_counter()
        one_step(step)
        queued = time.perf_counter() - start
        if half:
            torch.cuda.synchronize()
        if step == WARM_UP - 1:
            warm = time.perf_counter() - begin
        if step >= WARM_UP:
            times.append(time.perf_counter() - start)
            queueing.append(queued)
    peak = torch.tensor(torch.cuda.max_memory_allocated() / 2**30 if half else 0.0, device=device)
    median = torch.tensor(statistics.median(times), device=device)
    peaks, medians = accelerator.gather(peak), accelerator.gather(median)
    slowest = float(medians.max())
    result = Result(
        profile=profile,
        device=torch.cuda.get_device_name() if half else "CPU",
        processes=accelerator.num_processes,
        batch=size,
        step_ms=1e3 * slowest,
        queued_ms=1e3 * statistics.median(queueing),
        objects_per_s=accelerator.num_processes * size / slowest,
        warm_up_s=warm,
        peak_gib=float(peaks.max()) if half else None,
    )
    memory = float("nan") if result.peak_gib is None else result.peak_gib
    accelerator.print(
        f"{profile} batch {result.processes} x {size} compile={part} "
        f"cuda_graphs={cuda_graphs} channels_last={channels_last} bf16_gradients={bf16_gradients}: "
        f"{result.step_ms:.1f} ms a step (queued after {result.queued_ms:.1f}), "
        f"{result.objects_per_s:.2f} objects/s, warm-up {warm:.0f} s, peak {memory:.1f} GiB",
        flush=True,
    )
    if accelerator.is_main_process:
        save(out, [result])
    if kernels:
        with torch.profiler.profile() as profiler:
            for step in range(3):
                one_step(steps + WARM_UP + step)
        averages = profiler.key_averages()
        accelerator.print(averages.table(sort_by="self_device_time_total", row_limit=kernels))
    accelerator.end_training()


def save(out: Path | None, results: Sequence[Result]) -> None:
    """As JSON, if asked for."""
    if out is not None:
        out.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
