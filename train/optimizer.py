"""Muon for the weight matrices, AdamW for everything else.

Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural networks") takes the momentum
of a weight matrix to its nearest orthogonal matrix: every direction that the gradient has, weak or
strong, is followed at one speed.  `torch.optim.Muon` does the same one matrix at a time; here matrices
of about one size go through the iteration together, and convolution kernels count as matrices
(out, in * h * w).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


def padded(columns: int) -> int:
    """The next power of two, or three quarters of it: sizes that many matrices share."""
    power = 1 << (columns - 1).bit_length()
    return 3 * power // 4 if columns <= 3 * power // 4 else power


def orthogonalized_together(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Each matrix orthogonalised, those of about one size in one batch.

    A tall matrix is turned on its side, and short ones get columns of zeros, which stay zeros and change
    nothing else.  Each size costs a GPU some twenty kernels, which take longer to start than to run.
    """
    batches: dict[tuple[int, int], list[int]] = {}
    flat = [m.mT if m.shape[0] > m.shape[1] else m for m in matrices]
    for index, m in enumerate(flat):
        batches.setdefault((m.shape[0], padded(m.shape[1])), []).append(index)
    found: list[Tensor] = list(matrices)
    for (rows, columns), members in batches.items():
        batch = flat[members[0]].new_zeros((len(members), rows, columns), dtype=torch.bfloat16)
        for place, index in zip(batch, members, strict=True):
            place[:, : flat[index].shape[1]].copy_(flat[index])
        for done, index in zip(orthogonalized(batch), members, strict=True):
            done = done[:, : flat[index].shape[1]]
            found[index] = done if flat[index] is matrices[index] else done.mT
    return found


class Replayed:
    """`orthogonalized_together`, from the second call on as one CUDA graph: the shapes never change."""

    def __init__(self) -> None:
        self._given: list[Tensor] = []
        self._found: list[Tensor] = []
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """What it gives lives until the next call."""
        if not self._given:  # libraries set themselves up, which no graph may hold
            self._given = [m.clone() for m in matrices]
            return orthogonalized_together(matrices)
        torch._foreach_copy_(self._given, list(matrices))
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            # Other threads, which watch the exchange of gradients, go on calling the driver.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._found = orthogonalized_together(self._given)
            self._graph = graph
        self._graph.replay()
        return self._found


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay.

    An update is scaled to the root mean square that AdamW's have (Liu et al., "Muon is Scalable for
    LLM Training"), so that one learning rate serves both.  With `graphs` every parameter needs a gradient
    in each step, on one CUDA device.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        graphs: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._together = [Replayed() if graphs else orthogonalized_together for _ in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group, together in zip(self.param_groups, self._together, strict=True):
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients = [p.grad for p in parameters if p.grad is not None]
            for p in parameters:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum"] for p in parameters]
            torch._foreach_lerp_(buffers, gradients, 1.0 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])
            updates = together([u.flatten(1) for u in ahead])
            torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
            for p, u in zip(parameters, updates, strict=True):
                p.add_(u.reshape(p.shape), alpha=-group["lr"] * 0.2 * max(u.shape) ** 0.5)


def build_optimizers(
    parameters: Iterable[nn.Parameter], kind: str, lr: float, weight_decay: float, graphs: bool = False
) -> list[torch.optim.Optimizer]:
    """The optimisers of one model: AdamW over all parameters, or AdamW and Muon, each over its own.

    Args:
        kind: "adamw" or "muon".
        graphs: Muon's products are replayed as a CUDA graph.

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
        found.append(Muon(matrices, lr=lr, weight_decay=weight_decay, graphs=graphs))
    return found
