"""`python -m train VERB`: from a folder of objects to a trained checkpoint, and its evaluation.

\b
    python -m train toy   --out runs/toy          (all of it, small, in minutes)
\b
    python -m train vae   --objects DIR --out runs/vae
    python -m train cache --objects DIR --vae runs/vae --out runs/cache
    python -m train model --vae runs/vae --cache runs/cache --objects DIR --out runs/edge
    python -m export onnx --checkpoint runs/edge/checkpoint --out engines/edge
    python -m train evaluate --bundle engines/edge --objects DIR --out runs/evaluation

On several GPUs: `accelerate launch --num_processes N --module train vae …`; `cache` is started once
a shard (`--shard I --shards N`), in parallel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from train.presets import PRESETS, KlVaeSpec, Preset

if TYPE_CHECKING:
    from train.pretrained import KlVae
    from train.vae import Vae

FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
WEIGHTS = click.Path(exists=True, dir_okay=False, path_type=Path)
OUT = click.Path(file_okay=False, path_type=Path)

profile_option = click.option(
    "--profile",
    type=click.Choice(sorted(PRESETS)),
    default="edge",
    show_default=True,
    help="toy: 32 px, for tests; edge: 256 px, the one that ships; sdxl: 512 px, from SDXL's weights.",
)
objects_option = click.option(
    "--objects", type=FOLDER, required=True, help="Folder of GLB, OBJ or PLY files, searched recursively."
)
vae_option = click.option("--vae", "vae_folder", type=FOLDER, help="What `python -m train vae` wrote.")
pretrained_option = click.option(
    "--pretrained", type=FOLDER, help="sdxl only: a local diffusers folder of SDXL, with unet/ and vae/."
)
device_option = click.option(
    "--device", default=None, help="cpu or cuda:N; default: the first GPU, else cpu."
)
seed_option = click.option(
    "--seed", default=0, show_default=True, help="Same seed, same machine: same result."
)
limit_option = click.option("--limit", type=click.IntRange(min=1), help="Use only N objects, evenly spaced.")
workers_option = click.option(
    "--workers", default=4, show_default=True, type=click.IntRange(min=1), help="Threads that read objects."
)
minutes_option = click.option(
    "--minutes", type=float, help="Plan the number of steps from the measured speed."
)


@click.group(help=__doc__)
def cli() -> None:
    """All verbs."""


@contextmanager
def plain_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Tell errors that a user can mend in one line, without a traceback."""
    kinds = kinds or (ValueError, OSError)
    try:
        yield
    except kinds as error:
        raise click.ClickException(str(error)) from error


def chosen_device(device: str | None) -> str:
    """The device asked for, or the first GPU, or the CPU."""
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
    aside = {path for path in files if variant_rng(0, object_name(path), 0xFFFF).random() < 0.02}
    return [path for path in files if path not in aside], [path for path in files if path in aside]


