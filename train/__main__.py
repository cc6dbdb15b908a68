"""`python -m train VERB`: from a folder of objects to a trained checkpoint, and its evaluation.

    python -m train vae   --objects DIR --out runs/vae
    python -m train cache --objects DIR --vae runs/vae --out runs/cache
    python -m train model --vae runs/vae --cache runs/cache --objects DIR --out runs/edge
    python -m train evaluate --bundle engines/edge --objects DIR --out runs/evaluation

On several GPUs: `accelerate launch --num_processes N --module train vae …`; `cache` is started once
a shard (`--shard I --shards N`), in parallel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from train.presets import PRESETS

profile_option = click.option(
    "--profile", type=click.Choice(sorted(PRESETS)), default="edge", show_default=True
)
objects_option = click.option(
    "--objects",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder of GLB, OBJ or PLY files, searched recursively.",
)
device_option = click.option(
    "--device", default=None, help="cpu or cuda:N; default: the first GPU, else cpu."
)


@click.group(help=__doc__.split("\n")[0])
def cli() -> None:
    pass


def chosen_device(device: str | None) -> str:
    import torch

    return device if device is not None else ("cuda:0" if torch.cuda.is_available() else "cpu")


def device_name(state: Any) -> str:
    """This process's device with its index, as the renderer wants it."""
    return f"cuda:{state.local_process_index}" if state.device.type == "cuda" else "cpu"


def training_objects(folder: Path) -> tuple[list[Path], list[Path]]:
    """The objects to train on, and a few kept aside to look at while training (about 1 in 50)."""
    from train.dataset import variant_rng
    from train.objects import find_objects, object_name

    files = find_objects(folder)
    if not files:
        raise click.UsageError(f"no GLB, OBJ or PLY file in {folder}")
    aside = [path for path in files if variant_rng(0, object_name(path), -1 & 0xFFFF).random() < 0.02]
    return [path for path in files if path not in set(aside)], aside


