"""Rendered variants as latents, in shards of safetensors.

With latents at hand, training never waits for data.  A shard holds some objects with all their
variants; shards are written by as many processes as there are cores to feed the renderer, and read
back whole onto the training device.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from train.checkpoint import CheckpointError
from train.dataset import render_folder
from train.model import Batch
from train.vae import Vae


@dataclass(frozen=True)
class LatentCache:
    """N variants of all objects on one device; M input views each."""

    z_0: Tensor  # (N, 6, 8, h, w) float16
    image: Tensor  # (N, M, H, W, 3) uint8
    image_latent: Tensor  # (N, M, 4, h, w) float16
    focal: Tensor  # (N, M) float32
    objects: int  # each with N / objects variants, side by side
    shards: tuple[str, ...] = ()  # names of the files they come from

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """A batch of variants of different objects (as far as there are enough), on the device."""
        device, objects = self.z_0.device, self.objects
        per_object = self.z_0.shape[0] // objects
        picks = torch.randperm(objects, generator=generator, device=device)[:count]
        if count > objects:
            extra = torch.randint(objects, (count - objects,), generator=generator, device=device)
            picks = torch.cat([picks, extra])
        variant = torch.randint(per_object, (count,), generator=generator, device=device)
        view = torch.randint(self.image.shape[1], (count,), generator=generator, device=device)
        rows = picks * per_object + variant
        return Batch(
            z_0=self.z_0[rows].float(),
            image=self.image[rows, view].permute(0, 3, 1, 2).float() / 255.0,
            image_latent=self.image_latent[rows, view].float(),
            focal=self.focal[rows, view],
        )

    def free(self) -> None:
        """Give the memory back, whoever still holds the cache; nothing can be drawn from it any more."""
        for tensor in (self.z_0, self.image, self.image_latent, self.focal):
            tensor.untyped_storage().resize_(0)


def build_shard(
    out: Path,
    objects: list[Path],
    vae: Vae,
    *,
    device: str,
    variants: int,
    inputs: int,
    seed: int,
    workers: int,
) -> None:
    """Render and encode `variants` variants of every object into one shard, written atomically."""
    shape = vae.spec
    side, px, count = shape.latent_px, shape.image_px, len(objects) * variants
    z_0 = torch.empty(count, 6, 2 * shape.latent_channels, side, side, dtype=torch.float16)
    image = torch.empty(count, inputs, px, px, 3, dtype=torch.uint8)
    image_latent = torch.empty(count, inputs, shape.latent_channels, side, side, dtype=torch.float16)
    focal = torch.empty(count, inputs)
    stream = render_folder(objects, device, variants, inputs, seed, workers, image_px=px)
    for index, variant, item in tqdm(stream, total=count, desc=out.stem, mininterval=5, disable=None):
        row = index * variants + variant
        pictures = torch.from_numpy(item.inputs).to(device)
        latents = encode_bytes(vae, torch.cat([item.color, item.normal, pictures])).to("cpu", torch.float16)
        z_0[row] = torch.cat([latents[:6], latents[6:12]], dim=1)
        image[row], image_latent[row] = torch.from_numpy(item.inputs), latents[12:]
        focal[row] = torch.from_numpy(item.focal)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    names = json.dumps([path.name for path in objects])
    tensors = {"z_0": z_0, "image": image, "image_latent": image_latent, "focal": focal}
    save_file(tensors, temporary, {"objects": names, "variants": str(variants), "vae": vae_fingerprint(vae)})
    temporary.replace(out)


@torch.no_grad()
def encode_bytes(vae: Vae, pictures: Tensor) -> Tensor:
    """Pictures (n, H, W, 3) uint8 to scaled latents (n, 4, h, w), in bfloat16 on a GPU."""
    half = pictures.device.type == "cuda"
    with torch.autocast(pictures.device.type, torch.bfloat16, enabled=half):
        return vae.encode(pictures.permute(0, 3, 1, 2).float() / 255.0).float()


def vae_fingerprint(vae: Vae) -> str:
    """Sums of the weights: tells whether a cache was encoded by this autoencoder."""
    return f"{sum(float(p.double().sum()) for p in vae.state_dict().values()):.4f}"


def shard_names(folder: Path) -> tuple[str, ...]:
    """The finished shards of a folder, sorted."""
    return tuple(sorted(path.name for path in folder.glob("shard-*.safetensors")))


def load_cache(folder: Path, vae: Vae, device: torch.device) -> LatentCache:
    """Read every shard of a folder onto a device.

    Raises:
        CheckpointError: there is no shard, or one is damaged or was encoded by another autoencoder.
    """
    names = shard_names(folder)
    if not names:
        raise CheckpointError(f"no shards in {folder}; make them with: python -m train cache --out {folder}")
    fingerprint = vae_fingerprint(vae)
    objects, variants, rows = 0, [], 0
    whole: dict[str, Tensor] = {}
    # Twice over the files: to size the tensors, then to fill them, so that the device never holds two copies.
    for fill in (False, True):
        start = 0
        for name in names:
            try:
                with safe_open(folder / name, "pt", device="cpu") as file:
                    meta = file.metadata()
                    if meta["vae"] != fingerprint:
                        raise CheckpointError(
                            f"{folder / name} was encoded by another autoencoder; give its --vae, "
                            "or make the cache again"
                        )
                    count, each = len(json.loads(meta["objects"])), int(meta["variants"])
                    if not fill:
                        objects += count
                        variants.append(each)
                        rows += count * each
                        continue
                    for key in ("z_0", "image", "image_latent", "focal"):
                        part = file.get_tensor(key)
                        if key not in whole:
                            whole[key] = torch.empty(rows, *part.shape[1:], dtype=part.dtype, device=device)
                        whole[key][start : start + count * each] = part
                    start += count * each
            except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                raise CheckpointError(
                    f"{folder / name} is damaged ({error}); make the cache again"
                ) from error
        if len(set(variants)) > 1:
            raise CheckpointError(
                f"the shards in {folder} hold different numbers of variants: {sorted(set(variants))}; "
                "make them again with one --variants"
            )
    return LatentCache(**whole, objects=objects, shards=names)


def reload_cache(
    folder: Path, vae: Vae, device: torch.device, *, attempts: int = 10, wait_s: float = 1.0
) -> LatentCache:
    """`load_cache` of a folder whose shards come and go: tried again if one went while it was read.

    Raises:
        CheckpointError: as `load_cache`, or all attempts met a shard that went.
    """
    for _ in range(attempts):
        try:
            return load_cache(folder, vae, device)
        except FileNotFoundError:
            time.sleep(wait_s)
    raise CheckpointError(f"shards in {folder} go faster than they can be read; keep more sets of them")


def shares(objects: list[Path], count: int) -> Iterator[list[Path]]:
    """Objects dealt out to `count` processes, so that each gets its share of every family."""
    for index in range(count):
        yield objects[index::count]
