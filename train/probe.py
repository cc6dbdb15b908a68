"""What a checkpoint draws from each of its conditions, on objects it was trained on and on others.

At the last timestep nothing of the views is left in `z_t`: all that the network knows comes from the
picture.  Leaving out the image tokens, `E(y)` or both shows which way it comes; the same figures for
objects kept aside show whether it is understood or remembered.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from train.losses import predicted_z_0
from train.model import MultiviewModel
from train.watch import Watch

CONDITIONS = {"both": (1, 1), "tokens only": (1, 0), "E(y) only": (0, 1), "neither": (0, 0)}


@torch.no_grad()
def errors_of_conditions(model: MultiviewModel, vae: torch.nn.Module, watch: Watch) -> dict[str, float]:
    """Mean squared error of the predicted clean latents at t = T - 1, for each of `CONDITIONS`.

    `"zero"` is that of predicting zeros: the mean square of the latents.  All objects see one noise.
    """
    device, schedule = model.alpha_bar.device, model.preset.schedule
    last = schedule.train_steps - 1
    sums = dict.fromkeys(("zero", *CONDITIONS), 0.0)
    eps: Tensor | None = None
    for index in range(len(watch.picture)):
        z_0 = latents(vae, watch, index, device)
        if eps is None:
            eps = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(0)).to(device)
        picture = torch.from_numpy(watch.picture[index]).to(device).permute(2, 0, 1)[None].float() / 255.0
        focal = torch.from_numpy(watch.focal[index : index + 1]).to(device).float()
        alpha_bar = model.alpha_bar[last].reshape(1)
        z_t = (alpha_bar.sqrt() * z_0 + (1.0 - alpha_bar).sqrt() * eps)[None]
        tokens, image_latent = model.encoder(picture), vae.encode(picture)
        sums["zero"] += float(z_0.square().mean())
        for name, (with_tokens, with_latent) in CONDITIONS.items():
            prediction = model.unet(
                z_t[0], torch.tensor([float(last)], device=device), tokens * with_tokens,
                image_latent * with_latent, focal,
            )  # fmt: skip
            found = predicted_z_0(prediction[None], z_t, alpha_bar, schedule.prediction)
            sums[name] += float((found[0] - z_0).square().mean())
    return {name: value / len(watch.picture) for name, value in sums.items()}


def latents(vae: torch.nn.Module, watch: Watch, index: int, device: torch.device) -> Tensor:
    """The true `[E(x); E(n)]` (6, 8, h, w) of a watched object."""
    color = torch.from_numpy(watch.color[index]).to(device).float()
    normal = torch.from_numpy(watch.normal[index]).to(device).float() / 2.0 + 0.5
    return torch.cat([vae.encode(views.permute(0, 3, 1, 2)) for views in (color, normal)], dim=1)


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table of `errors_of_conditions` for several sets of objects."""
    names = ["zero", *CONDITIONS]
    lines = [f"| objects | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    lines += [f"| {key} | {' | '.join(f'{row[n]:.3f}' for n in names)} |" for key, row in rows.items()]
    return "\n".join(lines)
