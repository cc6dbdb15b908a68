"""Muon against its definition and against PyTorch's own."""

from __future__ import annotations

import pytest
import torch

from train.optimizer import Muon, build_optimizers, orthogonalized, orthogonalized_together


@pytest.mark.parametrize("shape", [(3, 80, 200), (2, 200, 80)])
def test_orthogonalized_against_svd(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalized(matrices).double()
    u, _, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    # In the basis of its singular vectors the result is diagonal, with entries near 1.
    rotated = u.mT @ found @ vh.mT
    diagonal = rotated.diagonal(dim1=1, dim2=2)
    assert float(diagonal.min()) > 0.6 and float(diagonal.max()) < 1.3
    assert float((rotated - torch.diag_embed(diagonal)).abs().max()) < 0.05


def test_orthogonalized_together_is_each_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(80, 200), (200, 80), (80, 190), (80, 80), (96, 500), (80, 256)]
    matrices = [torch.randn(shape, generator=generator) for shape in shapes]
    for matrix, found in zip(matrices, orthogonalized_together(matrices), strict=True):
        alone = orthogonalized(matrix[None])[0].float()
        assert found.shape == matrix.shape
        error = float((found.float() - alone).norm() / alone.norm())
        assert error < 0.02  # rounded to bfloat16 in other sums


@pytest.mark.gpu
def test_graphs_move_as_kernels_do() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.manual_seed(0)
    shapes = [(96, 160), (64, 16, 3, 3), (160, 96)]
    graphed, plain = ([torch.nn.Parameter(torch.ones(s, device="cuda")) for s in shapes] for _ in range(2))
    optimizers = [Muon(graphed, lr=0.02, graphs=True), Muon(plain, lr=0.02)]
    for _ in range(4):
        for p, q in zip(graphed, plain, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(graphed, plain, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("shape", [(96, 160), (64, 16, 3, 3)])
def test_steps_against_torch(shape: tuple[int, ...]) -> None:
    """Same-shaped parameters, kernels among them, move as `torch.optim.Muon` moves each as a matrix."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3)]
    theirs = [torch.nn.Parameter(p.detach().clone().flatten(1)) for p in ours]
    begin = ours[0].detach().clone()
    muon = Muon(ours, lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(shape)
            q.grad = p.grad.flatten(1)
        muon.step()
        reference.step()
    moved = float((ours[0].detach() - begin).square().mean().sqrt())
    for p, q in zip(ours, theirs, strict=True):
        # Both iterate in bfloat16, whose rounding (2^-9) processors do not share.
        off = (p.flatten(1) - q).detach()
        assert float(off.square().mean().sqrt()) < 0.005 * moved and float(off.abs().max()) < 0.05 * moved


def test_who_takes_what() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.Conv2d(64, 64, 3), torch.nn.LayerNorm(64))
    adamw, muon = build_optimizers(net.parameters(), "muon", 1e-3, 0.01)
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(muon, Muon)
    assert muon.param_groups[0]["params"] == [net[1].weight]
    assert len(adamw.param_groups[0]["params"]) == 5
    (alone,) = build_optimizers(net.parameters(), "adamw", 1e-3, 0.01)
    assert len(alone.param_groups[0]["params"]) == 6
    with pytest.raises(ValueError, match="use 'adamw' or 'muon'"):
        build_optimizers(net.parameters(), "sgd", 1e-3, 0.01)
