"""What users get wrong: one line with the mend, its own exit code, no traceback, nothing half written."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import object_rgba
from uc3d_rt import errors

Run = Callable[..., tuple[int, str, str]]


def png_header(width: int, height: int) -> bytes:
    """A PNG that says its size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:
    from io import BytesIO

    stream = BytesIO()
    Image.fromarray(array).save(stream, kind)
    return stream.getvalue()


def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)


BAD_IMAGES: dict[str, tuple[Callable[[], bytes | None], str]] = {
    "missing": (lambda: None, "does not exist"),
    "empty": (lambda: b"", "is empty"),
    "text": (lambda: b"hello, I am no image\n" * 20, "not an image"),
    "truncated-png": (lambda: encoded(photo())[:5000], "damaged or cut short"),
    "truncated-jpeg": (lambda: encoded(photo(), "JPEG")[:5000], "damaged or cut short"),
    "truncated-webp": (lambda: encoded(photo(), "WEBP")[:900], "damaged or cut short|not an image"),
    "one-pixel": (lambda: encoded(np.zeros((1, 1, 3), np.uint8)), "1×1"),
    "thin": (lambda: encoded(photo()[:, :15]), "15×200"),
    "20000x20000": (lambda: png_header(20_000, 20_000), "megapixels"),
    "10000x10000": (lambda: png_header(10_000, 10_000), "10000×10000"),
    "transparent": (lambda: encoded(np.zeros((64, 64, 4), np.uint8)), "fully transparent"),
    "blank": (lambda: encoded(np.full((64, 64, 3), 255, np.uint8)), "blank"),
    "eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", "not an image"),
}


def assert_one_line(stderr: str, *words: str) -> None:
    lines = stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    assert "Traceback" not in stderr and "--debug" not in stderr
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images(name: str, tmp_path: Path, tiny_bundle: Path, run_cli: Run) -> None:
    import re

    make, message = BAD_IMAGES[name]
    image, data = tmp_path / "image.png", make()
    if data is not None:
        image.write_bytes(data)
    before = sorted(tmp_path.iterdir())
    code, out, err = run_cli(
        image, "-o", tmp_path / "m.glb", "--views", tmp_path / "v", "--bundle", tiny_bundle
    )
    assert code == errors.ImageError.exit_code
    assert out == ""
    assert_one_line(err, "image")
    assert re.search(message, err)
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_is_no_image(tmp_path: Path, tiny_bundle: Path, run_cli: Run) -> None:
    code, _, err = run_cli(tmp_path, "-o", tmp_path / "m.glb", "--bundle", tiny_bundle)
    assert code == errors.ImageError.exit_code
    assert_one_line(err, "not a file")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("nowhere/m.glb", "does not exist"),
        ("a_file/m.glb", "is not a folder"),
        ("m.step", "must end in"),
        ("m", "must end in"),
        ("a_folder.glb", "is a folder"),
    ],
)
def test_bad_outputs_are_found_before_the_work(
    output: str, message: str, tmp_path: Path, object_png: Path, run_cli: Run
) -> None:
    (tmp_path / "a_file").write_text("x")
    (tmp_path / "a_folder.glb").mkdir()
    before = sorted(tmp_path.iterdir())
    # The bundle does not exist either: the output is looked at first.
    code, _, err = run_cli(object_png, "-o", tmp_path / output, "--bundle", tmp_path / "no_bundle")
    assert code == errors.OutputError.exit_code
    assert_one_line(err, message)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that refuses even root: /proc")
def test_a_folder_that_refuses(tmp_path: Path, object_png: Path, tiny_bundle: Path, run_cli: Run) -> None:
    for arguments in (("-o", "/proc/self/m.glb"), ("-o", tmp_path / "m.glb", "--views", "/proc/self")):
        code, _, err = run_cli(object_png, *arguments, "--bundle", tiny_bundle)
        assert code == errors.OutputError.exit_code
        assert_one_line(err, "refuses new files")


def test_views_need_a_parent_folder(
    tmp_path: Path, object_png: Path, tiny_bundle: Path, run_cli: Run
) -> None:
    views = tmp_path / "no" / "views"
    code, _, err = run_cli(object_png, "-o", tmp_path / "m.glb", "--views", views, "--bundle", tiny_bundle)
    assert code == errors.OutputError.exit_code
    assert_one_line(err, "--views", "does not exist")


