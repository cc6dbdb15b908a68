"""The figures of one ablation run after another, on the same objects with the same noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from numpy.typing import NDArray
from PIL import Image

from train.ablation_around import Around, around_figures, figures_of
from train.ablation_report import AROUND_FIGURES, Figures, mean_of
from train.checkpoint import load_state, load_weights
from train.consistency import (
    edge_agreement,
    embeddings,
    latent_variance,
    outline_agreement,
    retrieval_accuracy,
)
from train.metrics import view_metrics
from train.model import Batch, MultiviewModel
from train.presets import Preset
from train.probe import latents
from train.projection_heads import ProjectionHeads
from train.sampling import decode_pairs, sample_latents
from train.sheets import view_row
from train.watch import Watch
from uc3d_rt.contract import SamplingDefaults
from uc3d_rt.views import decode_views

SHEET_OBJECTS = 3
TOGETHER = 8
"""Objects that go through the networks at once."""


class Measure:
    """The figures of one model after another, on the same objects with the same noise."""

    def __init__(
        self,
        vae: torch.nn.Module,
        watch: Watch,
        sampling: SamplingDefaults,
        heads: ProjectionHeads,
        around: Sequence[Around] = (),
    ) -> None:
        self.vae, self.watch, self.sampling, self.heads = vae, watch, sampling, heads
        self.device = next(vae.parameters()).device
        state = PartialState()
        shares = np.array_split(np.arange(len(watch.picture)), state.num_processes)
        self.own = [int(i) for i in shares[state.process_index]]  # this process's objects
        self.around = around
        self.own_around = around[state.process_index :: state.num_processes]

    def truth(self) -> tuple[Figures, list[NDArray[np.uint8]]]:
        """The ceiling: the true views, encoded and decoded, but for Table 6 as they are; and the first
        objects' true views to draw.
        """
        rows, pairs = [], []
        for index in range(len(self.watch.picture)):
            images = decode_pairs(self.vae, latents(self.vae, self.watch, index, self.device))
            row, pair, _ = self._object(index, *np.split(images, 2), None)
            rows.append(row)
            pairs.append(pair[0])
        shown = range(min(SHEET_OBJECTS, len(rows)))
        drawn = [view_row(self.watch.color[i], self.watch.normal[i]) for i in shown]
        turned = mean_of((figures_of(one.truth, one) for one in self.around), AROUND_FIGURES)
        return mean_of(rows) | {"retrieval": retrieval_accuracy(pairs)} | turned, drawn

    def run(self, preset: Preset, checkpoint: Path, out: Path | None, turned: bool = False) -> Figures:
        """The figures of a checkpoint's averaged weights; every process calls it.

        Args:
            out: gets `figures.json` and `views.png`; None on all processes but the main one.
            turned: with Table 6's figures.
        """
        state = load_state(checkpoint)
        model = MultiviewModel(preset).to(self.device).eval()
        load_weights(model, checkpoint / "ema.safetensors", "train again")
        contrast = state["config"]["train"]["losses"]["lambda_mi"] > 0
        own = model.heads if contrast else None
        rows: list[tuple[Figures, Any]] = []
        pictures = []
        for start in range(0, len(self.own), TOGETHER):
            part = self.own[start : start + TOGETHER]
            batch = self._batch(part)
            variance = latent_variance(model, batch)
            z_0 = sample_latents(model, self.vae, batch.image, batch.focal, self.sampling)
            images = decode_pairs(self.vae, z_0)
            color, normal = images.reshape(2, len(part), -1, *images.shape[1:])
            for k, index in enumerate(part):
                row, pairs, picture = self._object(index, color[k], normal[k], own)
                row["latent_variance"], row["latent_variance_share"] = variance
                rows.append((row, pairs))
                pictures.append(picture)
        everyone = gather_object(rows)
        figures = mean_of(row for row, _ in everyone)
        figures["retrieval"] = retrieval_accuracy([pairs[0] for _, pairs in everyone])
        if contrast:
            figures["retrieval_own"] = retrieval_accuracy([pairs[1] for _, pairs in everyone])
        figures["steps"] = float(state["step"])
        if turned:
            rows_around = [around_figures(model, self.vae, one, self.sampling) for one in self.own_around]
            figures |= mean_of(gather_object(rows_around), AROUND_FIGURES)
        if out is not None:
            Image.fromarray(np.concatenate(pictures[:SHEET_OBJECTS], axis=1)).save(out / "views.png")
            # Last: figures that stand there are whole.
            (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        return figures

    def _batch(self, indices: Sequence[int]) -> Batch:
        picture = torch.from_numpy(self.watch.picture[list(indices)]).to(self.device)
        image = picture.permute(0, 3, 1, 2).float() / 255.0
        with torch.no_grad():
            z_0 = torch.stack([latents(self.vae, self.watch, i, self.device) for i in indices])
            image_latent = self.vae.encode(image).float()
        focal = torch.from_numpy(self.watch.focal[list(indices)]).to(self.device)
        return Batch(z_0=z_0.float(), image=image, image_latent=image_latent, focal=focal)

    def _object(
        self, index: int, color: NDArray[np.float32], normal: NDArray[np.float32], own: ProjectionHeads | None
    ) -> tuple[Figures, list[Any], NDArray[np.uint8]]:
        """Figures, embeddings by the reference heads and the model's own, and a picture of one object.

        Args:
            color: (V, H, W, 3) in [0, 1], as decoded.
            normal: likewise, as an image.
        """
        shown, unit, mask = decode_views(color, normal)
        row: Figures = dict(view_metrics(shown, unit, self.watch.color[index], self.watch.normal[index]))
        row["outlines"], row["edges"] = outline_agreement(color, mask), edge_agreement(color, normal)
        pairs = [embeddings(heads, color, normal) for heads in (self.heads, own) if heads is not None]
        return row, pairs, view_row(shown, unit)
