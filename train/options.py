"""What several verbs of `python -m train` share: options, and what they mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from train.presets import PRESETS, KlVaeSpec, Preset

if TYPE_CHECKING:
    from accelerate import PartialState

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

cache_in_option = click.option(
    "--cache-in",
    type=click.Choice(["device", "host", "disk"]),
    default="device",
    show_default=True,
    help="Where the latents lie: the GPU's memory, the host's, or their files; the batches are the same.",
)


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


def process_state() -> PartialState:
    """Which of how many processes this is; without a GPU they meet on the CPU."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


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
