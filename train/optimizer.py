"""Muon for the weight matrices, AdamW for everything else.

Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural networks") takes the momentum
of a weight matrix to its nearest orthogonal matrix: every direction that the gradient has, weak or
strong, is followed at one speed.  `torch.optim.Muon` does the same one matrix at a time; here all
matrices of one shape go through the iteration together, and convolution kernels count as matrices
(out, in * h * w).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MIN_SIDE = 64
"""Smaller matrices (first and last layers, embeddings) are left to AdamW."""

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of Jordan et al., steep at zero
NEWTON_SCHULZ_STEPS = 5


def is_matrix(parameter: Tensor) -> bool:
    """Whether Muon takes this parameter: a matrix or convolution of at least `MIN_SIDE` each way."""
    return parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) >= MIN_SIDE


def orthogonalized(matrices: Tensor) -> Tensor:
    """(n, rows, columns) with all singular values brought to about 1 (0.7 to 1.2), in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay.

    An update is scaled to the root mean square that AdamW's have (Liu et al., "Muon is Scalable for
    LLM Training"), so that one learning rate serves both.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    sides = (parameter.shape[0], parameter[0].numel())
                    shapes.setdefault(sides, []).append(parameter)
            for (rows, columns), parameters in shapes.items():
                gradients = [p.grad for p in parameters if p.grad is not None]
                for p in parameters:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum"] for p in parameters]
                torch._foreach_lerp_(buffers, gradients, 1.0 - group["momentum"])
                ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])
                updates = orthogonalized(torch.stack([u.reshape(rows, columns) for u in ahead]))
                updates = updates.float() * (-group["lr"] * 0.2 * max(rows, columns) ** 0.5)
                torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(
                    parameters, [u.reshape(p.shape) for u, p in zip(updates, parameters, strict=True)]
                )


def build_optimizers(
    parameters: Iterable[nn.Parameter], kind: str, lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """The optimisers of one model: AdamW over all parameters, or AdamW and Muon, each over its own.

    Args:
        kind: "adamw" or "muon".

    Raises:
        ValueError: another kind.
    """
    if kind not in ("adamw", "muon"):
        raise ValueError(f"unknown optimizer {kind!r}; use 'adamw' or 'muon'")
    every = list(parameters)
    matrices = [p for p in every if is_matrix(p)] if kind == "muon" else []
    taken = {id(p) for p in matrices}
    others = [p for p in every if id(p) not in taken]
    on_gpu = every[0].device.type == "cuda"
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=on_gpu)
    ]
    if matrices:
        found.append(Muon(matrices, lr=lr, weight_decay=weight_decay))
    return found
