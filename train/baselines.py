"""What a model must beat, and what it cannot exceed: the other rows of `python -m train evaluate`.

- the input copied six times;
- the training object whose picture looks most alike;
- the true views through the bundle's own autoencoder (the ceiling of the images).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from train.augment import normalizing_placement, tight_window, yaw_matrix
from train.objects import Material, Object, load_object
from train.render import Scene, View
from train.truth import EvalSample
from uc3d_rt.errors import UsageError
from uc3d_rt.preprocess import frame_object
from uc3d_rt.views import (
    NUM_VIEWS,
    TARGET_CAMERAS,
    Camera,
    decode_normals,
    decode_views,
    encode_normals,
    pixel_grid,
)

if TYPE_CHECKING:
    import trimesh

ByteArray = NDArray[np.uint8]
FloatArray = NDArray[np.float32]
ViewPair = tuple[FloatArray, FloatArray]
"""Colour (6, H, W, 3) in [0, 1] and unit normals (6, H, W, 3), zero background."""
CallNetwork = Callable[..., dict[str, FloatArray]]
"""One network of a bundle, as `uc3d_rt.backends` opens it."""

INDEX_YAWS_DEG: tuple[float, ...] = tuple(45.0 * k for k in range(8))
"""A training object is looked up by its picture from each of these sides."""

INDEX_ELEVATION_DEG = 10.0  # the middle of the input views' range
TURNTABLE_DEG = (0.0, 90.0, 180.0, 270.0)
_CHUNK = 4  # images a call; bounds the memory of the autoencoder


def placed(obj: Object, object_to_world: FloatArray) -> Object:
    """The object with its vertices where a (3, 4) placement puts them."""
    vertices = obj.vertices @ object_to_world[:, :3].T + object_to_world[:, 3]
    return replace(obj, vertices=vertices.astype(np.float32))


def as_object(mesh: Any) -> Object:
    """A fitted `trimesh.Trimesh` for the renderer, where it stands."""
    uv = getattr(mesh.visual, "uv", None)
    texture, material = None, Material()
    if uv is not None:
        texture = np.asarray(mesh.visual.material.baseColorTexture.convert("RGB"))
        material = Material(tile=(0, 0, texture.shape[1], texture.shape[0]), repeat=(False, False))
    return Object(
        name="mesh",
        vertices=np.asarray(mesh.vertices, np.float32),
        faces=np.asarray(mesh.faces, np.int32),
        uv=None if uv is None else np.asarray(uv, np.float32),
        texture=texture,
        vertex_color=None,
        face_material=np.zeros(len(mesh.faces), np.int32),
        materials=(material,),
    )


def turntable(thing: Object, px: int) -> ByteArray:
    """Four sides, colour over normals, and one larger view from above: (2 px, 6 px, 3) bytes."""
    with Scene(thing) as scene:
        sides = scene.render([View(Camera(azimuth, 15.0)) for azimuth in TURNTABLE_DEG], px)
        above = scene.render([View(Camera(35.0, 35.0))], 2 * px)
    rows = [np.concatenate(list(images), axis=1) for images in (sides.color, sides.normal)]
    return np.concatenate([np.concatenate(rows), above.color[0]], axis=1)


def copied_input(obj: Object, sample: EvalSample, image_px: int) -> ViewPair:
    """The framed input as each of the six views, with its true normals in the world frame."""
    camera = Camera(0.0, sample.elevation_deg, sample.focal_mm)
    window = tight_window(obj.vertices, sample.object_to_world, camera, fill=0.9)
    size_px = sample.input_rgba.shape[0]
    with Scene(obj) as scene:
        images = scene.render([View(camera, sample.object_to_world, window=window)], size_px, samples=3)
    alpha = images.alpha[0, ..., None]
    on_white = frame_object(np.concatenate([images.normal[0], alpha], axis=-1), image_px) / 255.0
    black = np.concatenate([np.zeros_like(images.normal[0]), alpha], axis=-1)
    cover = 1.0 - frame_object(black, image_px)[..., :1] / 255.0  # black on white shows the coverage
    normal, _ = decode_normals(1.0 - (1.0 - on_white) / np.maximum(cover, 1e-3))
    normal = np.where(cover > min(0.5, cover.max() / 2), normal, np.float32(0.0))
    color = frame_object(sample.input_rgba, image_px).astype(np.float32) / np.float32(255.0)
    return np.stack([color] * NUM_VIEWS), np.stack([normal] * NUM_VIEWS)


def ellipsoid_of(mask: NDArray[np.bool_]) -> trimesh.Trimesh:
    """The ellipsoid as wide and high as a silhouette (H, W), and as deep as wide.

    Stands in where six views contradict each other so that no surface can be fitted.
    """
    import trimesh

    u, v = pixel_grid(mask.shape[0])
    half_pixel = 1.0 / mask.shape[0]
    mesh: trimesh.Trimesh = trimesh.creation.icosphere(subdivisions=4)
    half_u, half_v = ((axis[mask].max() - axis[mask].min()) / 2 + half_pixel for axis in (u, v))
    mesh.apply_scale([half_u, half_v, half_u])
    mesh.apply_translation([0.0, (v[mask].max() + v[mask].min()) / 2, 0.0])
    return mesh


def autoencoded(encode: CallNetwork, decode: CallNetwork, color: FloatArray, normal: FloatArray) -> ViewPair:
    """Views through the bundle's autoencoder, then read as the runtime reads what it decodes."""
    images = np.concatenate([color, encode_normals(normal)]).transpose(0, 3, 1, 2)
    parts = []
    for start in range(0, len(images), _CHUNK):
        chunk = np.ascontiguousarray(images[start : start + _CHUNK], np.float32)
        parts.append(decode(latent=encode(image=chunk)["latent"])["image"])
    decoded = np.clip(np.concatenate(parts), 0.0, 1.0).transpose(0, 2, 3, 1)
    read, units, _ = decode_views(decoded[: len(color)], decoded[len(color) :])
    return read, units


