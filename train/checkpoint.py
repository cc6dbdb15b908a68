"""Checkpoints as folders of safetensors and JSON; nothing is pickled.

`model.safetensors` and `ema.safetensors` hold the trained networks, `vae.safetensors` the
autoencoder, `optimizer.safetensors` the moments, `state.json` the rest.  A checkpoint is written
beside the old one and moved into place, so a kill at any moment leaves a whole one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from train.presets import PRESETS, KlVaeSpec, Preset
from train.sharding import whole
from train.vae import Vae

if TYPE_CHECKING:
    from train.pretrained import KlVae

STATE = "state.json"


class CheckpointError(ValueError):
    """A checkpoint, autoencoder or cache that cannot be used; the message says the mend."""


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Contiguous copies-by-reference of a module's state, ready for safetensors."""
    return {name: whole(value.detach()).contiguous() for name, value in model.state_dict().items()}


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimisers' states as flat tensors, in the order of their parameters.

    `index.key` for the first, `number:index.key` for those after it.
    """
    return {
        f"{f'{number}:' if number else ''}{index}.{key}": whole(torch.as_tensor(value).detach()).contiguous()
        for number, optimizer in enumerate(optimizers)
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }


def restore_optimizers(optimizers: Sequence[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`, for optimisers over the same parameters."""
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for name, value in tensors.items():
        place, key = name.split(".", 1)
        number, _, index = place.rpartition(":")
        states[int(number or 0)].setdefault(int(index), {})[key] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def save_checkpoint(
    folder: Path,
    *,
    preset: Preset,
    model: nn.Module,
    ema: dict[str, Tensor],
    vae: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    state: dict[str, Any],
    write: bool = True,
) -> None:
    """Write a whole checkpoint, replacing the one at `folder` only when it is complete.

    Args:
        write: False on all processes but one of a sharded model: gathering it takes all of them.
    """
    weights, moments = named_parameters(model), optimizer_tensors(optimizers)
    if not write:
        return
    finish_interrupted_save(folder)
    fresh, old = _beside(folder)
    for stale in (fresh, old):
        if stale.exists():
            shutil.rmtree(stale)
    fresh.mkdir(parents=True)
    save_file(weights, fresh / "model.safetensors")
    save_file({k: v.contiguous() for k, v in ema.items()}, fresh / "ema.safetensors")
    save_vae(vae, fresh)
    if optimizers:
        save_file(moments, fresh / "optimizer.safetensors")
    # Last: a folder that holds it is whole.
    record = {"preset": preset.name, "config": asdict(preset), **state}
    temporary = fresh / f".{STATE}.tmp"
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    temporary.replace(fresh / STATE)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    if old.exists():
        shutil.rmtree(old)


def finish_interrupted_save(folder: Path) -> None:
    """Put a checkpoint back into place if a kill fell between the two renames of a save."""
    if folder.exists():
        return
    for candidate in _beside(folder):  # the newer one was whole before the older one moved aside
        if (candidate / STATE).is_file():
            candidate.rename(folder)
            return


def _beside(folder: Path) -> tuple[Path, Path]:
    """Where a save keeps the new and the old checkpoint until it is done."""
    return folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")


def load_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint, after finishing a save that a kill interrupted.

    Raises:
        FileNotFoundError: there is no checkpoint; the message says how to make one.
        CheckpointError: the file is damaged.
    """
    finish_interrupted_save(folder)
    path = folder / STATE
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {folder}; train one with: python -m train model --out {folder.parent}"
        )
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); train again, or restore a copy") from error
    return state


def preset_of(folder: Path) -> Preset:
    """The preset a checkpoint was trained with.

    Raises:
        FileNotFoundError: there is no checkpoint.
        CheckpointError: the preset is unknown, or its sizes have changed since.
    """
    state = load_state(folder)
    preset = PRESETS.get(state["preset"])
    if preset is None:
        raise CheckpointError(
            f"{folder} was trained as {state['preset']!r}; known presets: {', '.join(PRESETS)}"
        )
    architecture = ("unet", "encoder", "vae", "heads", "schedule")
    changed = differences({part: state["config"][part] for part in architecture}, asdict(preset))
    if changed:
        raise CheckpointError(
            f"{folder} was trained with other sizes of preset {preset.name!r} "
            f"({'; '.join(changed)}); train again, or check out the code it was trained with"
        )
    return preset


def differences(saved: Any, now: Any, path: str = "") -> list[str]:
    """Entries of a saved configuration that differ now, as `path: saved, now value`.

    A setting that the saved one does not know is newer than it and says nothing.
    """
    if isinstance(saved, dict) and isinstance(now, dict):
        return [
            line
            for key, value in saved.items()
            for line in differences(value, now.get(key), f"{path}.{key}" if path else key)
        ]
    if isinstance(now, tuple):
        now = json.loads(json.dumps(now))
    return [] if saved == now else [f"{path} was {saved}, now {now}"]


def load_weights(module: nn.Module, file: Path, mend: str) -> None:
    """Load a safetensors file into a module of the same parameters, in place.

    Raises:
        FileNotFoundError, CheckpointError: the message ends with `mend`.
    """
    tensors = read_tensors(file, mend)
    own = module.state_dict()
    wrong = [
        name
        for name in own.keys() | tensors.keys()
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"{file} is of another architecture ({len(wrong)} tensors differ, first {min(wrong)}); {mend}"
        )
    module.load_state_dict(tensors)


def read_tensors(file: Path, mend: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file; errors as `load_weights`."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; {mend}")
    try:
        # Several processes on CPUs have "cpu:0", which safetensors does not know.
        return load_file(file, device="cpu" if torch.device(device).type == "cpu" else str(device))
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged ({error}); {mend}") from error


def build_vae(preset: Preset) -> Vae | KlVae:
    """The autoencoder of a preset, untrained: our own, or SDXL's kind."""
    if isinstance(preset.vae, KlVaeSpec):
        from train.pretrained import KlVae

        return KlVae(preset.vae)
    return Vae(preset.vae)


def save_vae(vae: nn.Module, folder: Path) -> None:
    """Write `vae.safetensors` into a folder, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".vae.{os.getpid()}.tmp"
    save_file(named_parameters(vae), temporary)
    temporary.replace(folder / "vae.safetensors")


def load_vae(folder: Path, preset: Preset) -> Vae | KlVae:
    """The autoencoder of a checkpoint or VAE folder, frozen, in float32.

    Raises:
        FileNotFoundError, CheckpointError: it is missing, damaged, or of another preset.
    """
    vae = build_vae(preset)
    mend = f"make one with: python -m train vae --profile {preset.name} --out {folder}"
    load_weights(vae, folder / "vae.safetensors", mend)
    return vae.eval().requires_grad_(False)
