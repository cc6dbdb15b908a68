"""From a picture to its six views: the stages between preprocessing and the fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.backends.base import Network, Sampler
from uc3d_rt.contract import Manifest, SamplingDefaults
from uc3d_rt.mirror import mirrored_latents, mirrored_picture
from uc3d_rt.sampler import Step, after_first_step, sampling_steps
from uc3d_rt.views import decode_views

FloatArray = NDArray[np.float32]
Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Encoded:
    """What the UNet is told of a picture."""

    tokens: FloatArray  # (1, tokens, dim)
    latent: FloatArray  # E(y) (1, c, h, w)


class ViewGenerator:
    """Encodes, diffuses and decodes with networks that it opens as each is needed.

    Args:
        network: opens one of the bundle's by name.
        sampler: opens the UNet with its steps.
        chunk: images or latents that the autoencoder takes a call, where its batch is not fixed.
    """

    def __init__(
        self,
        manifest: Manifest,
        network: Callable[[str], AbstractContextManager[Network]],
        sampler: Callable[[], AbstractContextManager[Sampler]],
        chunk: int,
    ) -> None:
        self._manifest, self._network, self._sampler, self._chunk = manifest, network, sampler, chunk

    def encode(self, image: FloatArray, mirror: bool) -> tuple[Encoded, ...]:
        """The picture (3, H, W), and with `mirror` its mirror image after it."""
        images = [image[None], mirrored_picture(image)[None]] if mirror else [image[None]]
        with self._network("image_encoder") as network:
            tokens = [network(image=one)["tokens"] for one in images]
        with self._network("vae_encoder") as network:
            latents = [network(image=one)["latent"] for one in images]
        return tuple(Encoded(*pair) for pair in zip(tokens, latents, strict=True))

    def diffuse(
        self,
        pictures: Sequence[Encoded],
        focal: float,
        sampling: SamplingDefaults,
        seed: int,
        on_step: Tick,
    ) -> FloatArray:
        """z_0 (6, 2c, h, w): colour and normal latents of the six views.

        Args:
            pictures: of `encode`; a second one shares in the first step.
            focal: `f~`; 0 = orthographic, -1 = unknown.
            on_step: told `(done, all)` after each step.
        """
        shape, schedule = self._manifest.shape, self._manifest.schedule
        noise = np.random.default_rng(seed).standard_normal(
            (shape.views, 2 * shape.latent_channels, shape.latent_px, shape.latent_px), dtype=np.float32
        )
        plan = sampling_steps(schedule, sampling)
        calls = len(plan) + len(pictures) - 1
        done = 0

        def run(sampler: Sampler, picture: Encoded, z_t: FloatArray, steps: Sequence[Step]) -> FloatArray:
            nonlocal done
            before = done
            done += len(steps)
            return sampler(
                picture.tokens,
                picture.latent,
                focal,
                z_t,
                steps,
                guidance=sampling.guidance,
                guidance_rescale=sampling.guidance_rescale,
                on_step=lambda step, _: on_step(before + step, calls),
            )

        z_T = noise * np.float32(sampling.noise_scale)
        if len(pictures) == 1:
            with self._sampler() as sampler:
                return run(sampler, pictures[0], z_T, plan)
        at_once = sampling_steps(schedule, replace(sampling, steps=1))  # from T to z_0
        with self._sampler() as sampler:
            answer, mirrored = (run(sampler, picture, z_T, at_once) for picture in pictures)
        z_0 = (answer + mirrored_latents(mirrored, self._images, self._latents)) / np.float32(2.0)
        if len(plan) == 1:
            return z_0
        z_t = after_first_step(z_0, z_T, schedule, plan)
        with self._sampler() as sampler:
            return run(sampler, pictures[0], z_t, plan[1:])

    def decode(self, z_0: FloatArray, on_image: Tick) -> tuple[FloatArray, FloatArray]:
        """Colour and normal views, each (6, H, W, 3), of z_0 (6, 2c, h, w)."""
        c = self._manifest.shape.latent_channels
        images = self._images(np.concatenate([z_0[:, :c], z_0[:, c:]]), on_image).transpose(0, 2, 3, 1)
        color, normal, _ = decode_views(images[: len(z_0)], images[len(z_0) :])
        return np.ascontiguousarray(color), normal

    def _images(self, latents: FloatArray, on_image: Tick | None = None) -> FloatArray:
        """Images (n, 3, H, W) in [0, 1] of latents (n, c, h, w)."""
        return np.clip(self._in_chunks("vae_decoder", "latent", "image", latents, on_image), 0.0, 1.0)

    def _latents(self, images: FloatArray) -> FloatArray:
        """Latents (n, c, h, w) of images (n, 3, H, W)."""
        return self._in_chunks("vae_encoder", "image", "latent", images)

    def _in_chunks(
        self, name: str, given: str, wanted: str, values: FloatArray, on_part: Tick | None = None
    ) -> FloatArray:
        parts = []
        with self._network(name) as network:
            chunk = network.batch or self._chunk
            for start in range(0, len(values), chunk):
                parts.append(network(**{given: values[start : start + chunk]})[wanted])
                if on_part is not None:
                    on_part(min(start + chunk, len(values)), len(values))
        return np.concatenate(parts)
