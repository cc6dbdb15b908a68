"""`python -m export VERB`: from a trained checkpoint to a bundle, and from a bundle to engines.

python -m export onnx --checkpoint runs/edge/checkpoint --out engines/edge
python -m export build-engines --bundle engines/edge
python -m export inspect --bundle engines/edge
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from export.engine_plan import Job, Plan
    from export.engines import Built

INTERRUPTED = 130  # 128 + SIGINT, as shells count


def _runtimes_bundle() -> Path:
    from uc3d_rt.pipeline import default_bundle

    return default_bundle()


bundle_option = click.option(
    "--bundle", type=click.Path(path_type=Path), default=_runtimes_bundle,
    help="Folder with manifest.json.  [default: the one that uc3d-rt runs]",
)  # fmt: skip


@contextmanager
def plain_errors() -> Iterator[None]:
    """A user's errors as one line and their own exit code, as `uc3d-rt` has them."""
    from uc3d_rt.errors import Uc3dError

    try:
        yield
    except Uc3dError as error:
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(error.exit_code)


@click.group(help=__doc__.split("\n")[0])
def cli() -> None:
    """All verbs."""


@cli.command()
@click.option(
    "--checkpoint", type=click.Path(file_okay=False, path_type=Path), required=True,
    help="OUT/checkpoint of `python -m train model`.",
)  # fmt: skip
@click.option(
    "--profile", help="Refuse a checkpoint of another profile (edge, sdxl); default: take whichever it is of."
)
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
@click.option(
    "--mirror/--no-mirror", default=None, help="Default of averaging with the mirror image, to record."
)
@click.option("--data", default="", help="Training data and licences, recorded in the manifest.")
def onnx(
    checkpoint: Path, profile: str | None, out: Path, weights: str, steps: int | None, guidance: float | None,
    guidance_interval: tuple[float, float] | None, guidance_rescale: float | None, noise_scale: float | None,
    first_step_to: float | None, mirror: bool | None, data: str,
) -> None:  # fmt: skip
    """Write the five networks as ONNX with a manifest, after checking them against torch."""
    from dataclasses import replace

    from export.onnx_bundle import ParityError, export_bundle
    from train.checkpoint import preset_of

    chosen = {
        "steps": steps, "guidance": guidance, "guidance_interval": guidance_interval,
        "guidance_rescale": guidance_rescale, "noise_scale": noise_scale, "first_step_to": first_step_to,
        "mirror": mirror,
    }  # fmt: skip
    try:
        preset = preset_of(checkpoint)
        if profile not in (None, preset.name):
            raise ValueError(
                f"{checkpoint} is of profile {preset.name!r}, not {profile!r}; "
                "leave --profile out, or give another --checkpoint"
            )
        sampling = replace(preset.sampling, **{k: v for k, v in chosen.items() if v is not None})
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
        click.echo(f"{name:17s} {file.total_bytes / 2**20:6.2f} MiB   {errors}")
    total = sum(file.total_bytes for file in manifest.networks.values())
    click.echo(f"{'bundle':17s} {total / 2**20:6.2f} MiB   {out}")


@cli.command()
@bundle_option
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of the checkpoint; must not exist."
)
def checkpoint(bundle: Path, out: Path) -> None:
    """Turn a bundle back into a checkpoint, for `python -m train model --start-from`."""
    from export.bundle_checkpoint import checkpoint_from_bundle

    with plain_errors():
        try:
            manifest = checkpoint_from_bundle(bundle, out)
        except (ValueError, OSError) as error:
            raise click.ClickException(str(error)) from error
    click.echo(f"{out}: the weights of a {manifest.profile} bundle, to begin a training with")


