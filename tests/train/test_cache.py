"""The latent cache: what a shard holds, what a batch draws from it, and which shards it refuses."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from train.cache import (
    PLACES,
    LatentCache,
    MappedCache,
    build_shard,
    cache_bytes,
    load_cache,
    shares,
    vae_fingerprint,
)
from train.checkpoint import CheckpointError
from train.dataset import render_folder
from train.objects import find_objects
from train.presets import TOY
from train.vae import Vae

CPU = torch.device("cpu")
OBJECTS, VARIANTS, INPUTS = 3, 2, 2


@pytest.fixture(scope="module")
def vae() -> Vae:
    torch.manual_seed(0)
    return Vae(TOY.vae).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("objects")
    for k in range(OBJECTS):
        mesh = trimesh.creation.box([1.0, 0.5 + 0.2 * k, 0.7])
        mesh.visual.vertex_colors = np.tile(np.uint8([200, 80 * k, 40, 255]), (len(mesh.vertices), 1))
        mesh.export(folder / f"{k}.ply")
    return find_objects(folder)


def build(out: Path, objects: list[Path], vae: Vae, variants: int = VARIANTS) -> None:
    build_shard(out, objects, vae, device="cpu", variants=variants, inputs=INPUTS, seed=3, workers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, objects: list[Path], vae: Vae) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    for index, share in enumerate(shares(objects, 2)):
        build(folder / f"shard-{index:03d}.safetensors", share, vae)
    return folder


def test_shard_holds_the_encoded_renders(folder: Path, objects: list[Path], vae: Vae) -> None:
    shard = load_file(folder / "shard-000.safetensors")
    share = objects[0::2]
    for index, variant, item in render_folder(share, "cpu", VARIANTS, INPUTS, 3, 1, image_px=32):
        row = index * VARIANTS + variant
        assert torch.equal(shard["image"][row], item.inputs)
        for half, pictures in ((slice(0, 4), item.color), (slice(4, 8), item.normal)):
            truth = vae.encode(pictures.permute(0, 3, 1, 2).float() / 255.0)
            torch.testing.assert_close(shard["z_0"][row, :, half].float(), truth, atol=2e-3, rtol=2e-3)
        truth = vae.encode(item.inputs.permute(0, 3, 1, 2).float() / 255.0)
        torch.testing.assert_close(shard["image_latent"][row].float(), truth, atol=2e-3, rtol=2e-3)
        assert np.array_equal(shard["focal"][row], item.focal)
    assert [path.suffix for path in folder.iterdir()] == [".safetensors"] * 2


def test_shares_are_disjoint_and_whole(objects: list[Path]) -> None:
    parts = list(shares(objects, 2))
    assert sorted(sum(parts, [])) == objects and not set(parts[0]) & set(parts[1])


def test_a_batch_shows_different_objects(folder: Path, vae: Vae) -> None:
    cache = load_cache(folder, vae, CPU)
    assert cache.objects == OBJECTS and cache.z_0.shape == (OBJECTS * VARIANTS, 6, 8, 8, 8)
    seen = set()
    for seed in range(20):
        batch = cache.draw(OBJECTS, torch.Generator().manual_seed(seed))
        rows = [_row(cache, z_0) for z_0 in batch.z_0]
        assert {row // VARIANTS for row in rows} == {0, 1, 2}
        seen.update(rows)
        for k, row in enumerate(rows):  # image, E(y) and f~ are of one input view of that variant
            views = [
                view
                for view in range(INPUTS)
                if torch.equal(batch.image[k], cache.image[row, view].permute(2, 0, 1) / 255.0)
                and torch.equal(batch.image_latent[k], cache.image_latent[row, view].float())
                and batch.focal[k] == cache.focal[row, view]
            ]
            assert views
    assert seen == set(range(OBJECTS * VARIANTS))


def _row(cache: LatentCache, z_0: torch.Tensor) -> int:
    (row,) = [row for row in range(len(cache.z_0)) if torch.equal(cache.z_0[row].float(), z_0)]
    return row


def test_a_batch_may_be_larger_than_the_cache(folder: Path, vae: Vae) -> None:
    batch = load_cache(folder, vae, CPU).draw(5, torch.Generator().manual_seed(0))
    assert batch.z_0.shape[0] == batch.image.shape[0] == 5


def test_refused_folders(folder: Path, tmp_path: Path, vae: Vae) -> None:
    with pytest.raises(CheckpointError, match="no shards in .*python -m train cache"):
        load_cache(tmp_path, vae, CPU)
    with pytest.raises(CheckpointError, match="shard-000.*another autoencoder"):
        load_cache(folder, Vae(TOY.vae), CPU)
    shard = folder / "shard-000.safetensors"
    with safe_open(shard, "pt") as file:
        meta = file.metadata()
    (tmp_path / shard.name).write_bytes(shard.read_bytes())
    twice = {key: torch.cat([value, value]) for key, value in load_file(shard).items()}
    save_file(twice, tmp_path / "shard-001.safetensors", meta | {"variants": "4"})
    with pytest.raises(CheckpointError, match=r"different numbers of variants: \[2, 4\]"):
        load_cache(tmp_path, vae, CPU)
    (tmp_path / "shard-001.safetensors").write_bytes(shard.read_bytes()[:999])
    with pytest.raises(CheckpointError, match="shard-001.safetensors is damaged"):
        load_cache(tmp_path, vae, CPU)
    save_file({"z_0": torch.zeros(1)}, tmp_path / "shard-001.safetensors")
    with pytest.raises(CheckpointError, match="shard-001.safetensors is damaged"):
        load_cache(tmp_path, vae, CPU)


def test_fingerprint_tells_autoencoders_apart(vae: Vae) -> None:
    other = Vae(TOY.vae)
    other.load_state_dict(vae.state_dict())
    assert vae_fingerprint(other) == vae_fingerprint(vae)
    other.latent_scale.mul_(1.001)
    assert vae_fingerprint(other) != vae_fingerprint(vae)


def test_draws_are_the_same_wherever_the_cache_lies(folder: Path, vae: Vae) -> None:
    caches = [load_cache(folder, vae, CPU, place) for place in PLACES]
    assert isinstance(caches[2], MappedCache) and {cache.variants for cache in caches} == {6}
    assert {cache.objects for cache in caches} == {OBJECTS} and len({cache.shards for cache in caches}) == 1
    seen = set()
    for seed, count in enumerate([1, 2, 3, 3, 5]):
        batches = [asdict(c.draw(count, torch.Generator().manual_seed(seed))) for c in caches]
        for key, value in batches[0].items():
            assert value.dtype == torch.float32 and len(value) == count
            assert all(torch.equal(value, other[key]) for other in batches[1:]), key
        seen |= {float(row.sum()) for row in batches[0]["z_0"]}
    assert len(seen) >= 5  # rows of both shards
    with pytest.raises(ValueError, match="lies in device, host, disk, not in 'tape'"):
        load_cache(folder, vae, CPU, "tape")


@pytest.mark.parametrize("place", PLACES)
def test_processes_share_the_shards_out(folder: Path, vae: Vae, place: str) -> None:
    parts = [load_cache(folder, vae, CPU, place, (index, 2)) for index in range(2)]
    assert [part.shards for part in parts] == [("shard-000.safetensors",), ("shard-001.safetensors",)]
    assert [part.objects for part in parts] == [2, 1]
    whole = load_cache(folder, vae, CPU)
    batch = parts[1].draw(9, torch.Generator().manual_seed(0))
    assert {_row(whole, z_0) for z_0 in batch.z_0} == {4, 5}  # the variants of the second shard, none else
    assert cache_bytes(folder, (0, 2)) + cache_bytes(folder, (1, 2)) == cache_bytes(folder)
    with pytest.raises(CheckpointError, match="holds 2 shards for 3 processes; make more of them"):
        load_cache(folder, vae, CPU, place, (2, 3))


def test_a_mapped_cache_refuses_the_same_shards(folder: Path, vae: Vae, tmp_path: Path) -> None:
    shard = folder / "shard-000.safetensors"
    (tmp_path / shard.name).write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_cache(tmp_path, vae, CPU, "disk")
    with safe_open(shard, "pt") as file:
        meta = file.metadata()
    save_file(load_file(shard), tmp_path / shard.name, meta | {"variants": "1"})
    with pytest.raises(CheckpointError, match="4 rows for 2 objects of 1"):
        load_cache(tmp_path, vae, CPU, "disk")


def test_a_mapped_cache_is_given_back(folder: Path, vae: Vae) -> None:
    cache = load_cache(folder, vae, CPU, "disk")
    cache.free()
    with pytest.raises(IndexError):
        cache.draw(2, torch.Generator())
