"""Metrics that need weights of others: computed with a file of them, left out by name without."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from train.perceptual import Weights, clip_score, frechet_distance, lpips_metric, tensors_of
from uc3d_rt.errors import UsageError


def alexnet(weights: object = None) -> nn.Module:
    """AlexNet's features (Krizhevsky 2014), in torchvision's order."""
    net = nn.Module()
    pool = nn.MaxPool2d(3, 2)
    net.features = nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), pool, nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), pool,
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), pool,
    )  # fmt: skip
    return net


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(alexnet().state_dict(), tmp_path / "alexnet.pth")
    return tmp_path / "alexnet.pth"


def test_lpips_is_its_formula(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zhang et al. 2018, Eq. 1, with the linear layers that come with torchmetrics."""
    lpips = pytest.importorskip("torchmetrics.functional.image.lpips")
    # torchvision is needed for nothing but the layers; its wheels fit one build of torch each.
    vision = types.ModuleType("torchvision")
    vision.models = types.SimpleNamespace(alexnet=alexnet)
    monkeypatch.setitem(sys.modules, "torchvision", vision)
    monkeypatch.setattr(lpips, "_TORCHVISION_AVAILABLE", True)
    rng = np.random.default_rng(1)
    images, truth = rng.random((2, 3, 64, 64, 3))
    found = lpips_metric(backbone)(images, truth)

    linear = torch.load(
        Path(lpips.__file__).parent / "lpips_models" / "alex.pth", map_location="cpu", weights_only=True
    )
    net = alexnet()
    net.load_state_dict(torch.load(backbone, weights_only=True))
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    a, b = (
        (torch.from_numpy(x.transpose(0, 3, 1, 2)).float() * 2 - 1 - shift) / scale for x in (images, truth)
    )
    expected, level = torch.zeros(3), 0
    with torch.no_grad():
        for layer in net.features:
            a, b = layer(a), layer(b)
            if isinstance(layer, nn.ReLU):
                difference = (F.normalize(a, dim=1, eps=1e-10) - F.normalize(b, dim=1, eps=1e-10)) ** 2
                weight = linear[f"lin{level}.model.1.weight"]
                expected += (difference * weight).sum(1).mean((1, 2))
                level += 1
    assert level == 5
    assert found == pytest.approx(float(expected.mean()), rel=1e-4) and found > 1e-4
    assert lpips_metric(backbone)(truth, truth) == 0.0


def test_metrics_without_weights_are_left_out_by_name(tmp_path: Path) -> None:
    left = Weights(fid=tmp_path / "inception.pth").left_out(("lpips", "fid", "clip"))
    assert set(left) == {"lpips", "clip"}
    assert "--lpips-weights" in left["lpips"] and "--clip" in left["clip"]


def test_weights_are_read_but_never_unpickled(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        assert tensors_of(tmp_path / name)["a"].tolist() == [0.0, 1.0, 2.0]
    torch.save(Weights(), tmp_path / "object.pth")
    torch.save({"a": 1}, tmp_path / "number.pth")
    (tmp_path / "text.pth").write_text("no weights", encoding="utf-8")
    (tmp_path / "text.safetensors").write_text("no weights", encoding="utf-8")
    for name in ("object.pth", "number.pth", "text.pth", "text.safetensors", "missing.pth"):
        with pytest.raises(UsageError, match=name.replace(".", r"\.")):
            tensors_of(tmp_path / name)


def test_weights_of_something_else(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match="AlexNet or VGG-16"):
        lpips_metric(tmp_path / "other.pth")
    with pytest.raises(UsageError, match=r"InceptionV3|pip install"):
        frechet_distance(tmp_path / "other.pth")
    with pytest.raises(UsageError, match=r"no folder of a CLIPModel|pip install"):
        clip_score(tmp_path)
