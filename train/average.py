"""The moving average of the weights, which sampling uses."""

from __future__ import annotations

import torch
from torch import Tensor

from train.sharding import local, part_of, whole


@torch.no_grad()
def update_average(average: dict[str, Tensor], model: torch.nn.Module, decay: float) -> None:
    """Exponential moving average of this process's part of the parameters, in float32, in place."""
    named = {name: local(value) for name, value in model.named_parameters()}
    if not average:
        average.update({name: value.detach().float().clone() for name, value in named.items()})
        return
    torch._foreach_lerp_(
        list(average.values()), [named[name].detach().float() for name in average], 1.0 - decay
    )


def full_average(average: dict[str, Tensor], model: torch.nn.Module) -> dict[str, Tensor]:
    """The averaged parameters with the buffers that need no average, whole."""
    own = model.state_dict()
    return {
        name: whole(part_of(average[name], value) if name in average else value).detach()
        for name, value in own.items()
    }
