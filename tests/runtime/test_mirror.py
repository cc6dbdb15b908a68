"""Mirror images of views, against rays traced through the mirrored shape; and their part in sampling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import object_rgba
from tests.runtime.analytic import Shape, asymmetric, six_views
from uc3d_rt.backends.base import Backend, Network
from uc3d_rt.backends.onnxruntime import OnnxRuntimeBackend
from uc3d_rt.contract import Manifest, load_manifest
from uc3d_rt.mirror import mirrored_latents, mirrored_pairs
from uc3d_rt.pipeline import Pipeline
from uc3d_rt.sampler import alpha_bars
from uc3d_rt.views import encode_normals

ACROSS = np.array([-1.0, 1.0, 1.0])


def mirrored(shape: Shape) -> Shape:
    """The shape on the other side of x = 0: rays are mirrored instead."""

    def trace(origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        t, normals = shape(origins * ACROSS, directions * ACROSS)
        return t, normals * ACROSS

    return trace


def tint(points: np.ndarray) -> np.ndarray:
    return 0.5 + 0.4 * np.sin(points * np.array([7.0, 9.0, 8.0], np.float32))


def planes(shape: Shape, paint: object) -> tuple[np.ndarray, np.ndarray]:
    color, normal = six_views(shape, 48, paint)
    return color.transpose(0, 3, 1, 2), encode_normals(normal).transpose(0, 3, 1, 2)


def test_mirrored_views_are_those_of_the_mirrored_object() -> None:
    own = planes(asymmetric(), tint)
    other = planes(mirrored(asymmetric()), lambda points: tint(points * ACROSS.astype(np.float32)))
    assert min(np.abs(a - b).max() for a, b in zip(own, other, strict=True)) > 0.3
    for found, wanted in zip(mirrored_pairs(*own), other, strict=True):
        assert (np.abs(found - wanted) > 1e-4).mean() < 1e-4  # rays along an edge go either side
    # Of two objects each is mirrored for itself, and twice is not at all.
    both = mirrored_pairs(*(np.concatenate(pair) for pair in zip(own, other, strict=True)))
    for found, a, b in zip(both, other, own, strict=True):
        assert (np.abs(found - np.concatenate([a, b])) > 1e-4).mean() < 1e-4


def test_latents_go_through_their_images() -> None:
    """An autoencoder that turns pixels upside down and scales them has the mirrored views back."""
    color, normal = planes(asymmetric(), tint)

    def encode(images: np.ndarray) -> np.ndarray:
        return 3.0 * images[:, :, ::-1] - 1.0

    def decode(latents: np.ndarray) -> np.ndarray:
        return (latents[:, :, ::-1] + 1.0) / 3.0

    z_0 = np.concatenate([encode(color), encode(normal)], axis=1)
    found = mirrored_latents(z_0, decode, encode)
    wanted = np.concatenate([encode(part) for part in mirrored_pairs(color, normal)], axis=1)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


class Overheard(Backend):
    """A backend whose calls are noted, and of which one network is open at a time."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.calls: list[tuple[str, dict[str, np.ndarray]]] = []
        self.loaded: list[str] = []

    def open(self, bundle: Path, manifest: Manifest, name: str) -> Network:
        assert not self.loaded, f"{self.loaded} still open when {name} is"
        opened, calls, loaded = self.backend.open(bundle, manifest, name), self.calls, self.loaded
        loaded.append(name)

        class Heard(Network):
            def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
                calls.append((name, inputs))
                return opened(**inputs)

            def close(self) -> None:
                loaded.remove(name)
                opened.close()

        return Heard()


@pytest.mark.parametrize("steps, guidance", [(4, 1.0), (3, 2.0), (1, 2.0)])
def test_the_first_step_is_the_mean_with_that_of_the_mirror_image(
    tiny_bundle: Path, steps: int, guidance: float
) -> None:
    """Sampled once more with the bundle's networks, step by step, in float64."""
    manifest = load_manifest(tiny_bundle)
    backend = OnnxRuntimeBackend("cpu", 1)
    networks = {
        name: backend.open(tiny_bundle, manifest, name) for name in ("image_encoder", "vae_encoder", "unet")
    }
    heard = Overheard(backend)
    found = Pipeline(tiny_bundle, manifest, heard).views(
        object_rgba(), steps=steps, guidance=guidance, noise_scale=0.5, mirror=True, seed=5, focal_mm=0.0
    )
    calls = {name: [call for n, call in heard.calls if n == name] for name in networks}
    picture, image = (call["image"] for call in calls["image_encoder"])
    np.testing.assert_array_equal(image, picture[..., ::-1])
    assert np.abs(image - picture).max() > 0.1

    def answer(of: np.ndarray, z: np.ndarray, t: int) -> np.ndarray:
        tokens, latent = (
            networks["image_encoder"](image=of)["tokens"],
            networks["vae_encoder"](image=of)["latent"],
        )
        parts = [
            networks["unet"](
                sample=z.astype(np.float32), timestep=np.full(1, t, np.float32), tokens=keep * tokens,
                image_latent=keep * latent, focal=np.zeros(1, np.float32),
            )["prediction"].astype(np.float64)
            for keep in (np.float32(1), np.float32(0))
        ]  # fmt: skip
        return parts[1] + guidance * (parts[0] - parts[1])

    shape, alpha_bar = manifest.shape, alpha_bars(manifest.schedule)
    z_T = 0.5 * np.random.default_rng(5).standard_normal((6, 8, 8, 8), dtype=np.float32).astype(np.float64)
    top = manifest.schedule.train_steps - 1
    a = alpha_bar[top]
    own, other = (a**0.5 * z_T - (1 - a) ** 0.5 * answer(of, z_T, top) for of in (picture, image))

    def through(name: str, key: str, values: np.ndarray) -> np.ndarray:
        with backend.open(tiny_bundle, manifest, name) as network:
            return next(iter(network(**{key: values}).values()))

    turned = mirrored_latents(
        other.astype(np.float32),
        lambda latents: through("vae_decoder", "latent", latents).clip(0, 1),
        lambda images: through("vae_encoder", "image", images),
    )
    z_0 = (own + turned) / 2
    times = [call["timestep"][0] for call in calls["unet"]]
    assert len(times) == steps + 1 and times[:2] == [top, top]
    eps = (z_T - a**0.5 * z_0) / (1 - a) ** 0.5
    for t in (int(time) for time in times[2:]):
        z = alpha_bar[t] ** 0.5 * z_0 + (1 - alpha_bar[t]) ** 0.5 * eps
        v = answer(picture, z, t)
        z_0 = alpha_bar[t] ** 0.5 * z - (1 - alpha_bar[t]) ** 0.5 * v
        eps = alpha_bar[t] ** 0.5 * v + (1 - alpha_bar[t]) ** 0.5 * z
    c = shape.latent_channels
    decoded = [call["latent"] for n, call in heard.calls if n == "vae_decoder"][-3:]
    np.testing.assert_allclose(
        np.concatenate(decoded), np.concatenate([z_0[:, :c], z_0[:, c:]]), rtol=1e-4, atol=1e-4
    )
    assert found.color.shape == (6, shape.image_px, shape.image_px, 3)
    for network in networks.values():
        network.close()
