"""One checkpoint out of several of a run, or of runs that go on from one another: the mean of their averages.

Such weights differ in what they have learned by heart, and their mean can do better on things never seen
than the last of them (Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization",
UAI 2018).  Whether it does has to be measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from train.cache import vae_fingerprint
from train.checkpoint import (
    CheckpointError,
    load_state,
    load_vae,
    load_weights,
    preset_of,
    save_checkpoint,
)
from train.model import MultiviewModel


def merge_checkpoints(folders: Sequence[Path], out: Path) -> list[int]:
    """Write the mean of the checkpoints' averaged weights as a checkpoint.

    Nothing can be resumed from it; `export onnx` and `train model --start-from` take it.

    Args:
        folders: two or more checkpoints of one preset and one autoencoder; the last gives the record.
        out: of the new one; must not exist.

    Returns:
        The steps of the given ones.

    Raises:
        ValueError: fewer than two are given, or `out` exists.
        FileNotFoundError: one is missing.
        CheckpointError: one is damaged, or of another preset or autoencoder than the others.
    """
    if len(folders) < 2:
        raise ValueError("a mean needs two checkpoints or more")
    if out.exists():
        raise ValueError(f"{out} exists; choose another --out, or remove it")
    states = [load_state(folder) for folder in folders]
    presets = [preset_of(folder) for folder in folders]
    vaes = [load_vae(folder, preset) for folder, preset in zip(folders, presets, strict=True)]
    for folder, preset, vae in zip(folders, presets, vaes, strict=True):
        if preset != presets[-1] or vae_fingerprint(vae) != vae_fingerprint(vaes[-1]):
            raise CheckpointError(
                f"{folder} has another preset or autoencoder than {folders[-1]}; "
                "give checkpoints of one run, or of runs that go on from one another"
            )
    model = MultiviewModel(presets[-1])
    mean: dict[str, Tensor] = {}
    for folder in folders:
        load_weights(model, folder / "ema.safetensors", "give folders of checkpoints")
        for name, value in model.state_dict().items():
            part = value.double() / len(folders)
            mean[name] = mean[name] + part if name in mean else part
    weights = {name: value.to(model.state_dict()[name].dtype) for name, value in mean.items()}
    model.load_state_dict(weights)
    steps = [int(state["step"]) for state in states]
    record = {**states[-1], "merged_steps": steps, "merged_seeds": [int(state["seed"]) for state in states]}
    save_checkpoint(
        out, preset=presets[-1], model=model, ema=weights, vae=vaes[-1], optimizers=(), state=record
    )
    return steps
