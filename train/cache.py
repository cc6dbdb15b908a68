"""Rendered variants as latents, in shards of safetensors.

With latents at hand, training never waits for data.  A shard holds some objects with all their
variants; shards are written by as many processes as there are cores to feed the renderer.  Training
reads them whole, onto its device or into the host's memory, or maps them and reads what it draws.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from train.checkpoint import CheckpointError
from train.dataset import Variant, render_folder
from train.model import Batch
from train.vae import Vae

T = TypeVar("T")

KEYS = ("z_0", "image", "image_latent", "focal")

ENCODED_TOGETHER = 8
"""Variants that one call of the encoder takes."""

ENCODED_PIXELS = 128 * 256**2
"""Pixels it sees at once: of large pictures it takes fewer."""

PLACES = ("device", "host", "disk")
"""Where a cache may lie, from the fastest to the largest."""

WHOLE = (0, 1)
"""The part of a process that holds all shards."""


@dataclass(frozen=True)
class LatentCache:
    """N variants of all objects in one memory; M input views each."""

    z_0: Tensor  # (N, 6, 8, h, w) float16
    image: Tensor  # (N, M, H, W, 3) uint8
    image_latent: Tensor  # (N, M, 4, h, w) float16
    focal: Tensor  # (N, M) float32
    objects: int  # each with N / objects variants, side by side
    shards: tuple[str, ...] = ()  # names of the files they come from
    target: torch.device | None = None  # of the batches; None: where the tensors lie

    @property
    def variants(self) -> int:
        """N."""
        return self.z_0.shape[0]

    @property
    def device(self) -> torch.device:
        """Where batches are drawn to."""
        return self.z_0.device if self.target is None else self.target

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """A batch of variants of different objects (as far as there are enough), on the device."""
        places = _places(self.variants, self.objects, self.image.shape[1], count, generator)
        rows, view = (place.to(self.z_0.device) for place in places)
        parts = self.z_0[rows], self.image[rows, view], self.image_latent[rows, view], self.focal[rows, view]
        return _batch(*parts, self.device)

    def free(self) -> None:
        """Give the memory back, whoever still holds the cache; nothing can be drawn from it any more."""
        for tensor in (self.z_0, self.image, self.image_latent, self.focal):
            tensor.untyped_storage().resize_(0)


class MappedCache:
    """The same variants left in their files: a draw reads its own rows, through the page cache."""

    def __init__(self, folder: Path, shards: Sequence[Shard], target: torch.device) -> None:
        self.shards = tuple(shard.name for shard in shards)
        self.objects = sum(shard.objects for shard in shards)
        self.device = target
        self._files: list[Any] = [safe_open(folder / shard.name, "pt", device="cpu") for shard in shards]
        counts = torch.tensor([shard.objects * shard.variants for shard in shards])
        self._ends = counts.cumsum(0)
        self._begins = self._ends - counts
        self.variants = int(self._ends[-1])
        self._inputs = int(self._files[0].get_slice("image").get_shape()[1])

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """As `LatentCache.draw`, bit for bit."""
        rows, view = (
            place.cpu() for place in _places(self.variants, self.objects, self._inputs, count, generator)
        )
        shard = torch.searchsorted(self._ends, rows, right=True)
        picked = list(zip(shard.tolist(), (rows - self._begins[shard]).tolist(), view.tolist(), strict=True))

        def read(key: str) -> Tensor:
            return torch.cat(
                [self._files[i].get_slice(key)[r : r + 1, v : v + 1].squeeze(1) for i, r, v in picked]
            )

        z_0 = torch.cat([self._files[i].get_slice("z_0")[r : r + 1] for i, r, _ in picked])
        return _batch(z_0, read("image"), read("image_latent"), read("focal"), self.device)

    def free(self) -> None:
        """Close the files; nothing can be drawn any more."""
        self._files.clear()


Cache = LatentCache | MappedCache


def _places(
    variants: int, objects: int, inputs: int, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Rows (count,) of different objects, as far as there are enough, and an input view of each.

    Drawn on the generator's device wherever the variants lie, so that their place changes no batch.
    """
    device, per_object = generator.device, variants // objects
    picks = torch.randperm(objects, generator=generator, device=device)[:count]
    if count > objects:
        extra = torch.randint(objects, (count - objects,), generator=generator, device=device)
        picks = torch.cat([picks, extra])
    variant = torch.randint(per_object, (count,), generator=generator, device=device)
    view = torch.randint(inputs, (count,), generator=generator, device=device)
    return picks * per_object + variant, view