@cli.command("build-engines")
@bundle_option
@click.option(
    "--backend", type=click.Choice(["auto", "onnxruntime", "tensorrt", "tensorrt-rtx"]), default="auto",
    show_default=True,
    help="auto: TensorRT if it is installed and a GPU is here, else TensorRT-RTX, which needs none.",
)  # fmt: skip
@click.option(
    "--target", "targets", default="",
    help="Compute capabilities, as sm_80,sm_89; default: all that the library knows.",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(["fp16", "int8", "fp8"]), default="fp16", show_default=True,
    help="Of arithmetic; norms, softmax and sine embeddings stay fp32.  int8 and fp8, of most of the UNet's "
    "products, are for TensorRT and TensorRT-RTX and need `quantize --for gpu`; fp8 also sm_89 or later.",
)  # fmt: skip
@click.option(
    "--weights", type=click.Choice(["fp16", "int8"]), default="fp16", show_default=True,
    help="As engines hold them; int8 as the bundle stores them: three fifths of the bytes.",
)  # fmt: skip
@click.option(
    "--timing-cache", type=click.Path(dir_okay=False, path_type=Path),
    help="TensorRT's file of measured kernels, read and written; TensorRT-RTX has none.",
)  # fmt: skip
@click.option(
    "--jobs", default=2, show_default=True, type=click.IntRange(min=1), help="Networks built at once."
)
@click.option(
    "--check/--no-check", default=True, show_default=True,
    help="Hold each engine's graph against the bundle's network on the CPU, which holds all of its weights "
    "in fp32 for that: 12 GB for sdxl's UNet, once a job.  Engines that were not are marked so.",
)  # fmt: skip
@click.option(
    "--deterministic", is_flag=True,
    help="For ONNX Runtime: give the same bits each time, without its group norm kernel; slower, "
    "and run by `uc3d-rt --deterministic`.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what would be built, and build nothing.")
def build_engines(
    bundle: Path, backend: str, targets: str, precision: str, weights: str, timing_cache: Path | None,
    jobs: int, check: bool, deterministic: bool, dry_run: bool,
) -> None:  # fmt: skip
    """Build the fastest thing each GPU can run from a bundle's five networks.

    Engines land in BUNDLE/built/, each network's as soon as it is whole.  What is there already and
    still right is left alone, so a build that was stopped goes on where it was, and one whose bundle
    changed rebuilds what changed.  Every fp16 graph is held against the bundle's network first, unless
    --no-check.
    """
    with plain_errors():
        from export.engine_plan import BuildOptions, plan_build
        from export.engines import build

        names = tuple(name.strip() for name in targets.split(",") if name.strip())
        options = BuildOptions(
            bundle, backend, names, weights, timing_cache, jobs, check, deterministic, precision
        )
        plan = plan_build(options)
        made_for = ", ".join(plan.engines.targets) or "every GPU that it knows"
        click.echo(f"{plan.options.backend} {plan.engines.version} ({plan.reason}), for {made_for}")
        click.echo(f"-> {plan.folder}")
        if dry_run:
            for job in plan.jobs:
                click.echo(f"{job.name:17s} {'up to date' if job.done else 'would be built'}")
            return
        try:
            with _BuildBar(plan) as bar:
                engines = build(plan, bar.tell)
        except KeyboardInterrupt:
            click.echo("interrupted; finished engines are kept, run again to go on", err=True)
            sys.exit(INTERRUPTED)
        weights = {engine.weights for engine in engines.engines.values() if engine.weights is not None}
        total = sum(file.bytes for file in (*engines.engines.values(), *weights))
        click.echo(f"{'all':17s} {total / 2**20:7.2f} MiB")
        unchecked = [name for name, engine in engines.engines.items() if engine.relative_error is None]
        if unchecked:
            click.echo(
                f"warning: {', '.join(unchecked)}: never held against the bundle's network; "
                "run again without --no-check to do so",
                err=True,
            )


class _BuildBar:
    """A line for every engine, and a bar of how many are done while they are built."""

    def __init__(self, plan: Plan) -> None:
        self._jobs = plan.jobs
        self._running: list[str] = []
        left = [job for job in plan.jobs if not job.done]
        self._bar = click.progressbar(
            length=sum(job.source_bytes for job in left), label="building", file=sys.stderr,
            item_show_func=lambda _: ", ".join(self._running),
        )  # fmt: skip
        self._shown = bool(left) and sys.stderr.isatty()

    def __enter__(self) -> _BuildBar:
        for job in self._jobs:
            if job.done:
                click.echo(f"{job.name:17s} {job.target.stat().st_size / 2**20:7.2f} MiB   up to date")
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._bar.render_finish()

    def tell(self, event: str, job: Job, built: Built | None) -> None:
        if built is None:
            self._running.append(job.name)
        else:
            self._running.remove(job.name)
            if self._shown:
                click.echo("\r\033[K", nl=False, err=True)  # the line goes where the bar was
            error = "not checked" if built.relative_error is None else f"{built.relative_error:.1e}"
            click.echo(
                f"{job.name:17s} {built.total_bytes / 2**20:7.2f} MiB   prepared in {built.prepare_s:.1f} s, "
                f"built in {built.build_s:.1f} s, relative error {error}"
            )
        if self._shown:
            self._bar.update(job.source_bytes if built is not None else 0)
            self._bar.render_progress()


