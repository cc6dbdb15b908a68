"""Metrics that need weights of others: computed with a file of them, left out by name without."""

import hashlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
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
    try:
        import torchvision  # noqa: F401
    except ImportError:
        # It is needed for nothing but the layers of the backbone.
        vision = types.ModuleType("torchvision")
        vision.models = types.SimpleNamespace(alexnet=alexnet)
        lpips = pytest.importorskip("torchmetrics.functional.image.lpips")
        monkeypatch.setitem(sys.modules, "torchvision", vision)
        monkeypatch.setattr(lpips, "_TORCHVISION_AVAILABLE", True)
    except RuntimeError as error:
        pytest.skip(f"torchvision was made for another torch: {error}")
    lpips = pytest.importorskip("torchmetrics.functional.image.lpips")
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
    (tmp_path / "junk.pth").write_text(
        "junk\n", encoding="utf-8"
    )  # an opcode that looks up what is not there
    (tmp_path / "text.safetensors").write_text("no weights", encoding="utf-8")
    for name in ("object.pth", "number.pth", "text.pth", "junk.pth", "text.safetensors", "missing.pth"):
        with pytest.raises(UsageError, match=name.replace(".", r"\.")):
            tensors_of(tmp_path / name)


def test_weights_of_something_else(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match="AlexNet or VGG-16"):
        lpips_metric(tmp_path / "other.pth")
    with pytest.raises(UsageError, match=r"InceptionV3|pip install"):
        frechet_distance(tmp_path / "other.pth")
    with pytest.raises(UsageError, match=r"no whole CLIPModel|pip install"):
        clip_score(tmp_path)


def test_digests_name_the_weights(tmp_path: Path) -> None:
    given = tmp_path / "a.pth"
    given.write_bytes(b"weights")
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    found = Weights(lpips=given, clip=folder).digests(("lpips", "fid", "clip"))
    assert found["lpips"] == hashlib.sha256(b"weights").hexdigest()
    assert found["fid"] is None
    (folder / "model.safetensors").write_bytes(b"others")
    assert Weights(clip=folder).digests(("clip",))["clip"] not in (None, found["clip"])
    with pytest.raises(UsageError, match=r"gone\.pth cannot be read"):
        Weights(lpips=tmp_path / "gone.pth").digests(("lpips",))


def test_a_library_that_is_missing_is_named_with_its_mend(
    backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image.lpips", None)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for metric in (lpips_metric, frechet_distance, clip_score):
        with pytest.raises(UsageError, match=r"pip install '\.\[metrics\]'"):
            metric(backbone)


BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
"""Bytes that a byte-level vocabulary writes as themselves."""


@pytest.fixture
def tiny_clip(tmp_path: Path) -> Path:
    """A CLIPModel of random weights, as its folder is published."""
    transformers = pytest.importorskip("transformers")
    try:
        transformers.CLIPModel  # noqa: B018
    except ImportError as error:
        pytest.skip(f"torchvision was made for another torch: {error}")
    torch.manual_seed(0)
    letters = [chr(b) for b in BYTES]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    last = len(vocabulary) - 1
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    tokenizer = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16, "unk_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer | marks))
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.CLIPConfig(
        text_config=sizes
        | {"vocab_size": last + 1, "max_position_embeddings": 16}
        | {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last},
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    means = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(means))
    return tmp_path


def test_clip_score_is_the_cosine_of_the_models_own_embeddings(tiny_clip: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    rng = np.random.default_rng(2)
    images = [rng.integers(0, 256, (32, 32, 3), np.uint8) for _ in range(3)]  # of its size: none is resized
    texts = ["a cup", "a longer text that is cut", "b"]
    found = clip_score(tiny_clip)(images, texts)
    model, tokenizer = CLIPModel.from_pretrained(tiny_clip).eval(), CLIPTokenizer.from_pretrained(tiny_clip)
    for image, text, score in zip(images, texts, found, strict=True):
        pixels = (torch.from_numpy(image) / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor(
            [0.3, 0.2, 0.1]
        )
        words = tokenizer([text], truncation=True, return_tensors="pt")
        with torch.no_grad():
            made = model(**words, pixel_values=pixels.permute(2, 0, 1)[None])
        expected = F.cosine_similarity(made.image_embeds, made.text_embeds).item()
        assert score == pytest.approx(expected, abs=1e-5)
    assert len(set(np.round(found, 4))) == 3


@pytest.mark.parametrize(
    "lacking", ["config.json", "model.safetensors", "preprocessor_config.json", "vocab.json"]
)
def test_a_clip_folder_that_lacks_a_file_is_told(tiny_clip: Path, lacking: str) -> None:
    (tiny_clip / lacking).unlink()
    with pytest.raises(UsageError, match="no whole CLIPModel"):
        clip_score(tiny_clip)


def test_a_clip_folder_whose_weights_are_others_is_told(tiny_clip: Path) -> None:
    weights = load_file(tiny_clip / "model.safetensors")
    cut = {name: value for name, value in weights.items() if name != "visual_projection.weight"}
    save_file(cut, tiny_clip / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="no weights of visual_projection"):
        clip_score(tiny_clip)
    (tiny_clip / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UsageError, match="no whole CLIPModel"):
        clip_score(tiny_clip)
