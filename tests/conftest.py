"""A tiny but real bundle: five ONNX networks that keep the tensor contract and draw an ellipsoid."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from uc3d_rt.contract import (
    Manifest,
    ModelShape,
    NetworkFile,
    NoiseSchedule,
    SamplingDefaults,
    network_specs,
    save_manifest,
)
from uc3d_rt.sampler import alpha_bars
from uc3d_rt.views import TARGET_CAMERAS, camera_axes, encode_normals, pixel_grid

TINY_SHAPE = ModelShape(image_px=64, latent_px=8, latent_channels=4, tokens=2, token_dim=8, embedding_dim=8)
TINY_SCHEDULE = NoiseSchedule(
    train_steps=100, beta_curve="scaled_linear", zero_terminal_snr=True, prediction="v"
)
SEMI_AXES = np.array([0.5, 0.7, 0.4])
SLOTS = 16  # leading entries of a flattened latent that the tiny decoder looks at


def ellipsoid_views(size_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact colour (6, H, W, 3) in [0, 1] and unit normals (6, H, W, 3), zero background."""
    u, v = pixel_grid(size_px)
    colors, normals = [], []
    for camera in TARGET_CAMERAS:
        right, up, back = (axis.astype(np.float64) for axis in camera_axes(camera))
        start = (u[..., None] * right + v[..., None] * up) / SEMI_AXES
        along = -back / SEMI_AXES
        b, c = start @ along, (start * start).sum(-1) - 1.0
        discriminant = b * b - (along @ along) * c
        hit = discriminant > 0.0
        t = (-b - np.sqrt(np.maximum(discriminant, 0.0))) / (along @ along)
        point = (start + t[..., None] * along) * SEMI_AXES
        normal = point / SEMI_AXES**2
        normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
        colors.append(np.where(hit[..., None], 0.5 + 0.45 * point / SEMI_AXES, 1.0))
        normals.append(np.where(hit[..., None], normal, 0.0))
    return np.stack(colors).astype(np.float32), np.stack(normals).astype(np.float32)