def _batch(z_0: Tensor, image: Tensor, image_latent: Tensor, focal: Tensor, device: torch.device) -> Batch:
    """Stored rows as a batch; they travel in their stored types, the smallest."""
    return Batch(
        z_0=z_0.to(device).float(),
        image=image.to(device).permute(0, 3, 1, 2).float() / 255.0,
        image_latent=image_latent.to(device).float(),
        focal=focal.to(device),
    )


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
    for together in _chunks(tqdm(stream, total=count, desc=out.stem, mininterval=5, disable=None)):
        pictures = [torch.cat([item.color, item.normal, item.inputs]) for _, _, item in together]
        # One call for many variants: a network as small is bound by its launches.
        latents = encode_bytes(vae, torch.cat(pictures)).to("cpu", torch.float16)
        shown = torch.stack([item.inputs for _, _, item in together]).cpu()
        for (index, variant, item), own, views in zip(
            together, latents.split(12 + inputs), shown, strict=True
        ):
            row = index * variants + variant
            z_0[row] = torch.cat([own[:6], own[6:12]], dim=1)
            image[row], image_latent[row] = views, own[12:]
            focal[row] = torch.from_numpy(item.focal)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    names = json.dumps([path.name for path in objects])
    tensors = {"z_0": z_0, "image": image, "image_latent": image_latent, "focal": focal}
    save_file(tensors, temporary, {"objects": names, "variants": str(variants), "vae": vae_fingerprint(vae)})
    temporary.replace(out)


def _chunks(stream: Iterable[tuple[int, int, Variant]]) -> Iterator[list[tuple[int, int, Variant]]]:
    waiting = iter(stream)
    while together := list(islice(waiting, ENCODED_TOGETHER)):
        yield together


