"""The tensor contract and the manifest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from uc3d_rt.contract import (
    NETWORK_NAMES,
    ModelShape,
    NoiseSchedule,
    load_manifest,
    network_specs,
    save_manifest,
    verified_network_path,
)
from uc3d_rt.errors import BundleError

SHAPE = ModelShape(image_px=64, latent_px=8, latent_channels=4, tokens=2, token_dim=8, embedding_dim=8)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def edit(bundle: Path, **changes: object) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_every_network_has_a_spec() -> None:
    specs = network_specs(SHAPE)
    assert tuple(specs) == NETWORK_NAMES
    unet = {tensor.name: tensor.shape for tensor in specs["unet"].inputs}
    assert unet["sample"] == ("samples", 8, 8, 8)
    assert unet["image_latent"] == ("batch", 4, 8, 8)
    assert specs["unet"].outputs[0].shape == unet["sample"]


def test_manifest_round_trip(bundle: Path, tmp_path: Path) -> None:
    manifest = load_manifest(bundle)
    save_manifest(manifest, tmp_path)
    assert load_manifest(tmp_path) == manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "manifest.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, "format version 99"),
        ({"networks": {}}, "names no image_encoder"),
        ({"shape": {"image_px": -1}}, "damaged"),
        ({"shape": None}, "damaged"),
        ({"schedule": {"prediction": "x"}}, "damaged"),
    ],
)
def test_a_wrong_manifest_is_refused(bundle: Path, changes: dict, message: str) -> None:
    edit(bundle, **changes)
    with pytest.raises(BundleError, match=message) as caught:
        load_manifest(bundle)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"'])
def test_a_manifest_that_is_no_manifest(bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match="damaged"):
        load_manifest(bundle)


def test_other_numbers_of_views_are_refused(bundle: Path) -> None:
    shape = json.loads((bundle / "manifest.json").read_text())["shape"]
    edit(bundle, shape={**shape, "views": 4})
    with pytest.raises(BundleError, match="4 views"):
        load_manifest(bundle)


def test_missing_bundle_and_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle at"):
        load_manifest(tmp_path / "nothing")
    with pytest.raises(BundleError, match="is missing"):
        load_manifest(tmp_path)


def test_network_files_are_verified(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    path = verified_network_path(bundle, manifest, "unet")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="altered"):
        verified_network_path(bundle, manifest, "unet")
    path.unlink()
    with pytest.raises(BundleError, match="is missing"):
        verified_network_path(bundle, manifest, "unet")


def test_files_outside_the_bundle_are_refused(bundle: Path) -> None:
    networks = json.loads((bundle / "manifest.json").read_text())["networks"]
    networks["unet"]["file"] = "../unet.onnx"
    edit(bundle, networks=networks)
    with pytest.raises(BundleError, match="outside the bundle"):
        verified_network_path(bundle, load_manifest(bundle), "unet")


@pytest.mark.parametrize(
    "wrong",
    [
        {"beta_start": 0.0},
        {"beta_start": 0.5, "beta_end": 0.1},
        {"train_steps": 0},
        {"beta_curve": "cosine"},
        {"prediction": "x0"},
        {"zero_terminal_snr": True, "prediction": "eps"},
    ],
)
def test_schedules_are_checked_when_made(wrong: dict) -> None:
    with pytest.raises(ValueError):
        NoiseSchedule(**wrong)


def test_shapes_are_checked_when_made() -> None:
    with pytest.raises(ValueError, match="tokens"):
        ModelShape(image_px=64, latent_px=8, latent_channels=4, tokens=0, token_dim=8, embedding_dim=8)
