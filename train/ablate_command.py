"""`python -m train ablate`."""

from __future__ import annotations

from pathlib import Path

import click

from train.options import (
    FOLDER,
    OUT,
    autoencoder,
    cache_in_option,
    device_name,
    limited,
    minutes_option,
    plain_errors,
    pretrained_option,
    process_state,
    profile_option,
    training_objects,
    vae_option,
)
from train.presets import PRESETS, with_train


class NumberList(click.ParamType):
    """Numbers with commas between them."""

    name = "N,N,..."

    def __init__(self, kind: type[int] | type[float]) -> None:
        self.kind = kind

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self.kind(word) for word in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0,1", param, ctx)


@click.command()
@click.option(
    "--table", "tables", multiple=True, type=click.Choice(["4", "6", "7", "8"]),
    help="Of the paper: 4 leaves out regularisers, 6 turns the inputs around the objects of the same runs, "
    "7 sweeps lambda_MI, 8 lambda_Var; default: all four.",
)  # fmt: skip
@profile_option
@vae_option
@pretrained_option
@click.option(
    "--cache", "cache_folder", type=FOLDER, required=True, help="What `python -m train cache` wrote."
)
@cache_in_option
@click.option(
    "--objects", type=FOLDER, required=True,
    help="The folder that the cache was made of; the objects kept aside are measured.",
)  # fmt: skip
@click.option(
    "--count", default=40, show_default=True, type=click.IntRange(min=2), help="Objects to measure, at most."
)
@click.option(
    "--azimuths",
    default=16,
    show_default=True,
    type=click.IntRange(min=2),
    help="Inputs around each object of table 6, evenly spaced; views with views are compared where two lie a "
    "multiple of 60 degrees apart.",
)
@click.option(
    "--around",
    "around_count",
    default=12,
    show_default=True,
    type=click.IntRange(min=1),
    help="Objects of table 6, at most.",
)
@click.option("--out", type=OUT, required=True, help="Gets VARIANT/seed-N/, ablation.json, .md and .png.")
@click.option("--seeds", type=NumberList(int), default="0,1", show_default=True, help="Two or more.")
@click.option(
    "--var-weights", type=NumberList(float), default="0.005,0.01,0.05", show_default=True, help="Of table 8."
)
@click.option(
    "--mi-weights", type=NumberList(float), default="0.01,0.05,0.1", show_default=True, help="Of table 7."
)
@click.option("--steps", type=int, help="Of every run; default: the profile's.")
@minutes_option
@click.option("--batch", type=int, help="Objects a step and device; default: the profile's.")
@click.option("--lr", type=float, help="Peak learning rate; default: the profile's.")
@click.option("--start-from", type=FOLDER, help="Begin every run with a checkpoint's averaged weights.")
@click.option("--save-every", default=1000, show_default=True, help="Steps between checkpoints.")
@click.option("--compile", "compile_", type=click.Choice(["blocks", "unet"]), help="As of `model`.")
@click.option("--guidance", type=float, help="Of the measured samples; default: the profile's.")
@click.option("--sample-steps", type=click.IntRange(min=1), help="Likewise.")
def ablate(
    tables: tuple[str, ...], profile: str, vae_folder: Path | None, pretrained: Path | None,
    cache_folder: Path, cache_in: str, objects: Path, count: int, azimuths: int, around_count: int,
    out: Path, seeds: tuple[int, ...], var_weights: tuple[float, ...], mi_weights: tuple[float, ...],
    steps: int | None, minutes: float | None,
    batch: int | None, lr: float | None, start_from: Path | None, save_every: int, compile_: str | None,
    guidance: float | None, sample_steps: int | None,
) -> None:  # fmt: skip
    """Train with and without the two regularisers and measure the difference, over several seeds.

    Finished runs in OUT are kept, so a stopped ablation goes on with the same command; so does one
    with more seeds or tables.  Under `accelerate launch` all processes train one run after another.
    """
    if steps is not None and minutes is not None:
        raise click.UsageError("--steps and --minutes are two budgets; give one")

    from dataclasses import replace
    from functools import partial

    from train.ablate import AblationOptions
    from train.ablate import ablate as run
    from train.ablation_around import seen_around
    from train.ablation_report import AROUND_TABLE, TABLES
    from train.cache import load_cache
    from train.checkpoint import CheckpointError
    from train.watch import watched

    state = process_state()
    with plain_errors():
        preset = with_train(PRESETS[profile], steps=steps, batch=batch, lr=lr)
        chosen = {"guidance": guidance, "steps": sample_steps}
        options = AblationOptions(
            out=out, tables=tuple(map(int, tables)) or tuple(TABLES), seeds=seeds, var_weights=var_weights,
            mi_weights=mi_weights, minutes=minutes, save_every=save_every, compile=compile_,
            start_from=start_from,
            sampling=replace(preset.sampling, **{k: v for k, v in chosen.items() if v is not None}),
        )  # fmt: skip
        aside = limited(training_objects(objects)[1], count)
        if len(aside) < 2:
            raise click.UsageError(
                f"{len(aside)} object of {objects} is kept aside (about 1 in 50 is) and two or more are "
                "measured; give more objects"
            )
        net = autoencoder(preset, vae_folder, pretrained).to(state.device)
        data = load_cache(cache_folder, net, state.device, cache_in)
        watch = watched(aside, device_name(state), preset.vae.image_px)
        around = []
        if AROUND_TABLE in options.tables:
            turned = limited(aside, around_count)
            around = seen_around(turned, azimuths, device_name(state), preset.vae.image_px)
    unet = None
    if pretrained is not None:
        from train.pretrained import load_sdxl_unet

        unet = partial(load_sdxl_unet, pretrained, preset.unet)

    with plain_errors(CheckpointError, FloatingPointError, OSError):
        run(preset, data, net, watch, options, unet, state.print, around)
    state.print(f"{out / 'ablation.md'} and {out / 'ablation.png'} show what came out")