def write_tiny_bundle(folder: Path) -> Path:
    """Write the tiny bundle into an empty folder."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    shape, specs = TINY_SHAPE, network_specs(TINY_SHAPE)
    flat = 2 * shape.latent_channels * shape.latent_px**2
    rng = np.random.default_rng(7)

    def save(name: str, nodes: list, constants: dict[str, np.ndarray]) -> None:
        def infos(tensors: tuple) -> list:
            return [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.shape) for t in tensors]

        initializers = [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()]
        graph = helper.make_graph(
            nodes, name, infos(specs[name].inputs), infos(specs[name].outputs), initializers
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        onnx.checker.check_model(model)
        onnx.save(model, folder / f"{name}.onnx")

    node = helper.make_node
    save(
        "image_encoder",
        [
            node("GlobalAveragePool", ["image"], ["pooled"]),
            node("Flatten", ["pooled"], ["row"]),
            node("MatMul", ["row", "weight"], ["wide"]),
            node("Reshape", ["wide", "form"], ["tokens"]),
        ],
        {
            "weight": rng.normal(size=(3, shape.tokens * shape.token_dim)).astype(np.float32),
            "form": np.array([-1, shape.tokens, shape.token_dim]),
        },
    )
    save(
        "vae_encoder",
        [
            node("AveragePool", ["image"], ["small"], kernel_shape=[8, 8], strides=[8, 8]),
            node("Conv", ["small", "weight"], ["latent"]),
        ],
        {"weight": rng.normal(size=(shape.latent_channels, 3, 1, 1)).astype(np.float32)},
    )
    # v = (sqrt(alpha_bar) z_t - z_0) / sqrt(1 - alpha_bar) of the wanted z_0: one hot code an image.
    alpha_bar = alpha_bars(TINY_SCHEDULE)
    target = np.zeros((1, shape.views, 2, flat // 2), np.float32)
    for view in range(shape.views):
        target[0, view, 0, view], target[0, view, 1, shape.views + view] = 1.0, 1.0
    target[..., 12:SLOTS] = 1.0  # weighted by the conditioning below
    weight_by_slot = np.zeros(flat // 2, np.float32)
    weight_by_slot[12:SLOTS] = 1.0
    save(
        "unet",
        [
            node("Cast", ["timestep"], ["t"], to=TensorProto.INT64),
            node("Gather", ["signals", "t"], ["signal_row"]),
            node("Reshape", ["signal_row", "scalars"], ["signal"]),
            node("Gather", ["noises", "t"], ["noise_row"]),
            node("Reshape", ["noise_row", "scalars"], ["noise"]),
            node("Reshape", ["sample", "codes"], ["z_t"]),
            node("ReduceMean", ["tokens", "token_axes"], ["token_mean"]),
            node("ReduceMean", ["image_latent", "latent_axes"], ["latent_mean"]),
            node("Reshape", ["token_mean", "scalars"], ["a"]),
            node("Reshape", ["latent_mean", "scalars"], ["b"]),
            node("Reshape", ["focal", "scalars"], ["c"]),
            node("Sum", ["a", "b", "c"], ["told"]),
            node("Tanh", ["told"], ["bounded"]),
            node("Mul", ["bounded", "slots"], ["tint"]),
            node("Add", ["fixed", "tint"], ["wanted"]),
            node("Mul", ["z_t", "leak"], ["left"]),
            node("Add", ["wanted", "left"], ["z_0"]),
            node("Mul", ["signal", "z_t"], ["scaled"]),
            node("Sub", ["scaled", "z_0"], ["difference"]),
            node("Div", ["difference", "noise"], ["v"]),
            node("Reshape", ["v", "latents"], ["prediction"]),
        ],
        {
            "signals": np.sqrt(alpha_bar).astype(np.float32),
            "noises": np.sqrt(1.0 - alpha_bar).astype(np.float32),
            "token_axes": np.array([1, 2]),
            "latent_axes": np.array([1, 2, 3]),
            "scalars": np.array([-1, 1, 1, 1]),
            "codes": np.array([-1, shape.views, 2, flat // 2]),
            "slots": weight_by_slot,
            "fixed": target * (1.0 - weight_by_slot),
            "leak": np.float32(0.02),
            "latents": np.array([-1, 2 * shape.latent_channels, shape.latent_px, shape.latent_px]),
        },
    )
    color, normal = ellipsoid_views(shape.image_px)
    pictures = np.concatenate(
        [color, encode_normals(normal), np.full((4, *color.shape[1:]), 0.01, np.float32)]
    )
    save(
        "vae_decoder",
        [
            node("Flatten", ["latent"], ["row"]),
            node("Slice", ["row", "first", "last", "axis"], ["code"]),
            node("MatMul", ["code", "pictures"], ["pixels"]),
            node("Reshape", ["pixels", "form"], ["unclipped"]),
            node("Clip", ["unclipped", "low", "high"], ["image"]),
        ],
        {
            "first": np.array([0]),
            "last": np.array([SLOTS]),
            "axis": np.array([1]),
            "pictures": pictures.transpose(0, 3, 1, 2).reshape(SLOTS, -1),
            "form": np.array([-1, 3, shape.image_px, shape.image_px]),
            "low": np.float32(0.0),
            "high": np.float32(1.0),
        },
    )
    heads = []
    for kind in ("color", "normal"):
        heads += [
            node("GlobalAveragePool", [kind], [f"{kind}_pooled"]),
            node("Flatten", [f"{kind}_pooled"], [f"{kind}_row"]),
            node("MatMul", [f"{kind}_row", "weight"], [f"{kind}_wide"]),
            node("LpNormalization", [f"{kind}_wide"], [f"{kind}_embedding"], axis=1, p=2),
        ]
    save("projection_heads", heads, {"weight": rng.normal(size=(3, shape.embedding_dim)).astype(np.float32)})
    files = {}
    for name in specs:
        data = (folder / f"{name}.onnx").read_bytes()
        files[name] = NetworkFile(f"{name}.onnx", hashlib.sha256(data).hexdigest(), len(data))
    save_manifest(
        Manifest("tiny", shape, TINY_SCHEDULE, SamplingDefaults(steps=4, guidance=2.0), files), folder
    )
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle; do not change its files."""
    pytest.importorskip("onnx")
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny_bundle"))


def object_rgba(size_px: int = 96) -> np.ndarray:
    """A two-coloured disc with soft alpha (H, W, 4)."""
    u, v = pixel_grid(size_px)
    rgba = np.zeros((size_px, size_px, 4), np.uint8)
    rgba[..., :3] = np.where((u > 0)[..., None], [200, 60, 40], [40, 90, 180])
    rgba[..., 3] = np.clip((0.7 - np.hypot(u, v)) * size_px / 2 * 255, 0, 255)
    return rgba


@pytest.fixture(scope="session")
def object_png(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small RGBA picture of an object."""
    path = tmp_path_factory.mktemp("images") / "object.png"
    Image.fromarray(object_rgba()).save(path)
    return path


@pytest.fixture
def run_cli(
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str, str]]:
    """Run the real command line in this process; gives (exit code, stdout, stderr)."""
    from uc3d_rt.cli import main

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


@dataclass(frozen=True)
class CliRun:
    """What one run of the command line left."""

    folder: Path  # m.glb, views/
    code: int
    stdout: str
    stderr: str


FAST_OPTIONS = ("--resolution", "64", "--steps", "2", "--threads", "1")


@pytest.fixture(scope="session")
def glb_run(
    tmp_path_factory: pytest.TempPathFactory, object_png: Path, tiny_bundle: Path
) -> Callable[[str], CliRun]:
    """`glb_run("atlas")`: made once with `FAST_OPTIONS`; do not change its files."""
    from uc3d_rt.cli import main

    @cache
    def run(texture: str) -> CliRun:
        folder = tmp_path_factory.mktemp(texture)
        files = ("-o", folder / "m.glb", "--views", folder / "views", "--bundle", tiny_bundle)
        out, err = StringIO(), StringIO()
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stopped:
            main([str(a) for a in (object_png, *files, "--texture", texture, *FAST_OPTIONS)])
        return CliRun(folder, int(stopped.value.code or 0), out.getvalue(), err.getvalue())

    return run
