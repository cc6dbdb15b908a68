"""A tiny training run that a real SIGKILL ends at its n-th event, for a process of its own."""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from train import checkpoint, trainer
from train.cache import LatentCache
from train.presets import TOY, with_train
from train.trainer import RunOptions, train_model
from train.vae import Vae

STEPS = 3
PRESET = with_train(
    TOY, batch=3, steps=STEPS, warmup=2, losses=replace(TOY.train.losses, var_objects=2, mi_objects=2)
)


def random_cache(objects: int = 5) -> LatentCache:
    generator = torch.Generator().manual_seed(1)
    return LatentCache(
        z_0=torch.randn((objects, 6, 8, 8, 8), generator=generator).half(),
        image=torch.randint(0, 256, (objects, 1, 32, 32, 3), dtype=torch.uint8, generator=generator),
        image_latent=torch.randn((objects, 1, 4, 8, 8), generator=generator).half(),
        focal=torch.rand((objects, 1), generator=generator),
        objects=objects,
    )


class Killer:
    """Counts events: a batch drawn; a file half written and whole; a rename; a folder half removed."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at, self.count = kill_at, 0

    def event(self) -> bool:
        self.count += 1
        return self.count == self.kill_at

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self.event():
                self.kill()
            return function(*args, **kwargs)

        return wrapped

    def torn(self, save_file: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(tensors: Any, path: Path, *args: Any) -> None:
            save_file(tensors, path, *args)
            if self.event():
                os.truncate(path, path.stat().st_size // 2)
                self.kill()
            if self.event():
                self.kill()

        return wrapped

    def half_removed(self, rmtree: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(folder: Path) -> None:
            if self.event():
                sorted(folder.iterdir())[0].unlink()
                self.kill()
            rmtree(folder)

        return wrapped


def run(out: Path, kill_at: int | None) -> None:
    """Train to the end, from the checkpoint in `out` if there is one, unless killed before."""
    torch.set_num_threads(1)
    killer = Killer(kill_at)
    checkpoint.save_file = killer.torn(checkpoint.save_file)
    Path.rename = killer.before(Path.rename)  # type: ignore[method-assign]
    Path.replace = killer.before(Path.replace)  # type: ignore[method-assign]
    shutil.rmtree = killer.half_removed(shutil.rmtree)  # type: ignore[assignment]
    LatentCache.draw = killer.before(LatentCache.draw)  # type: ignore[method-assign]
    trainer.loss_curves = lambda *_: None  # slow, and no part of the checkpoint
    torch.manual_seed(0)
    vae = Vae(TOY.vae).eval().requires_grad_(False)
    checkpoint.finish_interrupted_save(out / "checkpoint")
    options = RunOptions(out=out, save_every=1, sheet_every=99, resume=(out / "checkpoint").exists())
    train_model(PRESET, random_cache(), vae, None, options)
    (out / "events").write_text(str(killer.count))
