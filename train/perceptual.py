"""Metrics that are networks of others: LPIPS, FID and CLIP score, computed only with weights given as files.

Nothing is downloaded and nothing is unpickled: weights are safetensors, or a state dict of tensors alone.
The networks are those of torchmetrics, torch-fidelity and transformers (`pip install '.[metrics]'`).
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.errors import UsageError

if TYPE_CHECKING:
    import torch

ByteArray = NDArray[np.uint8]
ImageMetric = Callable[[NDArray[np.floating], NDArray[np.floating]], float]
"""Mean over images (V, H, W, 3) in [0, 1] of a distance to the true ones."""

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


def sha256_of(path: Path) -> str:
    """Of a file of weights."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error}); give a file of weights") from error


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """A file's tensors by name; safetensors, or what `torch.save` wrote of a plain state dict.

    Raises:
        UsageError: the file is unreadable, or holds more than tensors.
    """
    import pickle

    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        first = str(error).partition("\n")[0]
        raise UsageError(
            f"{path} holds no plain state dict ({first}); give weights as safetensors"
        ) from error
    except Exception as error:  # safetensors has an error of its own that is no child of these
        raise UsageError(f"{path} cannot be read as weights ({error})") from error
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
        raise UsageError(f"{path} does not fit torchvision's AlexNet or VGG-16 ({error})") from error
    net = net.to(device).eval()

    def mean_distance(image: NDArray[np.floating], truth: NDArray[np.floating]) -> float:
        a, b = (
            torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2), np.float32)).to(device)
            for x in (image, truth)
        )
        with torch.no_grad():
            return float(net(a, b, normalize=True).mean())

    return mean_distance


def frechet_distance(
    path: Path, device: str = "cpu"
) -> Callable[[Sequence[ByteArray], Sequence[ByteArray]], float]:
    """FID (Heusel et al. 2017) between two sets of images (H, W, 3), each of two or more.

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
            first = str(error).partition("\n")[0]
            raise UsageError(f"{path} does not fit torch-fidelity's InceptionV3 ({first})") from error
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


def clip_score(
    folder: Path, device: str = "cpu"
) -> Callable[[Sequence[ByteArray], Sequence[str]], list[float]]:
    """Cosine of each image (H, W, 3) with its text, by a local CLIP (Radford et al. 2021).

    Raises:
        UsageError: transformers is not there, or the folder holds no such model.
    """
    with _installed():
        import torch
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel
    local: dict[str, Any] = {"local_files_only": True}
    try:
        model = CLIPModel.from_pretrained(folder, use_safetensors=True, **local).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        processor = AutoImageProcessor.from_pretrained(folder, use_fast=False, **local)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).partition("\n")[0]
        raise UsageError(
            f"{folder} is no folder of a CLIPModel with safetensors weights ({first})"
        ) from error

    def cosines(images: Sequence[ByteArray], texts: Sequence[str]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(images), _BATCH):
            pixels = processor(list(images[start : start + _BATCH]), return_tensors="pt")
            words = tokenizer(
                list(texts[start : start + _BATCH]), padding=True, truncation=True, return_tensors="pt"
            )
            with torch.no_grad():
                told = model(**words.to(device), pixel_values=pixels["pixel_values"].to(device))
            a, b = (x / x.norm(dim=-1, keepdim=True) for x in (told.image_embeds, told.text_embeds))
            found += (a * b).sum(dim=-1).tolist()
        return found

    return cosines


@contextmanager
def _installed() -> Iterator[None]:
    """Tell a library that is missing, or does not fit torch, with its mend."""
    try:
        yield
    except (ImportError, RuntimeError) as error:  # torchvision of another torch raises the latter
        raise UsageError(f"{error}; {INSTALL}") from error