@cli.command()
@bundle_option
@click.option(
    "--checkpoint", type=click.Path(file_okay=False, path_type=Path),
    help="What the bundle was exported from; without it torch is left out.",
)  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), help="Of the sample; default: the bundle's.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of inputs and noise.")
def verify(bundle: Path, checkpoint: Path | None, steps: int | None, seed: int) -> None:
    """Hold torch, the fp16 graphs and engines against the bundle's networks.

    Tensor by tensor on random inputs, then over a whole sample, each against a limit that stands in
    export/verification.py.  Exits with 1 if any comparison fails; engines that cannot run on this
    machine are named with the reason.
    """
    with plain_errors():
        from export.verification import table
        from export.verification import verify as comparisons

        passed = True
        for check in comparisons(bundle, checkpoint=checkpoint, steps=steps, seed=seed):
            passed &= table([check], click.echo)
        if not passed:
            click.echo("error: not everything computes the same; see the lines that say FAILED", err=True)
            sys.exit(1)


@cli.command()
@bundle_option
@click.option(
    "--for", "machine", type=click.Choice(["cpu", "gpu"]), default="cpu", show_default=True,
    help="cpu: an int8 graph for this machine; gpu: what int8 and fp8 engines need, made without one.",
)  # fmt: skip
@click.argument("pictures", nargs=-1, required=True, type=click.Path(path_type=Path))
def quantize(bundle: Path, machine: str, pictures: tuple[Path, ...]) -> None:
    """Quantise the UNet, scales found on PICTURES.

    For a CPU, its int8 graph lands in BUNDLE/built/, and the runtime takes it from then on; nothing is
    kept if it is not faster here, or changes the views of a picture too much.

    For GPUs, the ranges of what enters its products land in BUNDLE/activation_ranges.json, beside what
    fp16, int8 and fp8 make of the pictures' views; `build-engines --precision int8` or `fp8` reads it.
    """
    with plain_errors():
        if machine == "gpu":
            _quantize_for_gpus(bundle, pictures)
            return
        from export.quantization import quantize as quantized

        done = quantized(bundle, pictures, say=click.echo)
        click.echo(f"-> {done.folder}, {done.bytes / 2**20:.2f} MiB")
        click.echo(
            f"a call takes {done.int8_ms:.0f} ms, fp32 {done.fp32_ms:.0f} ms; relative error "
            f"{done.relative_error:.1e} (median)"
        )
        views = ", ".join(f"{decibels:.1f}" for decibels in done.sample_db)
        click.echo(f"colour views against fp32: {views} dB")


def _quantize_for_gpus(bundle: Path, pictures: tuple[Path, ...]) -> None:
    from export.gpu_quantization import quantize_for_gpus
    from export.quantized_graph import LEAST_SAMPLE_DB, RANGES_NAME

    ranges = quantize_for_gpus(bundle, pictures, say=click.echo)
    click.echo(f"-> {bundle / RANGES_NAME}, {len(ranges.largest)} products")
    click.echo("      relative error of a call (median), colour views against fp32")
    for precision, accuracy in ranges.accuracy.items():
        views = ", ".join(f"{decibels:.1f}" for decibels in accuracy.sample_db)
        refused = precision != "fp16" and min(accuracy.sample_db) < LEAST_SAMPLE_DB
        click.echo(
            f"{precision:5s} {accuracy.relative_error:.1e}   {views} dB"
            f"{f'   too little (limit {LEAST_SAMPLE_DB:g} dB): build-engines refuses it' if refused else ''}"
        )


@cli.command("build-kernels")
@click.option("--target", "targets", help="GPUs as sm_90,sm_120; default: all from sm_75 on, and PTX.")
def build_kernels(targets: str | None) -> None:
    """Compile the CUDA kernels of the fit into the fatbin that the runtime loads; needs nvcc.

    The fatbin is part of the source tree: only who changes a kernel has to build it again.
    """
    with plain_errors():
        from export.kernels import FATBIN, TARGETS
        from export.kernels import build_kernels as built

        names = TARGETS if targets is None else tuple(n.strip() for n in targets.split(",") if n.strip())
        kernels = built(names)
        size = FATBIN.stat().st_size / 2**20
        click.echo(
            f"{FATBIN}: {size:.2f} MiB by nvcc {kernels.nvcc}, for {', '.join(kernels.targets)} and PTX"
        )


@cli.command()
@bundle_option
def inspect(bundle: Path) -> None:
    """Show what a bundle holds, what its engines were built for, and whether they fit this machine."""
    with plain_errors():
        from export.inspection import describe

        for line in describe(bundle):
            click.echo(line)


if __name__ == "__main__":
    cli(prog_name="python -m export")
