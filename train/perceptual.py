"""Metrics that are networks of others: LPIPS, FID and CLIP score, computed only with weights given as files.

Nothing is downloaded and nothing is unpickled: weights are safetensors, or a state dict of tensors alone.
The networks are those of torchmetrics, torch-fidelity and transformers (`pip install '.[metrics]'`).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from uc3d_rt.contract import sha256_of
from uc3d_rt.errors import UsageError

if TYPE_CHECKING:
    import torch

ByteArray = NDArray[np.uint8]
ImageMetric = Callable[[NDArray[np.floating], NDArray[np.floating]], float]
"""Mean over images (V, H, W, 3) in [0, 1] of a distance to the true ones."""

SetMetric = Callable[[Sequence[ByteArray], Sequence[ByteArray]], float]
"""Distance between two sets of images (H, W, 3), the made ones first."""

TextMetric = Callable[[Sequence[ByteArray], Sequence[str]], list[float]]
"""Likeness of each image (H, W, 3) with its text."""

INSTALL = "run: pip install '.[metrics]' (with a torchvision made for the torch that is installed)"

MENDS: dict[str, str] = {
    "lpips": "its backbone does not ship; give torchvision's AlexNet or VGG-16 weights with --lpips-weights",
    "fid": "its Inception does not ship; give torch-fidelity's weights with --fid-weights",
    "clip": "CLIP does not ship; give a folder of a transformers CLIPModel with --clip",
}
TITLES: dict[str, str] = {"lpips": "LPIPS", "fid": "FID", "clip": "CLIP score"}

_BATCH = 32  # images a call


@dataclass(frozen=True)
class Weights:
    """Where the weights of others lie; None: that metric is left out."""

    lpips: Path | None = None  # a state dict of torchvision's AlexNet or VGG-16
    fid: Path | None = None  # a state dict of torch-fidelity's InceptionV3
    clip: Path | None = None  # a folder, as transformers saves a CLIPModel and its processor

    def left_out(self, wanted: Sequence[str]) -> dict[str, str]:
        """Metrics of `wanted` without weights, with the mend of each."""
        return {name: MENDS[name] for name in wanted if getattr(self, name) is None}

    def digests(self, wanted: Sequence[str]) -> dict[str, str | None]:
        """SHA-256 of the weights of each metric of `wanted`; None where there are none."""
        paths: dict[str, Path | None] = {name: getattr(self, name) for name in wanted}
        return {name: None if path is None else digest_of_weights(path) for name, path in paths.items()}


def digest_of_weights(path: Path) -> str:
    """SHA-256 of a file; of a folder, that of the digests of its safetensors files, by name."""
    if path.is_dir():
        digests = "".join(digest_of_weights(file) for file in sorted(path.glob("*.safetensors")))
        return hashlib.sha256(digests.encode()).hexdigest()
    try:
        return sha256_of(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error}); give a file of weights") from error


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """A file's tensors by name; safetensors, or what `torch.save` wrote of a plain state dict.

    Raises:
        UsageError: the file is unreadable, or holds more than tensors.
    """
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the unpickler of tensors raise anything
        raise UsageError(
            f"{path} holds no plain state dict ({first_line(error)}); give weights as safetensors"
        ) from error
    if not isinstance(held, dict) or not all(isinstance(value, torch.Tensor) for value in held.values()):
        raise UsageError(f"{path} holds more than tensors by name; save its state dict alone")
    return held


def lpips_metric(path: Path, device: str = "cpu") -> ImageMetric:
    """LPIPS (Zhang et al. 2018) on a backbone from a file; its linear layers come with torchmetrics.

    Raises:
        UsageError: the libraries are not there, or the file holds no such backbone.
    """
    given = tensors_of(path)
    first = given.get("features.0.weight")
    if first is None or first.ndim != 4:
        raise UsageError(f"{path} has no features.0.weight; give torchvision's AlexNet or VGG-16 weights")
    with _installed():
        import torch

        # The public class downloads its backbone; this is what it is made of.
        from torchmetrics.functional.image.lpips import _LPIPS

        net = _LPIPS(net="alex" if first.shape[-1] == 11 else "vgg", pnet_rand=True)
    # Its backbone is torchvision's cut in slices: "slice2.3.weight" was "features.3.weight".
    names = {name: f"features.{name.partition('.')[2]}" for name in net.net.state_dict()}
    try:
        net.net.load_state_dict({name: given[source] for name, source in names.items()})
    except (KeyError, RuntimeError) as error:
        raise UsageError(
            f"{path} does not fit torchvision's AlexNet or VGG-16 ({first_line(error)}); give their weights"
        ) from error
    net = net.to(device).eval()

    def mean_distance(image: NDArray[np.floating], truth: NDArray[np.floating]) -> float:
        a, b = (
            torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2), np.float32)).to(device)
            for x in (image, truth)
        )
        with torch.no_grad():
            return float(net(a, b, normalize=True).mean())

    return mean_distance


def frechet_distance(path: Path, device: str = "cpu") -> SetMetric:
    """FID (Heusel et al. 2017) between two sets of images, each of two or more.

    Raises:
        UsageError: the libraries are not there, or the weights do not fit.
    """
    given = tensors_of(path)
    with _installed():
        import torch
        from torchmetrics.image.fid import FrechetInceptionDistance
    with tempfile.TemporaryDirectory() as folder:
        # torch-fidelity unpickles whatever its file holds; it gets one that was written here.
        checked = Path(folder) / "inception.pth"
        torch.save(given, checked)
        try:
            metric = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(checked))
        except RuntimeError as error:
            raise UsageError(
                f"{path} does not fit torch-fidelity's InceptionV3 ({first_line(error)}); give its weights"
            ) from error
        except ModuleNotFoundError as error:
            raise UsageError(f"{error}; {INSTALL}") from error
    metric = metric.to(device)

    def distance(images: Sequence[ByteArray], truth: Sequence[ByteArray]) -> float:
        metric.reset()
        for pictures, real in ((truth, True), (images, False)):
            for start in range(0, len(pictures), _BATCH):
                batch = np.stack(pictures[start : start + _BATCH]).transpose(0, 3, 1, 2)
                metric.update(torch.from_numpy(np.ascontiguousarray(batch)).to(device), real=real)
        return float(metric.compute())

    return distance


def clip_score(folder: Path, device: str = "cpu") -> TextMetric:
    """Cosine of each square image with its text, by a local CLIP (Radford et al. 2021).

    Raises:
        UsageError: transformers is not there, or the folder holds no such model.
    """
    with _installed():
        import torch
        from safetensors import SafetensorError
        from transformers import AutoTokenizer, CLIPModel
    local: dict[str, Any] = {"local_files_only": True}
    try:
        # Without it the library would take the sizes of a usual one.
        if not (folder / "config.json").is_file():
            raise FileNotFoundError("config.json is missing")
        told = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
        mean, std = (np.array(told[name], np.float32) for name in ("image_mean", "image_std"))
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        model, found = CLIPModel.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **local
        )
        # The library would fill what is missing with random numbers.
        if found["missing_keys"]:
            raise ValueError(f"no weights of {min(found['missing_keys'])}")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UsageError(
            f"{folder} is no whole CLIPModel ({first_line(error)}); give a folder with config.json, "
            "model.safetensors, preprocessor_config.json and the tokenizer's files"
        ) from error
    model = model.to(device).eval()
    side = int(model.config.vision_config.image_size)

    def pixels(images: Sequence[ByteArray]) -> torch.Tensor:
        # As the processor of such a folder, which crops nothing of a square; it needs torchvision.
        small = [Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC) for image in images]
        unit = np.stack([np.asarray(image, np.float32) for image in small]) / np.float32(255.0)
        return torch.from_numpy(((unit - mean) / std).transpose(0, 3, 1, 2)).to(device)

    def cosines(images: Sequence[ByteArray], texts: Sequence[str]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(images), _BATCH):
            words = tokenizer(
                list(texts[start : start + _BATCH]), padding=True, truncation=True, return_tensors="pt"
            )
            with torch.no_grad():
                made = model(**words.to(device), pixel_values=pixels(images[start : start + _BATCH]))
            a, b = (x / x.norm(dim=-1, keepdim=True) for x in (made.image_embeds, made.text_embeds))
            found += (a * b).sum(dim=-1).tolist()
        return found

    return cosines


@contextmanager
def _installed() -> Iterator[None]:
    """Tell a library that is missing, or does not fit torch, with its mend."""
    try:
        yield
    except (ImportError, RuntimeError) as error:  # torchvision of another torch raises the latter
        raise UsageError(f"{first_line(error)}; {INSTALL}") from error


def first_line(error: Exception) -> str:
    """Of what an error says; libraries append whole lists of names."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
