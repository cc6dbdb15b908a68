"""Weights, gradients, moments and average spread over the processes, for models too large for one GPU.

Every repeated block is gathered when it is needed and let go after (FSDP2, `fully_shard`), in
float32, so that a step computes what it does without.  Checkpoints hold whole tensors: a sharded run
can be resumed unsharded, and the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from train.multiview_unet import MultiviewBlock


def shard(model: nn.Module) -> None:
    """Spread the parameters over all processes, in place; optimisers are built after it."""
    for module in model.modules():
        if isinstance(module, ResnetBlock2D | MultiviewBlock):
            fully_shard(module)
    fully_shard(model)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; all of one that is not spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process calls it for one that is spread, which lands in the host's memory."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same on all processes, as the parameter lies; inverse of `whole`."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(
        tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def part_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a spread tensor, as one that knows the rest; inverse of `local`."""
    if not isinstance(parameter, DTensor):
        return tensor
    return DTensor.from_local(
        tensor, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


def spread_moments(
    optimizers: Sequence[torch.optim.Optimizer], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Whole tensors named as by `optimizer_tensors`, as their parameters lie."""
    parameters = [[p for group in o.param_groups for p in group["params"]] for o in optimizers]
    spread = {}
    for name, value in tensors.items():
        number, _, index = name.split(".", 1)[0].rpartition(":")
        parameter = parameters[int(number or 0)][int(index)]
        spread[name] = spread_like(value, parameter) if value.shape == parameter.shape else value
    return spread
