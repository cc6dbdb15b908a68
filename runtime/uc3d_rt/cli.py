"""`uc3d-rt`: parse, call, report."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from uc3d_rt.errors import BackendError, OutputError, Uc3dError, UsageError
from uc3d_rt.ladder import LADDER, OFF, PLAIN
from uc3d_rt.mesh.writers import FORMATS

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar

    from uc3d_rt.pipeline import Result, Views

_INTERRUPTED = 130  # 128 + SIGINT, as shells count

_NEEDED_LATER = (
    "trimesh", "scipy.sparse.csgraph", "fast_simplification", "xatlas", "uc3d_rt.mesh.build",
    "uc3d_rt.mesh.device_bake", "uc3d_rt.mesh.device_refine", "uc3d_rt.neus.device_fit",
)  # fmt: skip
"""Modules that fit and mesh import, seconds in all."""


class _Command(click.Command):
    """Takes `--low-memory` with a value and without, also right before the picture."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, when every option has its value."""
        return super().parse_args(ctx, with_rungs(args))


@click.command(cls=_Command, name="uc3d-rt", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("image", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Mesh file: .glb, .obj, .ply or .stl.",
)
@click.option("--seed", default=0, show_default=True, help="Same seed, same machine: same mesh.")
@click.option("--steps", type=int, help="Sampling steps; the bundle's default if left out.")
@click.option("--guidance", type=float, help="Guidance scale, 1 = off; the bundle's default if left out.")
@click.option(
    "--noise-scale",
    type=float,
    help="0 to 1: less is smoother and varies less with the seed; the bundle's default if left out.",
)
@click.option(
    "--first-step-to",
    type=float,
    help="Above 0, to 1: how far down the first step goes; less keeps more of the likeliest shape, 1 none; "
    "the bundle's default if left out.",
)
@click.option(
    "--mirror/--no-mirror", default=None,
    help="Average the first step with that of the picture's mirror image, for one more call of the network; "
    "the bundle's default if left out.",
)  # fmt: skip
@click.option(
    "--focal-mm", type=float, help="35 mm-equivalent focal length, 0 = orthographic; else from EXIF."
)
@click.option(
    "--views",
    "views_dir",
    type=click.Path(path_type=Path),
    help="Folder for the six colour and six normal views (PNG).",
)
@click.option("--texture", type=click.Choice(["atlas", "vertex"]), default="atlas", show_default=True)
@click.option("--resolution", type=int, help="Nodes along each axis of the fitted grid.")
@click.option("--format", "file_format", type=click.Choice(FORMATS), help="Else taken from the file name.")
@click.option("--bundle", type=click.Path(path_type=Path), help="Model bundle; else the one that ships.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N, or auto.")
@click.option(
    "--backend", default="auto", show_default=True,
    help="onnxruntime, tensorrt, tensorrt-rtx: what was built for it; bundle: its own files, fp32; "
    "auto: the first of these that fits.",
)  # fmt: skip
@click.option("--fit-device", help="Where the fit runs: cpu, cuda or cuda:N; as --device if left out.")
@click.option(
    "--mesh-device",
    help="Where the surface is extracted and textured: cpu, or the fit's device; that if left out.",
)  # fmt: skip
@click.option(
    "--low-memory", type=click.Choice([rung.name for rung in LADDER]), default=OFF.name, show_default=True,
    help=f"Less GPU memory for more time, each of these on top of the one before; alone it is {PLAIN.name}. "
    + " ".join(f"{rung.name}: {rung.what}." for rung in LADDER[1:]),
)  # fmt: skip
@click.option(
    "--deterministic", is_flag=True,
    help="The same file each time on a GPU too; needs engines built with --deterministic.",
)  # fmt: skip
@click.option(
    "--precision", default="auto", show_default=True,
    help="fp16, int8 or fp8: run engines of that precision and no others; auto: fp16 before others.",
)  # fmt: skip
@click.option("--threads", type=int, help="CPU threads; all if left out.")
@click.option("--quiet", is_flag=True, help="No progress and no timings; warnings and errors still show.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="uc3d-rt", message="%(prog)s %(version)s")
def command(
    image: Path,
    output: Path,
    seed: int,
    steps: int | None,
    guidance: float | None,
    noise_scale: float | None,
    first_step_to: float | None,
    mirror: bool | None,
    focal_mm: float | None,
    views_dir: Path | None,
    texture: Literal["atlas", "vertex"],
    resolution: int | None,
    file_format: str | None,
    bundle: Path | None,
    device: str,
    backend: str,
    fit_device: str | None,
    mesh_device: str | None,
    low_memory: str,
    deterministic: bool,
    precision: str,
    threads: int | None,
    quiet: bool,
    debug: bool,
) -> None:
    """Make a textured mesh of the object in IMAGE.  `uc3d-rt doctor` checks the installation instead."""
    # What the user may have got wrong is found before anything heavy is imported or run.
    mesh_format = check_output(output, file_format)
    if views_dir is not None:
        check_folder(views_dir if views_dir.exists() else views_dir.parent, f"--views {views_dir}")

    from uc3d_rt.mesh.build import MeshOptions
    from uc3d_rt.mesh.writers import export_mesh
    from uc3d_rt.neus.fit_plan import FitOptions
    from uc3d_rt.pipeline import Pipeline

    try:
        fit_options = FitOptions(seed=seed) if resolution is None else FitOptions(resolution, seed=seed)
        mesh_options = MeshOptions(texture=texture)
    except ValueError as error:
        raise UsageError(str(error)) from error
    pipeline = Pipeline.from_bundle(
        bundle, device, threads, backend,
        fit_device=fit_device, low_memory=low_memory, deterministic=deterministic, precision=precision,
        mesh_device=mesh_device,
    )  # fmt: skip
    if not quiet and pipeline.choice is not None and (pipeline.choice.notable or device != "cpu"):
        click.echo(f"runs on {pipeline.choice}", err=True)
    if threads is not None:
        import numba

        numba.set_num_threads(min(threads, numba.get_num_threads()))
    with StageBars(shown=not quiet and sys.stderr.isatty()) as bars:

        def begin(stage: str, done: int, total: int) -> None:
            if (stage, done) == ("encode", 0) and pipeline.mesh_device != "cpu":
                threading.Thread(target=_import_ahead).start()  # the CPU has little to do meanwhile
            bars.update(stage, done, total)

        views = pipeline.views(
            image, steps=steps, guidance=guidance, noise_scale=noise_scale, first_step_to=first_step_to,
            mirror=mirror, seed=seed, focal_mm=focal_mm, on_progress=begin,
        )  # fmt: skip
        for note in views.notes:
            bars.say(f"warning: {note}")
        # Written before the fit: they are kept if it fails.
        if views_dir is not None:
            save_views(views, views_dir)
        result = pipeline.reconstruct(
            views, seed=seed, fit_options=fit_options, mesh_options=mesh_options, on_progress=bars.update
        )
        export_mesh(result.mesh, output, mesh_format)
    if not quiet:
        for line in closing_lines(result):
            click.echo(line, err=True)
        click.echo(f"wrote {output}: {len(result.mesh.faces):,} triangles", err=True)


@click.command(name="doctor", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--bundle", type=click.Path(path_type=Path), help="Model bundle; else the one that ships.")
def doctor(bundle: Path | None) -> int:
    """Say what is installed, what this machine has, and what is wrong, with its mend."""
    from uc3d_rt.doctor import diagnose
    from uc3d_rt.pipeline import default_bundle

    lines, wrong = diagnose(bundle or default_bundle())
    for line in lines:
        click.echo(line)
    for line in wrong:
        click.echo(f"wrong: {line}")
    return BackendError.exit_code if wrong else 0


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every failure is one line on stderr and its own exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["doctor"]:
            code = doctor.main(arguments[1:], prog_name="uc3d-rt doctor", standalone_mode=False)
        else:
            code = command.main(arguments, prog_name="uc3d-rt", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(_INTERRUPTED)
    except Exception as error:  # the last line of defence: no user sees a traceback unasked
        if "--debug" in arguments:
            traceback.print_exc()
        code, text = _explained(error)
        click.echo(f"error: {' '.join(text.split())}", err=True)
    sys.exit(code if isinstance(code, int) else 0)


def _import_ahead() -> None:
    """Import what is needed later; what fails to import fails again, with its reason, where it is needed."""
    for name in _NEEDED_LATER:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def with_rungs(arguments: list[str]) -> list[str]:
    """Arguments with the name of a rung after every `--low-memory` that has none."""
    names = {rung.name for rung in LADDER}
    following = [*arguments, ""][1:]
    return [
        f"{given}={PLAIN.name}" if given == "--low-memory" and after not in names else given
        for given, after in zip(arguments, following, strict=True)
    ]


def closing_lines(result: Result) -> list[str]:
    """Seconds of the stages, and the most GPU memory that was in use, if it is known."""
    times = " · ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.timings.items())
    lines = [f"{times} · total {sum(result.timings.values()):.1f} s"]
    if result.gpu_peak_mib is not None:
        stage = next(name for name, mib in result.gpu_mib.items() if mib == result.gpu_peak_mib)
        lines.append(f"GPU memory in use at most: {result.gpu_peak_mib:,} MiB, in {stage}")
    return lines


def check_output(output: Path, file_format: str | None) -> str:
    """The mesh format, after checking that the file can be written.

    Raises:
        OutputError: the folder is missing or not writable, or the format unknown.
        UsageError: the file name and `file_format` contradict each other.
    """
    suffix = output.suffix.lower().lstrip(".")
    if file_format is None and suffix not in FORMATS:
        raise OutputError(f"{output}: the name must end in one of {', '.join(FORMATS)}, or give --format")
    if file_format is not None and suffix in FORMATS and suffix != file_format:
        raise UsageError(f"--format {file_format} contradicts the name {output}; drop one")
    if output.is_dir():
        raise OutputError(f"{output} is a folder; give a file name in it")
    check_folder(output.parent, str(output))
    return file_format or suffix


def check_folder(folder: Path, wanted: str) -> None:
    """Make sure that files can be created in a folder, by creating one.

    Raises:
        OutputError: it is missing, is no folder, or refuses.
    """
    if not folder.is_dir():
        state = "is not a folder" if folder.exists() else "does not exist"
        raise OutputError(f"cannot write {wanted}: {folder} {state}; create it first or choose another")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write {wanted}: {folder} refuses new files ({error.strerror}); "
            "change its permissions or choose another"
        ) from error


def save_views(views: Views, folder: Path) -> None:
    """Write `color_0.png` … `normal_5.png`, each whole or not at all.

    Raises:
        OutputError: the folder refuses.
    """
    import numpy as np
    from PIL import Image

    from uc3d_rt.views import encode_normals

    try:
        folder.mkdir(exist_ok=True)
        for kind, images in (("color", views.color), ("normal", encode_normals(views.normal))):
            for index, image in enumerate(images):
                target = folder / f"{kind}_{index}.png"
                temporary = folder / f".{target.name}.{os.getpid()}.tmp"
                try:
                    Image.fromarray(np.round(image * 255.0).astype(np.uint8)).save(temporary, format="PNG")
                    os.replace(temporary, target)
                finally:
                    temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write views to {folder} ({error.strerror or error})") from error


class StageBars:
    """One progress bar a stage, on stderr."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._stage = ""
        self._bar: ProgressBar[int] | None = None

    def __enter__(self) -> StageBars:
        """Begin without a bar."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the cursor on a fresh line."""
        self._close()

    def update(self, stage: str, done: int, total: int) -> None:
        """Take the pipeline's progress; a stage may learn its total on the way."""
        if not self._shown:
            return
        if self._bar is None or stage != self._stage:
            self._close()
            self._stage = stage
            bar: ProgressBar[Any] = click.progressbar(length=total, label=f"{stage:<10}", file=sys.stderr)
            self._bar = bar
            bar.render_progress()
        self._bar.length = total
        self._bar.update(done - self._bar.pos)

    def say(self, text: str) -> None:
        """Print a line between bars."""
        self._close()
        click.echo(text, err=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.render_finish()
            self._bar = None


def _explained(error: Exception) -> tuple[int, str]:
    """Exit code and message of an error."""
    if isinstance(error, Uc3dError):
        return error.exit_code, str(error)
    if isinstance(error, click.ClickException):
        return error.exit_code, error.format_message()
    if isinstance(error, MemoryError):
        return 1, "memory ran out; close other programs or use a smaller --resolution"
    return 1, f"unexpected {type(error).__name__}: {error}; run again with --debug and report it"


if __name__ == "__main__":
    main()