def limited(files: list[Path], limit: int | None) -> list[Path]:
    """At most `limit` files, evenly spaced, so that every family is among them."""
    if limit is None or limit >= len(files):
        return files
    return [files[index * len(files) // limit] for index in range(limit)]


@cli.command()
@profile_option
@objects_option
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--steps", default=3000, show_default=True)
@click.option("--minutes", type=float, help="Plan the number of steps from the measured speed.")
@click.option("--batch", default=64, show_default=True, help="Images a step and device.")
@click.option("--lr", default=5e-4, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--limit", type=int, help="Use only N objects, evenly spaced.")
@click.option("--workers", default=4, show_default=True)
def vae(
    profile: str, objects: Path, out: Path, steps: int, minutes: float | None, batch: int, lr: float, seed: int, limit: int | None, workers: int
) -> None:  # fmt: skip
    """Train the autoencoder for colour images and normal maps."""
    import torch
    from accelerate import PartialState

    from train.dataset import render_folder
    from train.trainer import train_vae

    state, preset = PartialState(), PRESETS[profile]
    files = limited(training_objects(objects)[0], limit)
    share = files[state.process_index :: state.num_processes]
    pictures = []
    for _, _, item in render_folder(
        share, device_name(state), 1, 2, seed + 1, workers, image_px=preset.vae.image_px
    ):
        pictures += [item.color, item.normal, torch.from_numpy(item.inputs).to(state.device)]
    images = torch.cat(pictures)
    state.print(f"vae: {images.shape[0]} images on each of {state.num_processes} devices")
    train_vae(preset, images, out, steps=steps, minutes=minutes, batch=batch, lr=lr, seed=seed)


@cli.command()
@profile_option
@objects_option
@device_option
@click.option("--vae", "vae_folder", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--variants", default=12, show_default=True, help="Augmented variants of every object.")
@click.option("--inputs", default=2, show_default=True, help="Input views of every variant.")
@click.option("--seed", default=0, show_default=True)
@click.option("--limit", type=int, help="Use only N objects, evenly spaced.")
@click.option("--shard", default=0, show_default=True)
@click.option("--shards", default=1, show_default=True)
@click.option("--workers", default=4, show_default=True)
def cache(
    profile: str, objects: Path, device: str | None, vae_folder: Path, out: Path, variants: int, inputs: int, seed: int,
    limit: int | None, shard: int, shards: int, workers: int,
) -> None:  # fmt: skip
    """Render augmented variants and keep them as latents, one shard a process."""
    from train.cache import build_shard, shares
    from train.checkpoint import load_vae

    place = chosen_device(device)
    files = list(shares(limited(training_objects(objects)[0], limit), shards))[shard]
    net = load_vae(vae_folder, PRESETS[profile]).to(place)
    build_shard(
        out / f"shard-{shard:03d}.safetensors", files, net, device=place, variants=variants, inputs=inputs, seed=seed,
        workers=workers,
    )  # fmt: skip


@cli.command()
@profile_option
@click.option("--vae", "vae_folder", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--cache", "cache_folder", type=click.Path(exists=True, path_type=Path), required=True)
@click.option(
    "--objects",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="For sample sheets of objects kept aside.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--steps", type=int)
@click.option("--minutes", type=float, help="Plan the number of steps from the measured speed.")
@click.option("--batch", type=int, help="Objects a step and device.")
@click.option("--lr", type=float)
@click.option("--lambda-var", type=float)
@click.option("--lambda-mi", type=float)
@click.option("--seed", default=0, show_default=True)
@click.option("--save-every", default=1000, show_default=True)
@click.option("--sheet-every", default=1000, show_default=True)
@click.option(
    "--compile", "compile_", is_flag=True, help="Compile the repeated blocks (minutes at the start)."
)
@click.option("--resume", is_flag=True, help="Go on from OUT/checkpoint, exactly.")
@click.option(
    "--start-from",
    type=click.Path(exists=True, path_type=Path),
    help="Begin with a checkpoint's averaged weights.",
)
def model(
    profile: str, vae_folder: Path, cache_folder: Path, objects: Path | None, out: Path, steps: int | None,
    minutes: float | None, batch: int | None, lr: float | None, lambda_var: float | None, lambda_mi: float | None,
    seed: int, save_every: int, sheet_every: int, compile_: bool, resume: bool, start_from: Path | None,
) -> None:  # fmt: skip
    """Train the regularised multiview model on cached latents (Eq. 18)."""
    from dataclasses import replace

    from accelerate import PartialState

    from train.cache import load_cache
    from train.checkpoint import load_vae
    from train.trainer import RunOptions, train_model, with_train
    from train.watch import watched

    state = PartialState()
    preset = with_train(PRESETS[profile], batch=batch, steps=steps, lr=lr)
    chosen = {k: v for k, v in {"lambda_var": lambda_var, "lambda_mi": lambda_mi}.items() if v is not None}
    preset = with_train(preset, losses=replace(preset.train.losses, **chosen))
    net = load_vae(vae_folder, preset).to(state.device)
    watch = None
    if objects is not None and state.is_main_process:
        watch = watched(training_objects(objects)[1][:40], device_name(state), preset.vae.image_px)
    data = load_cache(cache_folder, net, state.device)
    state.print(f"{data.z_0.shape[0]} variants of {data.objects} objects")
    options = RunOptions(
        out=out, seed=seed, minutes=minutes, save_every=save_every, sheet_every=sheet_every, compile=compile_,
        resume=resume, start_from=start_from,
    )  # fmt: skip
    train_model(preset, data, net, watch, options)


@cli.command()
@click.option("--checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@objects_option
@device_option
def sweep(checkpoint: Path, objects: Path, device: str | None) -> None:
    """Compare guidance scales, intervals and step counts on objects kept aside from training."""
    from train.checkpoint import preset_of
    from train.sweep import sweep as run
    from train.watch import watched

    place = chosen_device(device)
    run(checkpoint, watched(training_objects(objects)[1], place, preset_of(checkpoint).vae.image_px), place)


@cli.command()
@click.option("--bundle", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@objects_option
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Objects already measured there are kept.",
)
@click.option("--limit", type=int, help="Use only N objects, evenly spaced.")
@click.option("--no-mesh", is_flag=True, help="Measure the views alone.")
@click.option(
    "--train-objects",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="For the nearest training object; default: the folder `train` beside --objects.",
)
@click.option(
    "--index",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Features of the training objects, made once; default: train_index.npz beside OUT.",
)
@click.option("--steps", type=int, help="Default: the bundle's.")
@click.option("--guidance", type=float, help="Default: the bundle's.")
@click.option("--seed", default=0, show_default=True, help="Of the input views, the noise and the fit.")
@click.option("--workers", default=1, show_default=True, help="Processes; they share the cores.")
def evaluate(
    bundle: Path, objects: Path, out: Path, limit: int | None, no_mesh: bool, train_objects: Path | None,
    index: Path | None, steps: int | None, guidance: float | None, seed: int, workers: int,
) -> None:  # fmt: skip
    """Measure a bundle on objects not trained on, beside baselines and a ceiling, on the CPU."""
    from uc3d_rt.errors import Uc3dError

    from train.evaluate import EvaluateOptions
    from train.evaluate import evaluate as run
    from train.metrics import markdown
    from train.objects import find_objects

    try:
        options = EvaluateOptions(
            bundle=bundle, objects=objects, out=out, train_objects=train_objects, index=index,
            meshes=not no_mesh, steps=steps, guidance=guidance, seed=seed, workers=workers,
        )  # fmt: skip
        files = limited(find_objects(objects), limit)
        click.echo(markdown(run(options, files)))
    except (Uc3dError, ValueError) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    cli(prog_name="python -m train")