@torch.no_grad()
def encode_bytes(vae: Vae, pictures: Tensor) -> Tensor:
    """Pictures (n, H, W, 3) uint8 to scaled latents (n, 4, h, w), in bfloat16 on a GPU."""
    half = pictures.device.type == "cuda"
    limit = max(1, ENCODED_PIXELS // (pictures.shape[1] * pictures.shape[2]))
    with torch.autocast(pictures.device.type, torch.bfloat16, enabled=half):
        return torch.cat(
            [vae.encode(part.permute(0, 3, 1, 2).float() / 255.0).float() for part in pictures.split(limit)]
        )


def vae_fingerprint(vae: Vae) -> str:
    """Sums of the weights: tells whether a cache was encoded by this autoencoder."""
    return f"{sum(float(p.double().sum()) for p in vae.state_dict().values()):.4f}"


def shard_names(folder: Path, part: tuple[int, int] = WHOLE) -> tuple[str, ...]:
    """The finished shards of a folder, sorted; or those of one process of several, dealt out in turn."""
    index, count = part
    return tuple(sorted(path.name for path in folder.glob("shard-*.safetensors"))[index::count])


@dataclass(frozen=True)
class Shard:
    """What the head of a shard tells."""

    name: str
    objects: int
    variants: int  # of each object


def load_cache(
    folder: Path, vae: Vae, device: torch.device, place: str = "device", part: tuple[int, int] = WHOLE
) -> Cache:
    """The shards of a folder, for batches on a device.

    Args:
        place: one of `PLACES`; "disk" reads what is drawn only.
        part: which of how many processes this is, if each holds shards of its own.

    Raises:
        CheckpointError: there is no shard (for this process), or one is damaged or was encoded by
            another autoencoder.
        ValueError: an unknown place.
    """
    if place not in PLACES:
        raise ValueError(f"a cache lies in {', '.join(PLACES)}, not in {place!r}")
    names = shard_names(folder, part)
    if not names:
        there = len(shard_names(folder))
        if there:
            raise CheckpointError(
                f"{folder} holds {there} shards for {part[1]} processes; make more of them (--shards), "
                "or let every process hold all"
            )
        raise CheckpointError(f"no shards in {folder}; make them with: python -m train cache --out {folder}")
    fingerprint = vae_fingerprint(vae)
    shards = [
        _read(folder / name, lambda file, name=name: _head(folder / name, file, fingerprint))
        for name in names
    ]
    variants = {shard.variants for shard in shards}
    if len(variants) > 1:
        raise CheckpointError(
            f"the shards in {folder} hold different numbers of variants: {sorted(variants)}; "
            "make them again with one --variants"
        )
    if place == "disk":
        return MappedCache(folder, shards, device)
    memory = device if place == "device" else torch.device("cpu")
    # Sized first, then filled, so that the memory never holds two copies.
    whole = _read(
        folder / names[0],
        lambda file: {
            key: _empty(file, key, sum(s.objects * s.variants for s in shards), memory) for key in KEYS
        },
    )
    start = 0
    for shard in shards:
        count = shard.objects * shard.variants

        def fill(file: Any, start: int = start, count: int = count) -> None:
            for key in KEYS:
                whole[key][start : start + count] = file.get_tensor(key)

        _read(folder / shard.name, fill)
        start += count
    return LatentCache(**whole, objects=sum(s.objects for s in shards), shards=names, target=device)


def _read(path: Path, what: Callable[[Any], T]) -> T:
    """`what` of an open shard; a damaged one is told."""
    try:
        with safe_open(path, "pt", device="cpu") as file:
            return what(file)
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise CheckpointError(f"{path} is damaged ({error}); make the cache again") from error


def _head(path: Path, file: Any, fingerprint: str) -> Shard:
    meta = file.metadata()
    if meta["vae"] != fingerprint:
        raise CheckpointError(
            f"{path} was encoded by another autoencoder; give its --vae, or make the cache again"
        )
    shard = Shard(path.name, len(json.loads(meta["objects"])), int(meta["variants"]))
    for key in KEYS:
        rows = file.get_slice(key).get_shape()[0]
        if rows != shard.objects * shard.variants:
            raise RuntimeError(f"{key} has {rows} rows for {shard.objects} objects of {shard.variants}")
    return shard


def _empty(file: Any, key: str, rows: int, device: torch.device) -> Tensor:
    first = file.get_slice(key)[:1]
    return torch.empty(rows, *first.shape[1:], dtype=first.dtype, device=device)


def cache_bytes(folder: Path, part: tuple[int, int] = WHOLE) -> int:
    """About what the shards of a folder take in memory."""
    return sum((folder / name).stat().st_size for name in shard_names(folder, part))


def reload_cache(
    folder: Path,
    vae: Vae,
    device: torch.device,
    place: str = "device",
    part: tuple[int, int] = WHOLE,
    *,
    attempts: int = 10,
    wait_s: float = 1.0,
) -> Cache:
    """`load_cache` of a folder whose shards come and go: tried again if one went while it was read.

    Raises:
        CheckpointError: as `load_cache`, or all attempts met a shard that went.
    """
    for _ in range(attempts):
        try:
            return load_cache(folder, vae, device, place, part)
        except FileNotFoundError:
            time.sleep(wait_s)
    raise CheckpointError(f"shards in {folder} go faster than they can be read; keep more sets of them")


def shares(objects: list[Path], count: int) -> Iterator[list[Path]]:
    """Objects dealt out to `count` processes, so that each gets its share of every family."""
    for index in range(count):
        yield objects[index::count]
