"""ONNX Runtime: the contract is held on the way in, errors say the mend, memory is given back."""

from __future__ import annotations

import hashlib
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from uc3d_rt.backends.base import backend_for
from uc3d_rt.contract import Manifest, NetworkFile, load_manifest
from uc3d_rt.errors import BackendError, BundleError, UsageError


@pytest.fixture
def manifest(tiny_bundle: Path) -> Manifest:
    return load_manifest(tiny_bundle)


def images(batch: int) -> np.ndarray:
    return np.random.default_rng(0).random((batch, 3, 64, 64), dtype=np.float32)


def unet_inputs(batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = {"sample": (6 * batch, 8, 8, 8), "timestep": (batch,), "tokens": (batch, 2, 8),
              "image_latent": (batch, 4, 8, 8), "focal": (batch,)}  # fmt: skip
    return {name: rng.random(shape, dtype=np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("batch", [1, 3])
def test_a_network_runs_at_any_batch(tiny_bundle: Path, manifest: Manifest, batch: int) -> None:
    with backend_for("cpu", threads=1).open(tiny_bundle, manifest, "vae_encoder") as network:
        out = network(image=images(batch))
    assert set(out) == {"latent"}
    assert out["latent"].shape == (batch, 4, 8, 8) and out["latent"].dtype == np.float32


def test_samples_of_a_batch_do_not_mix(tiny_bundle: Path, manifest: Manifest) -> None:
    inputs = unet_inputs(2)
    with backend_for("cpu").open(tiny_bundle, manifest, "unet") as network:
        both = network(**inputs)["prediction"]
        for item in range(2):
            one = {
                k: v[6 * item : 6 * item + 6] if k == "sample" else v[item : item + 1]
                for k, v in inputs.items()
            }
            np.testing.assert_allclose(
                network(**one)["prediction"], both[6 * item : 6 * item + 6], rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "takes"),
        ({"other": images(1)}, "takes"),
        ({"image": images(1).astype(np.float64)}, "float64"),
        ({"image": images(1)[..., :32]}, r"\(1, 3, 64, 32\)"),
        ({"image": images(1)[0]}, r"\(3, 64, 64\)"),
    ],
)
def test_inputs_are_held_against_the_contract(
    tiny_bundle: Path, manifest: Manifest, change: dict, message: str
) -> None:
    inputs = {k: v for k, v in {"image": images(1), **change}.items() if v is not None}
    with (
        backend_for("cpu").open(tiny_bundle, manifest, "vae_encoder") as network,
        pytest.raises(ValueError, match=message),
    ):
        network(**inputs)


def test_free_dimensions_must_agree(tiny_bundle: Path, manifest: Manifest) -> None:
    with backend_for("cpu").open(tiny_bundle, manifest, "unet") as network:
        inputs = unet_inputs(2)
        with pytest.raises(ValueError, match="focal"):
            network(**{**inputs, "focal": inputs["focal"][:1]})
        with pytest.raises(ValueError, match="samples"):
            network(**{**inputs, "sample": inputs["sample"][:6]})


def test_a_closed_network_is_freed(tiny_bundle: Path, manifest: Manifest) -> None:
    network = backend_for("cpu").open(tiny_bundle, manifest, "vae_encoder")
    session = weakref.ref(network._session)
    network.close()
    assert session() is None
    with pytest.raises(ValueError, match="closed"):
        network(image=images(1))


def with_file(bundle: Path, folder: Path, manifest: Manifest, name: str, data: bytes) -> Manifest:
    """`manifest` for a copy of the bundle in `folder` whose network `name` is `data`."""
    shutil.copytree(bundle, folder, dirs_exist_ok=True)
    (folder / f"{name}.onnx").write_bytes(data)
    entry = NetworkFile(f"{name}.onnx", hashlib.sha256(data).hexdigest(), len(data))
    return replace(manifest, networks={**manifest.networks, name: entry})


def test_a_file_that_is_no_onnx(tiny_bundle: Path, tmp_path: Path, manifest: Manifest) -> None:
    changed = with_file(tiny_bundle, tmp_path, manifest, "unet", b"not a network")
    with pytest.raises(BackendError, match="cannot load .*unet.onnx") as caught:
        backend_for("cpu").open(tmp_path, changed, "unet")
    assert "\n" not in str(caught.value)


def test_a_network_of_another_contract(tiny_bundle: Path, tmp_path: Path, manifest: Manifest) -> None:
    data = (tiny_bundle / "vae_encoder.onnx").read_bytes()
    changed = with_file(tiny_bundle, tmp_path, manifest, "vae_decoder", data)
    with pytest.raises(BundleError, match="has the inputs"):
        backend_for("cpu").open(tmp_path, changed, "vae_decoder")
    larger = replace(manifest, shape=replace(manifest.shape, image_px=128))
    with pytest.raises(BundleError, match="image is .*64.* instead of .*128"):
        backend_for("cpu").open(tiny_bundle, larger, "vae_encoder")


def test_devices_and_threads_are_checked() -> None:
    with pytest.raises(UsageError, match="choose cpu, cuda, or cuda:N"):
        backend_for("tpu")
    with pytest.raises(UsageError, match="threads"):
        backend_for("cpu", threads=0)


def test_a_missing_gpu_is_no_silent_cpu(tiny_bundle: Path, manifest: Manifest) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(BackendError, match="--device cpu"):
        backend_for("cuda").open(tiny_bundle, manifest, "unet")


@pytest.mark.gpu
def test_cuda_and_cpu_agree(tiny_bundle: Path, manifest: Manifest) -> None:
    inputs = unet_inputs(2)
    outputs = []
    for device in ("cpu", "cuda"):
        with backend_for(device).open(tiny_bundle, manifest, "unet") as network:
            outputs.append(network(**inputs)["prediction"])
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-3, atol=1e-4)
