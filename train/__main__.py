"""`python -m train VERB`: from a folder of objects to a trained checkpoint, and its evaluation.

\b
    python -m train toy   --out runs/toy          (all of it, small, in minutes)
\b
    python -m train vae   --objects DIR --out runs/vae
    python -m train cache --objects DIR --vae runs/vae --out runs/cache
    python -m train model --vae runs/vae --cache runs/cache --objects DIR --out runs/edge
    python -m train ablate --vae runs/vae --cache runs/cache --objects DIR --out runs/ablation
    python -m train merge runs/edge/earlier runs/edge/checkpoint --out runs/merged   (optional)
    python -m export onnx --checkpoint runs/edge/checkpoint --out engines/edge
    python -m train evaluate --bundle engines/edge --objects DIR --out runs/evaluation

On several GPUs: `accelerate launch --num_processes N --module train vae …`; `cache` is started once
a shard (`--shard I --shards N`), in parallel.
"""

from __future__ import annotations

from pathlib import Path

import click

from train.ablate_command import ablate
from train.model_command import model
from train.options import (
    FOLDER,
    OUT,
    WEIGHTS,
    autoencoder,
    chosen_device,
    device_name,
    device_option,
    limit_option,
    limited,
    minutes_option,
    objects_option,
    plain_errors,
    pretrained_option,
    process_state,
    profile_option,
    seed_option,
    training_objects,
    vae_option,
    workers_option,
)
from train.presets import PRESETS, KlVaeSpec


@click.group(help=__doc__)
def cli() -> None:
    """All verbs."""


cli.add_command(model)
cli.add_command(ablate)


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

    from train.dataset import render_folder
    from train.vae_trainer import train_vae

    state = process_state()
    pictures = []
    with plain_errors():
        files = limited(training_objects(objects)[0], limit)
        share = files[state.process_index :: state.num_processes]
        stream = render_folder(
            share, device_name(state), 1, 2, seed + 1, workers, image_px=preset.vae.image_px
        )
        for _, _, item in stream:
            pictures += [item.color, item.normal, item.inputs]
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
@click.argument("checkpoints", type=FOLDER, nargs=-1, required=True)
@click.option("--out", type=OUT, required=True, help="Folder of the new checkpoint.")
def merge(checkpoints: tuple[Path, ...], out: Path) -> None:
    """Average the weights of two or more CHECKPOINTS of one run, or of runs that go on from one another."""
    from train.checkpoint import CheckpointError
    from train.merge import merge_checkpoints

    with plain_errors(ValueError, CheckpointError, OSError):
        steps = merge_checkpoints(checkpoints, out)
    click.echo(f"{out}  the mean of steps {', '.join(map(str, steps))}")


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
    help="What is measured: as the paper's tables; see docs/evaluation.md.",
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
    if protocol in ("viewpoint", "text") and (train_objects is not None or index is not None):
        raise click.UsageError(
            f"--protocol {protocol} looks up no training object; leave out --train-objects and --index"
        )
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
    with plain_errors(Uc3dError, OSError):
        options = EvaluateOptions(
            bundle=bundle, objects=folder, out=out, train_objects=train_objects, index=index,
            meshes=not no_mesh, steps=steps, guidance=guidance, seed=seed, workers=workers,
            protocol=protocol, azimuths=azimuths or AZIMUTHS, device=device,
            weights=Weights(lpips=lpips_weights, fid=fid_weights, clip=clip),
        )  # fmt: skip
        click.echo(run(options, limited(found, limit)).markdown)


if __name__ == "__main__":
    cli(prog_name="python -m train")