def limited(files: list[Path], limit: int | None) -> list[Path]:
    """At most `limit` files, evenly spaced, so that every family is among them."""
    if limit is None or limit >= len(files):
        return files
    return [files[index * len(files) // limit] for index in range(limit)]


def autoencoder(preset: Preset, vae_folder: Path | None, pretrained: Path | None) -> Vae | KlVae:
    """The frozen autoencoder that `--vae` or, for SDXL, `--pretrained` names."""
    from train.checkpoint import load_vae

    if pretrained is not None and not isinstance(preset.vae, KlVaeSpec):
        raise click.UsageError(f"--pretrained is for the sdxl profile; {preset.name} trains from nothing")
    if vae_folder is not None:
        return load_vae(vae_folder, preset)
    if isinstance(preset.vae, KlVaeSpec):
        if pretrained is None:
            raise click.UsageError("sdxl needs --pretrained DIR, or the --vae of one of its checkpoints")
        from train.pretrained import load_sdxl_vae

        return load_sdxl_vae(pretrained, preset.vae)
    raise click.UsageError(
        f"--vae is missing; make one: python -m train vae --profile {preset.name} --objects DIR --out DIR"
    )


@cli.command()
@profile_option
@objects_option
@click.option("--out", type=OUT, required=True, help="Gets vae.safetensors.")
@click.option("--steps", default=3000, show_default=True, type=click.IntRange(min=1))
@minutes_option
@click.option("--batch", default=64, show_default=True, help="Images a step and device.")
@click.option("--lr", default=5e-4, show_default=True, help="Peak learning rate.")
@seed_option
@limit_option
@workers_option
def vae(
    profile: str, objects: Path, out: Path, steps: int, minutes: float | None, batch: int, lr: float,
    seed: int, limit: int | None, workers: int,
) -> None:  # fmt: skip
    """Train the autoencoder for colour images and normal maps."""
    preset = PRESETS[profile]
    if isinstance(preset.vae, KlVaeSpec):
        raise click.UsageError(f"{profile} has SDXL's autoencoder; give --pretrained to cache and model")

    import torch
    from accelerate import PartialState

    from train.dataset import render_folder
    from train.trainer import train_vae

    state = PartialState()
    pictures = []
    with plain_errors():
        files = limited(training_objects(objects)[0], limit)
        share = files[state.process_index :: state.num_processes]
        stream = render_folder(
            share, device_name(state), 1, 2, seed + 1, workers, image_px=preset.vae.image_px
        )
        for _, _, item in stream:
            pictures += [item.color, item.normal, torch.from_numpy(item.inputs).to(state.device)]
    images = torch.cat(pictures)
    state.print(f"vae: {images.shape[0]} images on each of {state.num_processes} devices")
    with plain_errors(FloatingPointError, OSError):
        train_vae(preset, images, out, steps=steps, minutes=minutes, batch=batch, lr=lr, seed=seed)


@cli.command()
@profile_option
@objects_option
@device_option
@vae_option
@pretrained_option
@click.option("--out", type=OUT, required=True, help="Gets one shard-NNN.safetensors a process.")
@click.option("--variants", default=12, show_default=True, help="Augmented variants of every object.")
@click.option("--inputs", default=2, show_default=True, help="Input views of every variant.")
@seed_option
@limit_option
@click.option(
    "--shard", default=0, show_default=True, type=click.IntRange(min=0), help="Which share, from 0."
)
@click.option("--shards", default=1, show_default=True, type=click.IntRange(min=1), help="Of how many.")
@workers_option
def cache(
    profile: str, objects: Path, device: str | None, vae_folder: Path | None, pretrained: Path | None,
    out: Path, variants: int, inputs: int, seed: int, limit: int | None, shard: int, shards: int,
    workers: int,
) -> None:  # fmt: skip
    """Render augmented variants and keep them as latents, one shard a process."""
    if shard >= shards:
        raise click.UsageError(f"--shard {shard} is not below --shards {shards}; shards count from 0")

    from train.cache import build_shard, shares

    place = chosen_device(device)
    with plain_errors():
        files = list(shares(limited(training_objects(objects)[0], limit), shards))[shard]
        net = autoencoder(PRESETS[profile], vae_folder, pretrained).to(place)
        build_shard(
            out / f"shard-{shard:03d}.safetensors",
            files,
            net,
            device=place,
            variants=variants,
            inputs=inputs,
            seed=seed,
            workers=workers,
        )


@cli.command()
@profile_option
@vae_option
@pretrained_option
@click.option(
    "--cache", "cache_folder", type=FOLDER, required=True, help="What `python -m train cache` wrote."
)
@click.option(
    "--objects", type=FOLDER, help="The same folder; draws sample sheets of the objects kept aside."
)
@click.option("--out", type=OUT, required=True, help="Gets checkpoint/, log.jsonl, loss.png and sheet-*.png.")
@click.option("--steps", type=int, help="Default: the profile's.")
@minutes_option
@click.option("--batch", type=int, help="Objects a step and device; default: the profile's.")
@click.option("--lr", type=float, help="Peak learning rate; default: the profile's.")
@click.option("--lambda-var", type=float, help="Weight of L_Var in Eq. 18; 0 turns it off.")
@click.option("--lambda-mi", type=float, help="Weight of L_MI in Eq. 18; 0 turns it off.")
@seed_option
@click.option("--save-every", default=1000, show_default=True, help="Steps between checkpoints.")
@click.option("--sheet-every", default=1000, show_default=True, help="Steps between sample sheets.")
@click.option(
    "--compile", "compile_", type=click.Choice(["blocks", "unet"]),
    help="Compile the UNet's repeated blocks, or all of it at once (minutes at the start).",
)  # fmt: skip
@click.option("--bf16-gradients", is_flag=True, help="Processes exchange gradients in bfloat16.")
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
def model(
    profile: str, vae_folder: Path | None, pretrained: Path | None, cache_folder: Path, objects: Path | None,
    out: Path, steps: int | None, minutes: float | None, batch: int | None, lr: float | None,
    lambda_var: float | None, lambda_mi: float | None, seed: int, save_every: int, sheet_every: int,
    compile_: str | None, bf16_gradients: bool, growing_cache: bool, gradient_checkpointing: bool | None,
    resume: bool, start_from: Path | None,
) -> None:  # fmt: skip
    """Train the regularised multiview model on cached latents (Eq. 18)."""
    if resume and start_from is not None:
        raise click.UsageError("--resume goes on with OUT/checkpoint, --start-from begins anew; give one")

    from dataclasses import replace

    import torch
    from accelerate import PartialState

    from train.cache import load_cache
    from train.checkpoint import CheckpointError, finish_interrupted_save, load_state
    from train.trainer import RunOptions, check_resumable, train_model, with_train
    from train.watch import watched

    if bf16_gradients and not torch.cuda.is_available():
        raise click.UsageError("--bf16-gradients is for several CUDA devices; leave it out")
    state, unet = PartialState(), None
    with plain_errors():
        losses = PRESETS[profile].train.losses
        chosen = {"lambda_var": lambda_var, "lambda_mi": lambda_mi}
        losses = replace(losses, **{name: value for name, value in chosen.items() if value is not None})
        preset = with_train(
            PRESETS[profile], batch=batch, steps=steps, lr=lr, losses=losses,
            gradient_checkpointing=gradient_checkpointing,
        )  # fmt: skip
        checkpoint = out / "checkpoint"
        if resume:
            record = load_state(checkpoint)
            check_resumable(checkpoint, record, preset, preset.train.batch * state.num_processes, seed)
        else:
            finish_interrupted_save(checkpoint)
            if checkpoint.exists():
                raise click.UsageError(
                    f"{checkpoint} exists; go on from it with --resume, or choose another --out"
                )
        net = autoencoder(preset, vae_folder, pretrained).to(state.device)
        if pretrained is not None and not resume:
            from train.pretrained import load_sdxl_unet

            unet = load_sdxl_unet(pretrained, preset.unet)
        data = load_cache(cache_folder, net, state.device)
        state.print(f"{data.z_0.shape[0]} variants of {data.objects} objects")
        aside = training_objects(objects)[1][:40] if objects is not None and state.is_main_process else []
        watch = watched(aside, device_name(state), preset.vae.image_px) if aside else None
    if objects is not None and not aside:
        state.print("no object is kept aside (about 1 in 50 is), so no sample sheets will be drawn")
    options = RunOptions(
        out=out, seed=seed, minutes=minutes, save_every=save_every, sheet_every=sheet_every, compile=compile_,
        bf16_gradients=bf16_gradients, resume=resume, start_from=start_from,
        refresh_from=cache_folder if growing_cache else None,
    )  # fmt: skip
    with plain_errors(CheckpointError, FloatingPointError, OSError):
        train_model(preset, data, net, watch, options, unet)


@cli.command()
@click.option("--checkpoint", type=FOLDER, required=True, help="OUT/checkpoint of `python -m train model`.")
@objects_option
@device_option
@click.option(
    "--count", default=40, show_default=True, type=click.IntRange(min=1), help="Objects of each set."
)
def probe(checkpoint: Path, objects: Path, device: str | None, count: int) -> None:
    """Show how much of the views a checkpoint tells from the image tokens and how much from E(y)."""
    import torch

    from train.checkpoint import load_vae, load_weights, preset_of
    from train.model import MultiviewModel
    from train.probe import errors_of_conditions, table
    from train.watch import watched

    place = chosen_device(device)
    with plain_errors():
        preset = preset_of(checkpoint)
        model = MultiviewModel(preset).to(place).eval()
        load_weights(model, checkpoint / "ema.safetensors", "give the folder of a checkpoint")
        vae = load_vae(checkpoint, preset).to(torch.device(place))
        trained, aside = training_objects(objects)
        sets = {"trained on": limited(trained, count), "kept aside": limited(aside, count)}
        rows = {
            f"{len(files)} {name}": errors_of_conditions(
                model, vae, watched(files, place, preset.vae.image_px)
            )
            for name, files in sets.items()
            if files
        }
    click.echo(table(rows))


@cli.command()
@click.option("--checkpoint", type=FOLDER, required=True, help="OUT/checkpoint of `python -m train model`.")
@objects_option
@device_option
def sweep(checkpoint: Path, objects: Path, device: str | None) -> None:
    """Compare guidance scales, intervals and step counts on objects kept aside from training."""
    from train.checkpoint import preset_of
    from train.sweep import sweep as run
    from train.watch import watched

    place = chosen_device(device)
    with plain_errors():
        preset = preset_of(checkpoint)
        aside = training_objects(objects)[1]
        if not aside:
            raise click.UsageError(
                f"no object of {objects} is kept aside (about 1 in 50 is); give more objects"
            )
        watch = watched(aside, place, preset.vae.image_px)
    with plain_errors(OSError):
        run(checkpoint, watch, place)


@cli.command()
@click.option("--out", type=OUT, required=True, help="Gets everything: objects, sheet, bundle, mesh.")
@click.option("--steps", default=300, show_default=True, type=click.IntRange(min=20), help="Of the model.")
@click.option(
    "--vae-steps", default=300, show_default=True, type=click.IntRange(min=20), help="Of the autoencoder."
)
@seed_option
def toy(out: Path, steps: int, vae_steps: int, seed: int) -> None:
    """Run the whole method, small, on a CPU: objects, training, bundle, mesh (see train/toy.py)."""
    from subprocess import CalledProcessError

    from train.toy import run

    # A program that `run` started has told its own error by then.
    with plain_errors(FloatingPointError, OSError, CalledProcessError):
        run(out, steps=steps, vae_steps=vae_steps, seed=seed)


@cli.command()
@click.option("--bundle", type=FOLDER, required=True, help="Folder with a manifest.json.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="A PNG, WebP or JPEG file."
)
@click.option("--steps", type=int, help="Default: the bundle's.")
@click.option("--guidance", type=float, help="Default: the bundle's.")
@seed_option
@click.argument(
    "pictures", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
def gallery(
    bundle: Path, out: Path, steps: int | None, guidance: float | None, seed: int, pictures: tuple[Path, ...]
) -> None:
    """Draw a sheet of what a bundle makes of PICTURES: views, normals, and the mesh from all sides."""
    from train.gallery import gallery as run
    from uc3d_rt.errors import Uc3dError

    with plain_errors(Uc3dError, OSError):
        run(bundle, pictures, out, seed, click.echo, steps=steps, guidance=guidance)


@cli.command()
@click.option("--bundle", type=FOLDER, required=True, help="Folder with a manifest.json.")
@click.option("--objects", type=FOLDER, help="Folder of GLB, OBJ or PLY files, searched recursively.")
@click.option(
    "--pictures", type=FOLDER, help="text only: a folder of pictures with prompts.csv (file,prompt)."
)
@click.option("--out", type=OUT, required=True, help="Objects already measured there are kept.")
@click.option(
    "--protocol",
    type=click.Choice(["all", "views", "mesh", "normals", "viewpoint", "text"]),
    default="all",
    show_default=True,
    help="What is measured: as the paper's tables; see docs/training.md.",
)
@limit_option
@click.option("--no-mesh", is_flag=True, help="Fit no meshes: measure the views alone.")
@click.option(
    "--azimuths", type=click.IntRange(min=2), help="viewpoint only: inputs of each object; default: 16."
)
@click.option(
    "--train-objects",
    type=FOLDER,
    help="For the nearest training object; default: the folder `train` beside --objects.",
)
@click.option(
    "--index",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Features of the training objects, made once; default: train_index.npz beside OUT.",
)
@click.option("--lpips-weights", type=WEIGHTS, help="For LPIPS: torchvision's AlexNet or VGG-16.")
@click.option("--fid-weights", type=WEIGHTS, help="text only, for FID: torch-fidelity's InceptionV3.")
@click.option(
    "--clip", type=FOLDER, help="text only, for the CLIP score: a folder of a transformers CLIPModel."
)
@click.option("--device", default="cpu", show_default=True, help="Of networks and fit: cpu, cuda or cuda:N.")
@click.option("--steps", type=int, help="Default: the bundle's.")
@click.option("--guidance", type=float, help="Default: the bundle's.")
@click.option("--seed", default=0, show_default=True, help="Of the input views, the noise and the fit.")
@click.option("--workers", default=1, show_default=True, help="Processes; they share the cores.")
def evaluate(
    bundle: Path, objects: Path | None, pictures: Path | None, out: Path, protocol: str, limit: int | None,
    no_mesh: bool, azimuths: int | None, train_objects: Path | None, index: Path | None,
    lpips_weights: Path | None, fid_weights: Path | None, clip: Path | None, device: str,
    steps: int | None, guidance: float | None, seed: int, workers: int,
) -> None:  # fmt: skip
    """Measure a bundle on objects not trained on, beside baselines and a ceiling."""
    text = protocol == "text"
    folder = pictures if text else objects
    if folder is None or (objects if text else pictures) is not None:
        raise click.UsageError(
            f"--protocol {protocol} takes {'--pictures' if text else '--objects'}, a folder"
        )
    if azimuths is not None and protocol != "viewpoint":
        raise click.UsageError("--azimuths is for --protocol viewpoint")
    if not text and (fid_weights is not None or clip is not None):
        raise click.UsageError("--fid-weights and --clip are for --protocol text")
    if lpips_weights is not None and protocol in ("mesh", "normals", "text"):
        raise click.UsageError(f"--protocol {protocol} has no LPIPS; leave out --lpips-weights")

    from train.evaluate import evaluate as run
    from train.objects import find_objects
    from train.perceptual import Weights
    from train.protocols import AZIMUTHS, EvaluateOptions
    from train.text import read_prompts
    from uc3d_rt.errors import Uc3dError

    with plain_errors(ValueError, Uc3dError):
        found = list(read_prompts(folder)) if text else find_objects(folder)
    with plain_errors(Uc3dError):
        options = EvaluateOptions(
            bundle=bundle, objects=folder, out=out, train_objects=train_objects, index=index,
            meshes=not no_mesh, steps=steps, guidance=guidance, seed=seed, workers=workers,
            protocol=protocol, azimuths=azimuths or AZIMUTHS, device=device,
            weights=Weights(lpips=lpips_weights, fid=fid_weights, clip=clip),
        )  # fmt: skip
        click.echo(run(options, limited(found, limit)).markdown)


if __name__ == "__main__":
    cli(prog_name="python -m train")
