"""The two small projection heads `f_phi^x`, `f_phi^n` of Eq. 16."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from train.presets import HeadSpec


def _head(spec: HeadSpec) -> nn.Sequential:
    layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(spec.pooled_px)]
    before = 3
    for channels in spec.channels:
        layers += [nn.Conv2d(before, channels, 4, stride=2, padding=1), nn.SiLU()]
        before = channels
    side = spec.pooled_px // 2 ** len(spec.channels)
    # Average to 4 x 4 cells: what is where matters as much as what there is.
    cells = min(4, side)
    layers += [nn.AvgPool2d(side // cells), nn.Flatten(), nn.Linear(before * cells**2, spec.embedding_dim)]
    return nn.Sequential(*layers)


class ProjectionHeads(nn.Module):
    """Colour and normal images (n, 3, H, W) in [0, 1] to unit embeddings (n, embedding_dim)."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.color, self.normal = _head(spec), _head(spec)

    def forward(self, color: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
        return (
            F.normalize(self.color(color * 2.0 - 1.0), dim=-1),
            F.normalize(self.normal(normal * 2.0 - 1.0), dim=-1),
        )
