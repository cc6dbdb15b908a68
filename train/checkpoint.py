"""Checkpoints as folders of safetensors and JSON; nothing is pickled.

`model.safetensors` and `ema.safetensors` hold the trained networks, `vae.safetensors` the
autoencoder, `optimizer.safetensors` the moments, `state.json` the rest.  A checkpoint is written
beside the old one and moved into place, so a kill at any moment leaves a whole one.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from train.presets import PRESETS, Preset
from train.vae import Vae

STATE = "state.json"


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Contiguous copies-by-reference of a module's state, ready for safetensors."""
    return {name: value.detach().contiguous() for name, value in model.state_dict().items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as flat tensors `index.key`, in the order of its parameters."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": torch.as_tensor(value).detach().contiguous()
        for index, entry in state.items()
        for key, value in entry.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`, for an optimiser over the same parameters."""
    whole = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})


def save_checkpoint(
    folder: Path,
    *,
    preset: Preset,
    model: nn.Module,
    ema: dict[str, Tensor],
    vae: Vae,
    optimizer: torch.optim.Optimizer | None,
    state: dict[str, Any],
) -> None:
    """Write a whole checkpoint, replacing the one at `folder` only when it is complete."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for stale in (fresh, old):
        if stale.exists():
            shutil.rmtree(stale)
    fresh.mkdir(parents=True)
    save_file(named_parameters(model), fresh / "model.safetensors")
    save_file({k: v.contiguous() for k, v in ema.items()}, fresh / "ema.safetensors")
    save_file(named_parameters(vae), fresh / "vae.safetensors")
    if optimizer is not None:
        save_file(optimizer_tensors(optimizer), fresh / "optimizer.safetensors")
    record = {"preset": preset.name, "config": asdict(preset), **state}
    (fresh / STATE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    if old.exists():
        shutil.rmtree(old)


def load_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint; of the previous one if a kill fell between the two renames.

    Raises:
        FileNotFoundError: there is no checkpoint; the message says how to make one.
    """
    path = folder / STATE
    if not path.is_file():
        previous = folder.with_name(folder.name + ".old")
        if not (previous / STATE).is_file():
            raise FileNotFoundError(
                f"no checkpoint at {folder}; train one with: python -m train model --out {folder}"
            )
        previous.rename(folder)
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return state


def preset_of(folder: Path) -> Preset:
    """The preset a checkpoint was trained with; refuses one whose sizes have changed since."""
    state = load_state(folder)
    preset = PRESETS.get(state["preset"])
    if preset is None:
        raise ValueError(f"{folder} was trained as {state['preset']!r}; known presets: {', '.join(PRESETS)}")
    now = json.loads(json.dumps(asdict(preset)))
    for part in ("unet", "encoder", "vae", "heads", "schedule"):
        if now[part] != state["config"][part]:
            raise ValueError(
                f"{folder} was trained with another {part!r} of preset {preset.name!r}; train again"
            )
    return preset


def load_vae(folder: Path, preset: Preset) -> Vae:
    """The autoencoder of a checkpoint or VAE folder, frozen, in float32."""
    vae = Vae(preset.vae)
    vae.load_state_dict(load_file(folder / "vae.safetensors"))
    return vae.eval().requires_grad_(False)
