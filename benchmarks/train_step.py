"""Time one training step of the multiview model on random latents.

    python benchmarks/train_step.py [--profile edge] [--batch 64] [--compile blocks] [--channels-last]
    python -m torch.distributed.run --nproc_per_node 4 benchmarks/train_step.py ... [--bf16-gradients]

Prints objects a second of all processes (median of the timed steps, after warm-up), the processor's
share of a step (the time until everything is queued), and the peak GPU memory.
"""

from __future__ import annotations

import statistics
import time

import click
import torch

from train.average import update_average
from train.cache import LatentCache
from train.model import MultiviewModel
from train.optimizer import build_optimizers
from train.presets import PRESETS
from train.schedule import step_generator
from train.trainer import compile_model, make_accelerator
from train.vae import Vae


@click.command(help=__doc__.split("\n")[0])
@click.option("--profile", type=click.Choice(sorted(PRESETS)), default="edge", show_default=True)
@click.option("--batch", type=int, help="Objects a step; default: the preset's.")
@click.option("--steps", default=20, show_default=True)
@click.option("--compile", "part", type=click.Choice(["blocks", "unet"]))
@click.option("--channels-last", is_flag=True)
@click.option("--bf16-gradients", is_flag=True, help="With several processes: exchange them in bfloat16.")
@click.option("--kernels", default=0, help="Print this many of the kernels that take longest.")
def main(
    profile: str, batch: int | None, steps: int, part: str | None, channels_last: bool, bf16_gradients: bool,
    kernels: int,
) -> None:  # fmt: skip
    preset = PRESETS[profile]
    accelerator = make_accelerator(bf16_gradients)
    device = accelerator.device
    half = device.type == "cuda"
    torch.set_float32_matmul_precision("high")
    model, vae = MultiviewModel(preset).to(device), Vae(preset.vae).to(device).requires_grad_(False)
    if channels_last:
        model.unet = model.unet.to(memory_format=torch.channels_last)
    if part is not None:
        compile_model(model, part)
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
    optimizers = build_optimizers(parameters, train.optimizer, train.lr, train.weight_decay)
    average: dict[str, torch.Tensor] = {}
    size = batch or preset.train.batch
    times: list[float] = []
    queueing: list[float] = []
    begin = time.perf_counter()

    def one_step(step: int) -> None:
        generator = step_generator(device, 0, 0, step)
        with accelerator.autocast():
            losses = wrapped(cache.draw(size, generator), vae, generator)
        losses["total"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_average(average, model, train.ema_decay)

    for step in range(steps + 5):
        start = time.perf_counter()
        one_step(step)
        queued = time.perf_counter() - start
        if half:
            torch.cuda.synchronize()
        if step == 4:
            warm = time.perf_counter() - begin
        if step >= 5:
            times.append(time.perf_counter() - start)
            queueing.append(queued)
    median = statistics.median(times)
    memory = torch.cuda.max_memory_allocated() / 2**30 if half else float("nan")
    accelerator.print(
        f"{profile} batch {accelerator.num_processes} x {size} compile={part} "
        f"channels_last={channels_last} bf16_gradients={bf16_gradients}: {1e3 * median:.1f} ms a step "
        f"(queued after {1e3 * statistics.median(queueing):.1f}), "
        f"{accelerator.num_processes * size / median:.0f} objects/s, "
        f"warm-up {warm:.0f} s, peak {memory:.1f} GiB",
        flush=True,
    )
    if kernels:
        with torch.profiler.profile() as profiler:
            for step in range(3):
                one_step(steps + 5 + step)
        averages = profiler.key_averages()
        accelerator.print(averages.table(sort_by="self_device_time_total", row_limit=kernels))


if __name__ == "__main__":
    main()
