"""Training of the multiview model on cached latents.

`accelerate` places it on one or many GPUs.  Every step draws its data, noise and timesteps from a
generator seeded by (seed, rank, step), so a resumed run goes on exactly as the one that stopped.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, DistributedType
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from train.average import full_average, update_average
from train.cache import WHOLE, Cache, reload_cache, shard_names
from train.checkpoint import (
    CheckpointError,
    differences,
    load_state,
    load_weights,
    read_tensors,
    restore_optimizers,
    save_checkpoint,
)
from train.model import MultiviewModel
from train.multiview_unet import MultiviewBlock, MultiviewUNet
from train.normal_probe import probe_of_run
from train.optimizer import build_optimizers
from train.presets import Preset
from train.pretrained import KlVae
from train.schedule import Planner, learning_rate, step_generator
from train.sharding import local, shard, spread_like, spread_moments
from train.sheets import loss_curves
from train.watch import Watch, look


@dataclass(frozen=True)
class RunOptions:
    """What a user sets for one run."""

    out: Path
    seed: int = 0
    minutes: float | None = None  # plan the number of steps from the measured speed instead
    save_every: int = 1000
    sheet_every: int = 1000
    log_every: int = 20
    compile: str | None = None  # "blocks" or "unet": see `compile_model`
    cuda_graphs: bool = False  # the compiled UNet and Muon as CUDA graphs, convolutions chosen by trial
    bf16_gradients: bool = False  # processes exchange gradients in bfloat16: half the bytes
    shard: bool = False  # spread the model over the processes; see train/sharding.py
    resume: bool = False
    start_from: Path | None = None  # begin with another checkpoint's EMA weights
    refresh_from: Path | None = None  # folder of the cache, if its shards still change
    refresh_every: int = 500  # steps between looks into it
    cache_in: str = "device"  # one of `train.cache.PLACES`, for the shards read anew
    cache_part: tuple[int, int] = WHOLE  # which of how many processes this is, if each holds its own


def make_accelerator(bf16_gradients: bool = False) -> Accelerator:
    """bfloat16 autocast on GPUs; nothing but gradients is exchanged between processes each step."""
    hook = DDPCommunicationHookType.BF16 if bf16_gradients else DDPCommunicationHookType.NO
    distributed = DistributedDataParallelKwargs(
        broadcast_buffers=False, gradient_as_bucket_view=True, comm_hook=hook
    )
    return Accelerator(
        mixed_precision="bf16" if torch.cuda.is_available() else "no", kwargs_handlers=[distributed]
    )


def compile_model(model: MultiviewModel, part: str, graphs: bool = False) -> None:
    """Compile the UNet's repeated blocks each, or the UNet as one, and the image encoder's blocks.

    Args:
        part: "blocks" or "unet".
        graphs: the UNet as one is replayed as CUDA graphs, one each way.
    """
    from diffusers.models.resnet import ResnetBlock2D

    torch._dynamo.config.recompile_limit = 64
    if part == "unet":
        # One graph also where gradients are exchanged: it is not cut at their buckets.
        torch._dynamo.config.optimize_ddp = False
        model.unet.unet.compile(dynamic=False, mode="reduce-overhead" if graphs else "default")
    else:
        for module in model.unet.modules():
            if isinstance(module, ResnetBlock2D | MultiviewBlock):
                module.compile(dynamic=False)
    for block in model.encoder.blocks:
        block.compile(dynamic=False)


def recompute_blocks(model: MultiviewModel, vae: torch.nn.Module) -> None:
    """Let the UNet's blocks, and those of SDXL's autoencoder, be computed again in the backward pass.

    L_MI goes back through the decoder, whose activations at full resolution are the largest.
    """
    model.unet.unet.enable_gradient_checkpointing()
    if isinstance(vae, KlVae):
        vae.net.enable_gradient_checkpointing()


def train_model(
    preset: Preset,
    cache: Cache,
    vae: torch.nn.Module,
    watch: Watch | None,
    options: RunOptions,
    unet: UNet2DConditionModel | None = None,
) -> Path:
    """Train the multiview model (Eq. 18); returns the folder of the last checkpoint.

    Args:
        preset: sizes and settings.
        cache: latents of the training variants, encoded by `vae`.
        vae: the frozen autoencoder; decodes for L_MI.
        watch: objects to draw sample sheets of; None draws none.
        options: where to write, and how often.
        unet: a widened pretrained UNet to begin with; None begins from random weights.

    Raises:
        FloatingPointError: the loss or the gradient is no number any more; nothing is saved then.
        FileNotFoundError, CheckpointError: a checkpoint to go on from is missing or does not fit.
    """
    accelerator = make_accelerator(options.bf16_gradients)
    device, spec = accelerator.device, preset.train
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(options.seed)
    model = MultiviewModel(preset, None if unet is None else MultiviewUNet(preset.unet, unet)).to(device)
    if spec.gradient_checkpointing:
        recompute_blocks(model, vae)
    if spec.losses.lambda_mi == 0:
        model.heads.requires_grad_(False)
    vae = vae.to(device)
    folder = options.out / "checkpoint"
    size = spec.batch * accelerator.num_processes
    average: dict[str, Tensor] = {}
    step, history, planner = 0, [], Planner(spec.steps, options.minutes)
    if options.resume:
        with accelerator.main_process_first():  # one process mends a save that was interrupted
            state = load_state(folder)
        check_resumable(folder, state, preset, size, options.seed)
        step, history = int(state["step"]), list(state["history"])
        planner.total, planner.minutes = int(state["total_steps"]), None
        mend = "restore the checkpoint from a copy, or train again"
        load_weights(model, folder / "model.safetensors", mend)
    elif options.start_from is not None:
        load_weights(model, options.start_from / "ema.safetensors", "give the folder of a checkpoint")
    sharded = options.shard or accelerator.distributed_type == DistributedType.FSDP
    if sharded:
        if spec.optimizer != "adamw" or options.bf16_gradients:
            raise CheckpointError("a sharded model trains with adamw and exchanges gradients in float32")
        shard(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizers = build_optimizers(trainable, spec.optimizer, spec.lr, spec.weight_decay, options.cuda_graphs)
    if options.resume:
        ema = read_tensors(folder / "ema.safetensors", mend, device)
        average.update({n: local(spread_like(ema[n], p)) for n, p in model.named_parameters()})
        moments = read_tensors(folder / "optimizer.safetensors", mend, device)
        restore_optimizers(optimizers, spread_moments(optimizers, moments))
    if options.compile:
        compile_model(model, options.compile, options.cuda_graphs)
        torch.backends.cudnn.benchmark = options.cuda_graphs
    wrapped = model if sharded else accelerator.prepare_model(model)
    if accelerator.is_main_process:
        options.out.mkdir(parents=True, exist_ok=True)
        # Lines that a killed run logged after its last checkpoint are about to be logged again.
        lines = [json.dumps(entry) + "\n" for entry in history]
        (options.out / "log.jsonl").write_text("".join(lines), encoding="utf-8")
    probe = None
    if spec.losses.probed:
        with accelerator.main_process_first():  # the others read what it wrote
            keep = options.resume or not accelerator.is_main_process
            probe = probe_of_run(options.out, preset, cache, vae, options.seed, keep=keep)
    progress = tqdm(
        total=planner.total,
        initial=step,
        desc=preset.name,
        disable=not accelerator.is_main_process,
        mininterval=5,
    )
    sums: dict[str, Tensor] = {}
    summed = 0
    while step < planner.total:
        rate = learning_rate(step, planner.total, spec.warmup, spec.lr, spec.lr_final, spec.lr_drop)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        generator = step_generator(device, options.seed, accelerator.process_index, step)
        look_again = options.refresh_from is not None and step % options.refresh_every == 0
        if look_again and shard_names(options.refresh_from, options.cache_part) not in ((), cache.shards):
            cache.free()  # the device need not hold two
            cache = reload_cache(options.refresh_from, vae, device, options.cache_in, options.cache_part)
            names = f"{cache.shards[0]} ... {cache.shards[-1]}"
            accelerator.print(f"step {step}: {cache.variants} variants, {names}", flush=True)
        batch = cache.draw(spec.batch, generator)
        with accelerator.autocast():
            losses = wrapped(batch, vae, generator, probe)
        accelerator.backward(losses["total"])
        norm = torch.nn.utils.clip_grad_norm_(trainable, spec.grad_clip)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_average(average, model, min(spec.ema_decay, (1 + step) / (10 + step)))
        step += 1
        summed += 1
        for name, value in {**losses, "grad_norm": norm}.items():
            sums[name] = sums.get(name, 0) + value.detach()
        planner.update(step, accelerator)
        progress.total = planner.total
        progress.update()
        last = step == planner.total
        save, sheet = step % options.save_every == 0 or last, step % options.sheet_every == 0 or last
        if accelerator.is_main_process and (step % options.log_every == 0 or save):
            entry = {"step": step, **{name: float(value) / summed for name, value in sums.items()}}
            sums, summed = {}, 0
            if not all(math.isfinite(value) for value in entry.values()):
                raise FloatingPointError(
                    f"the loss diverged at step {step} ({entry}); lower the learning rate"
                )
            history.append(entry)
            progress.set_postfix({name: f"{entry[name]:.4f}" for name in losses})
            with (options.out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(entry) + "\n")
        if save:
            save_checkpoint(
                folder,
                preset=preset,
                model=model,
                ema=full_average(average, model),
                vae=vae,
                optimizers=optimizers,
                state={
                    "step": step,
                    "total_steps": planner.total,
                    "batch": size,
                    "seed": options.seed,
                    "history": history,
                },
                write=accelerator.is_main_process,
            )
            if accelerator.is_main_process:
                loss_curves(options.out / "loss.png", history)
        if sheet:
            weights = full_average(average, model)  # by all processes, where it is sharded
            if watch is not None:
                look(preset, weights, vae, watch, options.out / f"sheet-{step:06d}.png")
    progress.close()
    accelerator.wait_for_everyone()
    return folder


def check_resumable(folder: Path, state: dict[str, Any], preset: Preset, batch: int, seed: int) -> None:
    """Refuse to go on with other settings: the run would be neither the old one nor a new one.

    The number of steps is the checkpoint's own, and recomputing activations changes no result.

    Raises:
        CheckpointError: names every setting that differs.
    """
    saved = {"profile": state["preset"], "batch of all devices": state["batch"], "seed": state["seed"]}
    changed = differences(saved, {"profile": preset.name, "batch of all devices": batch, "seed": seed})
    free = ("name", "sampling", "train.steps", "train.gradient_checkpointing")
    changed += [line for line in differences(state["config"], asdict(preset)) if not line.startswith(free)]
    if changed:
        raise CheckpointError(
            f"{folder} was trained with other settings ({'; '.join(changed)}); "
            "resume with the same ones, or begin anew with --start-from"
        )
