"""`python -m export VERB`: from a trained checkpoint to a bundle the runtime reads.

python -m export onnx --checkpoint runs/edge/checkpoint --out engines/edge
"""

from __future__ import annotations

from pathlib import Path

import click


@click.group(help=__doc__.split("\n")[0])
def cli() -> None:
    """All verbs."""


@cli.command()
@click.option(
    "--checkpoint", type=click.Path(file_okay=False, path_type=Path), required=True,
    help="OUT/checkpoint of `python -m train model`.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of the bundle; replaced when whole."
)
@click.option(
    "--weights", type=click.Choice(["int8", "fp32"]), default="int8", show_default=True,
    help="How weights are stored; the arithmetic is fp32 either way.",
)  # fmt: skip
@click.option("--steps", type=int, help="Default sampling steps to record.")
@click.option("--guidance", type=float, help="Default guidance scale to record.")
@click.option("--guidance-interval", type=(float, float), help="Where guidance acts, as shares of T.")
@click.option("--guidance-rescale", type=float, help="Default guidance rescaling to record, 0 to 1.")
@click.option("--noise-scale", type=click.FloatRange(0, 1), help="Default start noise to record.")
@click.option(
    "--first-step-to", type=click.FloatRange(0, 1, min_open=True),
    help="Share of T that the first step reaches, to record.",
)  # fmt: skip
@click.option("--data", default="", help="Training data and licences, recorded in the manifest.")
def onnx(
    checkpoint: Path, out: Path, weights: str, steps: int | None, guidance: float | None,
    guidance_interval: tuple[float, float] | None, guidance_rescale: float | None, noise_scale: float | None,
    first_step_to: float | None, data: str,
) -> None:  # fmt: skip
    """Write the five networks as ONNX with a manifest, after checking them against torch."""
    from dataclasses import replace

    from export.onnx_bundle import ParityError, export_bundle
    from train.checkpoint import preset_of

    chosen = {
        "steps": steps, "guidance": guidance, "guidance_interval": guidance_interval,
        "guidance_rescale": guidance_rescale, "noise_scale": noise_scale, "first_step_to": first_step_to,
    }  # fmt: skip
    try:
        sampling = replace(
            preset_of(checkpoint).sampling, **{k: v for k, v in chosen.items() if v is not None}
        )
        manifest = export_bundle(
            checkpoint,
            out,
            int8_weights=weights == "int8",
            sampling=sampling,
            training={"data": data} if data else None,
        )
    except (ParityError, ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    for name, file in manifest.networks.items():
        errors = ", ".join(
            f"{key.replace('_', ' ')} {value:.1e}" for key, value in manifest.parity[name].items()
        )
        click.echo(f"{name:17s} {file.bytes / 2**20:6.2f} MiB   {errors}")
    click.echo(
        f"{'bundle':17s} {sum(file.bytes for file in manifest.networks.values()) / 2**20:6.2f} MiB   {out}"
    )


if __name__ == "__main__":
    cli(prog_name="python -m export")