@pytest.mark.parametrize("network", ["image_encoder", "unet", "vae_decoder", "projection_heads"])
def test_a_bundle_with_a_missing_file(
    network: str, tmp_path: Path, object_png: Path, tiny_bundle: Path, run_cli: Run
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (bundle / f"{network}.onnx").unlink()
    code, _, err = run_cli(object_png, "-o", tmp_path / "m.glb", "--bundle", bundle)
    assert code == errors.BundleError.exit_code
    assert_one_line(err, f"{network}.onnx", "is missing")


def test_a_bundle_with_an_altered_file(
    tmp_path: Path, object_png: Path, tiny_bundle: Path, run_cli: Run
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    with (bundle / "unet.onnx").open("ab") as stream:
        stream.write(b"x")
    code, _, err = run_cli(object_png, "-o", tmp_path / "m.glb", "--bundle", bundle)
    assert code == errors.BundleError.exit_code
    assert_one_line(err, "unet.onnx", "was altered")
    assert not (tmp_path / "m.glb").exists()


def test_bundles_that_are_none(tmp_path: Path, object_png: Path, tiny_bundle: Path, run_cli: Run) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    manifest = bundle / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 2}))
    for folder, message in (
        (tmp_path / "none", "no bundle"),
        (tmp_path, "is missing"),
        (bundle, "version 2"),
    ):
        code, _, err = run_cli(object_png, "-o", tmp_path / "m.glb", "--bundle", folder)
        assert code == errors.BundleError.exit_code
        assert_one_line(err, message)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--steps", "0"),
        ("--steps", "101"),
        ("--steps", "many"),
        ("--guidance", "-1"),
        ("--guidance", "nan"),
        ("--noise-scale", "1.5"),
        ("--seed", "-1"),
        ("--focal-mm", "3"),
        ("--resolution", "7"),
        ("--resolution", "100000"),
        ("--texture", "lace"),
        ("--format", "obj"),
        ("--format", "step"),
        ("--device", "abacus"),
        ("--threads", "0"),
        ("--no-such-option",),
        ("second.png",),
    ],
)
def test_bad_options(
    arguments: tuple[str, ...], tmp_path: Path, object_png: Path, tiny_bundle: Path, run_cli: Run
) -> None:
    code, _, err = run_cli(object_png, "-o", tmp_path / "m.glb", "--bundle", tiny_bundle, *arguments)
    assert code == errors.UsageError.exit_code
    assert_one_line(err)
    assert not list(tmp_path.iterdir())


def test_no_arguments(run_cli: Run) -> None:
    code, _, err = run_cli()
    assert code == 2
    assert_one_line(err, "IMAGE")


def test_every_error_has_its_own_exit_code() -> None:
    kinds = errors.Uc3dError.__subclasses__()
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(kinds) == 6 and not {0, 1, 130} & set(codes)


def test_debug_shows_the_traceback(tmp_path: Path, run_cli: Run) -> None:
    code, _, err = run_cli(tmp_path / "none.png", "-o", tmp_path / "nowhere" / "m.glb", "--debug")
    assert code == errors.OutputError.exit_code
    assert "Traceback" in err and err.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("case", ["missing", "20000x20000"])
def test_as_users_meet_it(case: str, tmp_path: Path, tiny_bundle: Path) -> None:
    """The same in a process of its own, warnings and all."""
    data = BAD_IMAGES[case][0]()
    if data is not None:
        (tmp_path / "image.png").write_bytes(data)
    command = [sys.executable, "-m", "uc3d_rt.cli", "image.png", "-o", "m.glb", "--bundle", str(tiny_bundle)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == errors.ImageError.exit_code and done.stdout == ""
    assert_one_line(done.stderr)
    assert not (tmp_path / "m.glb").exists()


# What looks odd but works: see test_preprocess for the pixels.
ODD_IMAGES: dict[str, Callable[[Path], None]] = {
    "grey": lambda path: Image.fromarray(object_rgba()).convert("LA").save(path),
    "cmyk": lambda path: on_white().convert("CMYK").save(path, "TIFF"),
    "palette": lambda path: on_white().convert("P").save(path),
    "sixteen-bit": lambda path: Image.fromarray(
        np.asarray(on_white().convert("L")).astype(np.uint16) * 257
    ).save(path),
    "animated": lambda path: on_white().save(
        path, "WEBP", save_all=True, append_images=[on_white().rotate(90)]
    ),
}


def on_white() -> Image.Image:
    picture = Image.new("RGBA", (96, 96), "white")
    return Image.alpha_composite(picture, Image.fromarray(object_rgba())).convert("RGB")


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_odd_images_work(name: str, tmp_path: Path, tiny_bundle: Path) -> None:
    from uc3d_rt.pipeline import Pipeline

    path = tmp_path / "image.png"
    ODD_IMAGES[name](path)
    views = Pipeline.from_bundle(tiny_bundle).views(path, steps=2)
    assert np.isfinite(views.color).all()
    assert ("2 frames" in " ".join(views.notes)) is (name == "animated")
