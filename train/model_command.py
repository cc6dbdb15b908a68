"""`python -m train model`."""

from __future__ import annotations

from pathlib import Path

import click

from train.options import (
    FOLDER,
    OUT,
    autoencoder,
    cache_in_option,
    device_name,
    minutes_option,
    plain_errors,
    pretrained_option,
    process_state,
    profile_option,
    seed_option,
    training_objects,
    vae_option,
)
from train.presets import PRESETS, with_train


@click.command()
@profile_option
@vae_option
@pretrained_option
@click.option(
    "--cache",
    "cache_folder",
    type=FOLDER,
    help="What `python -m train cache` made; may be missing at --dry-run.",
)
@cache_in_option
@click.option(
    "--split-cache",
    is_flag=True,
    help="Every process holds shards of its own, not all: room for more variants. "
    "Make a multiple of as many shards as there are processes.",
)
@click.option(
    "--objects", type=FOLDER, help="The same folder; draws sample sheets of the objects kept aside."
)
@click.option("--out", type=OUT, help="Gets checkpoint/, log.jsonl, loss.png and sheet-*.png.")
@click.option("--steps", type=int, help="Default: the profile's.")
@minutes_option
@click.option("--batch", type=int, help="Objects a step and device; default: the profile's.")
@click.option("--lr", type=float, help="Peak learning rate; default: the profile's.")
@click.option("--lambda-var", type=float, help="Weight of L_Var in Eq. 18; 0 turns it off.")
@click.option("--lambda-mi", type=float, help="Weight of L_MI in Eq. 18; 0 turns it off.")
@click.option(
    "--relative-power",
    type=float,
    help="At t = T - 1 errors are divided by this power of themselves; 0 is Eq. 9.",
)
@click.option(
    "--last-share",
    type=click.FloatRange(0, 1),
    help="Share of the draws at t = T - 1; default: the profile's.",
)
@click.option(
    "--input-augment",
    type=click.FloatRange(0, 1),
    help="Share of the input pictures changed a little as they are drawn; default: the profile's.",
)
@click.option(
    "--weight-decay",
    type=click.FloatRange(0),
    help="Decoupled, times the learning rate; default: the profile's.",
)
@click.option("--lambda-outline", type=float, help="Weight of the loss on silhouettes at t = T - 1.")
@click.option("--lambda-normal", type=float, help="Weight of the loss on decoded normals at t = T - 1.")
@seed_option
@click.option("--save-every", default=1000, show_default=True, help="Steps between checkpoints.")
@click.option("--sheet-every", default=1000, show_default=True, help="Steps between sample sheets.")
@click.option(
    "--compile", "compile_", type=click.Choice(["blocks", "unet"]),
    help="Compile the UNet's repeated blocks, or all of it at once (minutes at the start).",
)  # fmt: skip
@click.option(
    "--cuda-graphs",
    is_flag=True,
    help="With --compile unet: replay CUDA graphs, and try which kernels convolve fastest. "
    "A resumed run is then not the same to the last bit.",
)
@click.option("--bf16-gradients", is_flag=True, help="Processes exchange gradients in bfloat16.")
@click.option(
    "--shard", is_flag=True, help="Spread the model over the processes (FSDP), if it fits into no GPU whole."
)
@click.option(
    "--growing-cache",
    is_flag=True,
    help="Follow --cache: its shards may be added to and replaced while training runs.",
)
@click.option(
    "--gradient-checkpointing/--no-gradient-checkpointing",
    default=None,
    help="Recompute the UNet's blocks in the backward pass: less memory, more time.",
)
@click.option("--resume", is_flag=True, help="Go on from OUT/checkpoint, exactly; same options as before.")
@click.option("--start-from", type=FOLDER, help="Begin with a checkpoint's averaged weights.")
@click.option("--dry-run", is_flag=True, help="Only print parameters, memory, time and cost of such a run.")
@click.option("--processes", type=click.IntRange(min=1), help="--dry-run: GPUs; default: those running.")
@click.option("--step-seconds", type=float, help="--dry-run: time of a step, for the wall time.")
@click.option("--gpu-hour-price", type=float, help="--dry-run: price of a GPU for an hour, for the cost.")
def model(
    profile: str, vae_folder: Path | None, pretrained: Path | None, cache_folder: Path | None, cache_in: str,
    split_cache: bool, objects: Path | None, out: Path | None, steps: int | None, minutes: float | None,
    batch: int | None, lr: float | None, lambda_var: float | None, lambda_mi: float | None,
    relative_power: float | None, last_share: float | None, lambda_outline: float | None,
    lambda_normal: float | None, input_augment: float | None, weight_decay: float | None, seed: int,
    save_every: int, sheet_every: int, compile_: str | None, cuda_graphs: bool, bf16_gradients: bool,
    growing_cache: bool, gradient_checkpointing: bool | None, resume: bool, start_from: Path | None,
    shard: bool, dry_run: bool, processes: int | None, step_seconds: float | None,
    gpu_hour_price: float | None,
) -> None:  # fmt: skip
    """Train the regularised multiview model on cached latents (Eq. 18)."""
    if resume and start_from is not None:
        raise click.UsageError("--resume goes on with OUT/checkpoint, --start-from begins anew; give one")

    if not dry_run:
        given = {"--cache": cache_folder, "--out": out}
        if missing := [name for name, value in given.items() if value is None]:
            raise click.UsageError(f"{' and '.join(missing)} must be given, but for a --dry-run")
        planned = {
            "--processes": processes,
            "--step-seconds": step_seconds,
            "--gpu-hour-price": gpu_hour_price,
        }
        if useless := [name for name, value in planned.items() if value is not None]:
            raise click.UsageError(f"{', '.join(useless)}: for --dry-run only")

    from dataclasses import replace

    import torch

    from train.cache import WHOLE, load_cache
    from train.checkpoint import CheckpointError, finish_interrupted_save, load_state
    from train.trainer import RunOptions, check_resumable, train_model
    from train.watch import watched

    if bf16_gradients and not torch.cuda.is_available():
        raise click.UsageError("--bf16-gradients is for several CUDA devices; leave it out")
    if cuda_graphs and not (torch.cuda.is_available() and compile_ == "unet" and not shard):
        raise click.UsageError("--cuda-graphs is for CUDA devices, with --compile unet and without --shard")
    state, unet = process_state(), None
    with plain_errors():
        losses = PRESETS[profile].train.losses
        chosen = {
            "lambda_var": lambda_var, "lambda_mi": lambda_mi,
            "relative_power": relative_power,
            "lambda_outline": lambda_outline, "lambda_normal": lambda_normal,
        }  # fmt: skip
        losses = replace(losses, **{name: value for name, value in chosen.items() if value is not None})
        preset = with_train(
            PRESETS[profile], batch=batch, steps=steps, lr=lr, last_share=last_share, losses=losses,
            input_augment=input_augment, weight_decay=weight_decay,
            gradient_checkpointing=gradient_checkpointing,
        )  # fmt: skip
        if dry_run:
            from train.cache import cache_bytes
            from train.dry_run import Plan, memory_parts, parameter_counts, report

            count = processes or state.num_processes
            part = (0, count) if split_cache else WHOLE
            on_gpu = cache_bytes(cache_folder, part) if cache_folder and cache_in == "device" else 0
            plan = Plan(preset, count, on_gpu, shard, step_seconds, gpu_hour_price)
            if state.is_main_process:
                click.echo(report(plan, parameter_counts(preset), memory_parts(plan)))
            return
        assert out is not None and cache_folder is not None
        checkpoint = out / "checkpoint"
        with state.main_process_first():  # one process mends a save that was interrupted
            finish_interrupted_save(checkpoint)
        if resume:
            record = load_state(checkpoint)
            check_resumable(checkpoint, record, preset, preset.train.batch * state.num_processes, seed)
        elif checkpoint.exists():
            raise click.UsageError(
                f"{checkpoint} exists; go on from it with --resume, or choose another --out"
            )
        net = autoencoder(preset, vae_folder, pretrained).to(state.device)
        if pretrained is not None and not resume:
            from train.pretrained import load_sdxl_unet

            unet = load_sdxl_unet(pretrained, preset.unet)
        part = (state.process_index, state.num_processes) if split_cache else WHOLE
        data = load_cache(cache_folder, net, state.device, cache_in, part)
        state.print(f"{data.variants} variants of {data.objects} objects")
        aside = training_objects(objects)[1][:40] if objects is not None and state.is_main_process else []
        watch = watched(aside, device_name(state), preset.vae.image_px) if aside else None
    if objects is not None and not aside:
        state.print("no object is kept aside (about 1 in 50 is), so no sample sheets will be drawn")
    options = RunOptions(
        out=out, seed=seed, minutes=minutes, save_every=save_every, sheet_every=sheet_every, compile=compile_,
        cuda_graphs=cuda_graphs, bf16_gradients=bf16_gradients, shard=shard, resume=resume,
        start_from=start_from, refresh_from=cache_folder if growing_cache else None, cache_in=cache_in,
        cache_part=part,
    )  # fmt: skip
    with plain_errors(CheckpointError, FloatingPointError, OSError):
        train_model(preset, data, net, watch, options, unet)
