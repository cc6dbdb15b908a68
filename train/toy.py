"""The whole method on a laptop, from nothing to a mesh: read this file as the tutorial.

    python -m train toy --out runs/toy

It makes a few coloured objects, trains the `toy` networks (32 px) on them with the same functions
that train the real ones, and turns the picture of an object it never saw into a mesh.  Two or three
minutes of training at 32 px teach silhouettes, colours and rough normals, not detail.

OUT gets `objects/`, `vae/`, `cache/`, `model/` (checkpoint, loss.png, sheet-*.png), `bundle/`,
`picture.png` and `mesh.glb`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import trimesh
from accelerate import PartialState
from PIL import Image

from train.cache import build_shard, load_cache
from train.checkpoint import load_state
from train.dataset import render_folder
from train.presets import TOY, with_train
from train.trainer import RunOptions, train_model
from train.truth import ground_truth
from train.vae_trainer import train_vae
from train.watch import watched

OBJECTS, HELD_OUT = 20, 4


def run(out: Path, *, steps: int, vae_steps: int, seed: int) -> list[dict[str, float]]:
    """Run every stage; returns the logged losses of the multiview model."""
    device = PartialState().device
    preset = with_train(TOY, steps=steps)  # lambda_var and lambda_mi are the paper's, as in every preset

    # 1. Objects. Any folder of GLB, OBJ or PLY files would do; a few are never trained on.
    files = make_objects(out / "objects", OBJECTS + HELD_OUT, seed)
    known, unseen = files[:OBJECTS], files[OBJECTS:]

    # 2. Variants: each object turned, stretched and recoloured at random, as six colour images x and
    #    six normal maps n at azimuths 30 ... 330 (Sec. 4.1.3), lit so that x = A S(n, l) (Eq. 14),
    #    and as input pictures y from azimuth 0.
    pictures = []
    for _, _, variant in render_folder(known, str(device), 2, 1, seed, image_px=preset.vae.image_px):
        pictures += [variant.color, variant.normal]

    # 3. The autoencoder: E turns a colour image or a normal map into a latent, and back.
    vae = train_vae(
        preset, torch.cat(pictures), out / "vae", steps=vae_steps, minutes=None, batch=16, lr=2e-3, seed=seed
    )

    # 4. Latents z_0 = [E(x); E(n)] of every view (Sec. 3.2), and E(y), made once and kept.
    shard = out / "cache" / "shard-000.safetensors"
    build_shard(shard, known, vae, device=str(device), variants=8, inputs=2, seed=seed, workers=2)
    cache = load_cache(out / "cache", vae, device)

    # 5. The multiview model. Each step noises the latents (Eq. 6) and lowers (Eq. 18)
    #        L_diffusion + lambda_var L_Var + lambda_mi L_MI,
    #    the error of the predicted noise (Eq. 9), the spread of the UNet's middle features over
    #    noise draws (Eq. 10-13), and InfoNCE between colour and normals (Eq. 16-17):
    #    see `MultiviewModel.forward` and train/losses.py.
    watch = watched(unseen, str(device), preset.vae.image_px)
    options = RunOptions(
        out=out / "model", seed=seed, save_every=steps, sheet_every=steps, log_every=max(1, steps // 20)
    )
    checkpoint = train_model(preset, cache, vae, watch, options)

    # 6. A bundle. Training and runtime meet in files only, so export is a program of its own.
    bundle = out / "bundle"
    #    So short a training exaggerates at the paper's guidance of 3: record a gentler default.
    call(
        *("export", "onnx", "--checkpoint", checkpoint, "--out", bundle),
        *("--guidance", 1.5, "--data", "made by train/toy.py"),
    )

    # 7. The runtime, which knows no torch: DDIM (Eq. 7-8 without their noise) from the picture of an
    #    object not trained on to six views, then the surface fit (Eq. 19-21) and a textured mesh.
    picture = out / "picture.png"
    Image.fromarray(ground_truth(unseen[0], device=str(device), input_px=256).input_rgba).save(picture)
    call("uc3d_rt.cli", picture, "--output", out / "mesh.glb", "--bundle", bundle)
    print(f"{out / 'mesh.glb'} and {options.out / f'sheet-{steps:06d}.png'} show what was learned")
    return load_state(checkpoint)["history"]


def make_objects(folder: Path, count: int, seed: int) -> list[Path]:
    """Write boxes, balls, cones and L-shapes of two colours each as PLY files."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    files = []
    for index in range(count):
        kind = ("box", "ball", "cone", "l-shape")[index % 4]
        if kind == "box":
            mesh = trimesh.creation.box(rng.uniform(0.5, 1.0, 3))
        elif kind == "ball":
            mesh = trimesh.creation.icosphere(subdivisions=3).apply_scale(rng.uniform(0.5, 1.0, 3))
        elif kind == "cone":
            mesh = trimesh.creation.cone(radius=rng.uniform(0.3, 0.6), height=1.0)
            mesh.apply_transform(trimesh.transformations.rotation_matrix(-np.pi / 2, [1, 0, 0]))  # +Z to +Y
        else:
            foot, leg = trimesh.creation.box([0.9, 0.3, 0.4]), trimesh.creation.box([0.3, 1.0, 0.4])
            leg.apply_translation([-0.3, 0.65, 0.0])
            mesh = trimesh.util.concatenate([foot, leg])
        mesh = mesh.subdivide().subdivide()
        low, high = rng.integers(40, 230, (2, 3))
        colors = np.where(mesh.vertices[:, 1:2] < mesh.vertices[:, 1].mean(), low, high).astype(np.uint8)
        mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=colors)
        files.append(folder / f"{index:02d}-{kind}.ply")
        mesh.export(files[-1])
    return files


def call(module: str, *arguments: object) -> None:
    """Run `python -m module arguments` to its end."""
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True)