@dataclass(frozen=True, eq=False)
class Neighbour:
    """A training object, turned as the picture shows it."""

    path: Path
    yaw_deg: float
    similarity: float  # cosine, 1 = the same picture
    views: ViewPair
    object: Object  # in the world frame


@dataclass(frozen=True, eq=False)
class TrainIndex:
    """Features of the training objects' pictures."""

    files: tuple[str, ...]  # relative to the training folder
    features: FloatArray  # (files, yaws, D), unit length

    def neighbour(self, folder: Path, feature: FloatArray, image_px: int) -> Neighbour:
        """The training object whose picture is most like the one with this feature (D,)."""
        similarity = self.features @ feature
        best, turn = np.unravel_index(int(similarity.argmax()), similarity.shape)
        path, yaw = folder / self.files[best], INDEX_YAWS_DEG[turn]
        obj = load_object(path)
        placement = normalizing_placement(obj.vertices, yaw_matrix(yaw))
        with Scene(obj) as scene:
            images = scene.render([View(camera, placement) for camera in TARGET_CAMERAS], image_px, 3)
        normal, _ = decode_normals(images.normal / 255.0)
        views = (images.color.astype(np.float32) / np.float32(255.0), normal)
        return Neighbour(path, yaw, float(similarity[best, turn]), views, placed(obj, placement))


def image_features(encode: CallNetwork, pictures: Sequence[ByteArray]) -> FloatArray:
    """Mean image token, made unit length (N, D), of framed pictures (H, W, 3)."""
    rows = []
    for picture in pictures:
        image = picture.astype(np.float32).transpose(2, 0, 1)[None] / np.float32(255.0)
        rows.append(encode(image=np.ascontiguousarray(image))["tokens"][0].mean(axis=0))
    tokens = np.stack(rows)
    length = np.linalg.norm(tokens, axis=-1, keepdims=True)
    return np.asarray(tokens / np.maximum(length, 1e-12), np.float32)


def index_features(path: Path, encode: CallNetwork, image_px: int) -> FloatArray:
    """Features (yaws, D) of one training object."""
    obj = load_object(path)
    camera = Camera(0.0, INDEX_ELEVATION_DEG)
    views = []
    for yaw in INDEX_YAWS_DEG:
        placement = normalizing_placement(obj.vertices, yaw_matrix(yaw))
        window = tight_window(obj.vertices, placement, camera, fill=0.95)
        views.append(View(camera, placement, window=window))
    with Scene(obj) as scene:
        images = scene.render(views, image_px, straight_alpha=True)
    rgba = np.concatenate([images.color, images.alpha[..., None]], axis=-1)
    white = np.full((image_px, image_px, 3), 255, np.uint8)  # a sheet that stands edge-on
    pictures = [frame_object(p, image_px) if (p[..., 3] > 127).any() else white for p in rgba]
    return image_features(encode, pictures)


def train_index(
    cache: Path,
    folder: Path,
    files: Sequence[Path],
    encoder_sha256: str,
    compute: Callable[[Sequence[Path]], Iterable[FloatArray]],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> TrainIndex:
    """The index of a training folder: what `cache` (.npz) holds of it, and the rest computed.

    Args:
        cache: read if it was made with the same image encoder; written as the work goes on.
        folder: the training folder.
        files: its object files.
        encoder_sha256: of the image encoder's file.
        compute: features (yaws, D) of each file, in order.
        on_progress: called with (objects done, objects in all).

    Raises:
        UsageError: `cache` is some other file.
    """
    known: dict[str, FloatArray] = {}
    if cache.is_file():
        try:
            # NumPy leaves a damaged file open that it opened itself.
            with cache.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
                if str(stored["encoder"]) == encoder_sha256:
                    known = dict(zip(stored["files"].tolist(), stored["features"], strict=True))
        except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, BadZipFile) as error:
            raise UsageError(
                f"{cache} is no index of training objects ({error}); remove it, or give another --index"
            ) from error
    names = [path.relative_to(folder).as_posix() for path in files]
    missing = [path for path, name in zip(files, names, strict=True) if name not in known]
    for done, (path, features) in enumerate(zip(missing, compute(missing), strict=True), start=1):
        known[path.relative_to(folder).as_posix()] = features
        if done % 200 == 0 or done == len(missing):
            _store_index(cache, known, encoder_sha256)
        on_progress(len(files) - len(missing) + done, len(files))
    return TrainIndex(tuple(names), np.stack([known[name] for name in names]))


def _store_index(cache: Path, known: dict[str, FloatArray], encoder_sha256: str) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_name(f".{cache.name}.{os.getpid()}.tmp.npz")
    np.savez(
        temporary,
        encoder=encoder_sha256,
        files=np.array(list(known)),
        features=np.stack(list(known.values())),
    )
    os.replace(temporary, cache)
