"""Any picture to the network input: modes, orientation, framing, background, focal length."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.conftest import object_rgba
from uc3d_rt.background import cut_out
from uc3d_rt.contract import FOCAL_UNKNOWN
from uc3d_rt.errors import ImageError, UsageError
from uc3d_rt.preprocess import FILL, frame_object, load_image, preprocess
from uc3d_rt.views import pixel_grid

PX = 64


def box_of(image: np.ndarray) -> tuple[int, int, int, int]:
    """Rows and columns (first, last) that the red object more than half covers, in (H, W, 3)."""
    dark = image[..., 1] < 142
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    return rows[0], rows[-1], columns[0], columns[-1]


def rectangle(height: int, width: int, box: tuple[int, int, int, int], color=(200, 30, 30)) -> np.ndarray:
    rgba = np.zeros((height, width, 4), np.uint8)
    top, bottom, left, right = box
    rgba[top:bottom, left:right] = (*color, 255)
    return rgba


# frame_object


@pytest.mark.parametrize(
    ("size", "box"),
    [((320, 320), (40, 290, 100, 200)), ((100, 300), (5, 95, 250, 300)), ((64, 64), (0, 64, 0, 64)),
     ((40, 900), (10, 30, 0, 900)), ((333, 41), (0, 7, 13, 20))],
)  # fmt: skip
def test_the_object_is_centred_and_fills_its_share(size: tuple[int, int], box: tuple[int, ...]) -> None:
    framed = frame_object(rectangle(*size, box), 256)
    assert framed.shape == (256, 256, 3) and framed.dtype == np.uint8
    top, bottom, left, right = box_of(framed)
    assert max(bottom - top, right - left) + 1 == pytest.approx(FILL * 256, abs=2)
    assert (top + bottom) / 2 == pytest.approx(127.5, abs=1) and (left + right) / 2 == pytest.approx(
        127.5, abs=1
    )
    want = (box[1] - box[0]) / (box[3] - box[2])
    assert (bottom - top + 1) / (right - left + 1) == pytest.approx(want, rel=0.05 * max(want, 1 / want))
    assert (framed[128, 128] == (200, 30, 30)).all()
    assert (framed[0] == 255).all() and (framed[:, 0] == 255).all()


def test_transparent_pixels_lend_no_color() -> None:
    rgba = rectangle(200, 200, (50, 150, 50, 150))
    rgba[rgba[..., 3] == 0, :3] = (0, 255, 0)  # what editors leave behind under alpha 0
    framed = frame_object(rgba, 90).astype(int)
    assert (framed[..., 1] <= framed[..., 0]).all()  # red over white holds no green tint


def test_half_transparent_is_half_white() -> None:
    rgba = rectangle(100, 100, (10, 90, 10, 90), (0, 0, 0))
    rgba[40:60, 40:60, 3] = 128
    assert frame_object(rgba, 100)[50, 50] == pytest.approx([127, 127, 127], abs=2)


def test_framing_is_quick() -> None:
    rgba = rectangle(320, 320, (40, 290, 40, 290))
    times = []
    for _ in range(20):
        started = time.perf_counter()
        frame_object(rgba, 256)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.02  # about 2 ms; the margin is for busy machines


def test_nothing_opaque() -> None:
    with pytest.raises(ImageError, match="transparent"):
        frame_object(np.zeros((20, 20, 4), np.uint8), 64)


# load_image


def save(tmp_path: Path, picture: Image.Image, name: str, **options) -> Path:
    path = tmp_path / name
    picture.save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tiff", "a.tga"])
def test_alpha_survives_every_format(tmp_path: Path, name: str) -> None:
    rgba = object_rgba()
    loaded = load_image(
        save(tmp_path, Image.fromarray(rgba), name, **({"lossless": True} if "webp" in name else {}))
    )
    assert loaded.has_alpha and loaded.notes == ()
    np.testing.assert_array_equal(loaded.rgba[..., 3], rgba[..., 3])
    solid = rgba[..., 3] > 0
    np.testing.assert_array_equal(loaded.rgba[solid], rgba[solid])


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_modes_without_alpha(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(np.linspace(0, 255, 40 * 30).reshape(30, 40).astype(np.uint8))
    if mode in ("I;16", "I"):
        values = np.asarray(grey).astype(np.uint16 if mode == "I;16" else np.int32) * 257
        picture = Image.fromarray(values)
    elif mode == "F":
        picture = Image.fromarray(np.asarray(grey).astype(np.float32) / 255)
    else:
        picture = grey.convert("RGB").convert(mode)
    loaded = load_image(save(tmp_path, picture, "a.tiff"))
    assert loaded.rgba.shape == (30, 40, 4) and loaded.rgba.dtype == np.uint8 and not loaded.has_alpha
    if mode not in ("1", "P"):  # these are dithered
        np.testing.assert_allclose(loaded.rgba[..., :3], np.asarray(grey.convert("RGB")), atol=6)
    assert (loaded.rgba[..., 3] == 255).all()


def test_palette_and_grey_alpha(tmp_path: Path) -> None:
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([255, 0, 255, 10, 200, 30] + [0] * 762)
    palette.paste(1, (5, 5, 15, 15))
    loaded = load_image(save(tmp_path, palette, "p.png", transparency=0))
    assert loaded.has_alpha and loaded.rgba[0, 0, 3] == 0 and tuple(loaded.rgba[10, 10]) == (10, 200, 30, 255)
    loaded = load_image(save(tmp_path, Image.fromarray(object_rgba()).convert("LA"), "la.png"))
    assert loaded.has_alpha


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_and_focal(tmp_path: Path, orientation: int) -> None:
    upright = Image.fromarray(rectangle(40, 60, (0, 20, 0, 20))[..., :3])
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF orientation -> Image.Transpose that stores it
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x8769] = {0xA405: 50}
    loaded = load_image(save(tmp_path, stored, "a.png", exif=exif))
    np.testing.assert_array_equal(loaded.rgba[..., :3], np.asarray(upright))
    assert loaded.focal_mm == 50.0


def test_animation_uses_its_first_frame_and_says_so(tmp_path: Path) -> None:
    frames = [Image.fromarray(rectangle(40, 40, (5, 30, 5, 30), c)) for c in ((200, 0, 0), (0, 0, 200))]
    for name in ("a.webp", "a.png"):
        path = save(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], lossless=True)
        loaded = load_image(path)
        assert tuple(loaded.rgba[10, 10, :3]) == (200, 0, 0)
        assert "2 frames" in loaded.notes[0]


def test_a_colour_profile_is_applied(tmp_path: Path) -> None:
    picture = Image.fromarray(object_rgba())
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for data, noted in ((profile, False), (b"broken profile", True)):
        loaded = load_image(save(tmp_path, picture, "a.png", icc_profile=data))
        assert bool(loaded.notes) is noted
        solid = loaded.rgba[..., 3] == 255
        np.testing.assert_allclose(loaded.rgba[solid], object_rgba()[solid], atol=2)


# background removal


def scene(
    background: np.ndarray, color: tuple[int, int, int], shadow: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """A shaded disc (H, W, 3) on a background, with a soft shadow below it; and its true mask."""
    size = background.shape[0]
    u, v = pixel_grid(size)
    image = (
        background.astype(np.float64)
        * (1 - shadow * np.exp(-(((u - 0.1) / 0.5) ** 2) - ((v + 0.5) / 0.15) ** 2))[..., None]
    )
    alpha = np.clip((0.5 - np.hypot(u, v)) * size / 2 + 0.5, 0, 1)
    shade = 0.6 + 0.4 * np.clip(v + 0.5, 0, 1)
    image = image * (1 - alpha[..., None]) + np.array(color) * shade[..., None] * alpha[..., None]
    return np.round(image).astype(np.uint8), alpha


def plain(value: float, size: int = 240) -> np.ndarray:
    return np.full((size, size, 3), value)


def sloped(size: int = 240) -> np.ndarray:
    u, v = pixel_grid(size)
    return np.stack([170 + 30 * v + 10 * u, 175 + 30 * v, 180 + 28 * v - 8 * u], -1)


@pytest.mark.parametrize("color", [(180, 50, 40), (40, 60, 70), (230, 200, 40), (30, 30, 30)])
@pytest.mark.parametrize(
    "background", [plain(255), plain(240), plain(90), sloped()], ids=["white", "paper", "grey", "sloped"]
)
@pytest.mark.parametrize("shadow", [0.0, 0.35])
def test_plain_backgrounds_are_removed(background: np.ndarray, color: tuple, shadow: float) -> None:
    image, truth = scene(background, color, shadow)
    noise = np.random.default_rng(0).normal(0, 1.5, image.shape)
    rgba, doubts = cut_out(np.clip(image + noise, 0, 255).astype(np.uint8))
    alpha = rgba[..., 3] / 255.0
    assert np.minimum(alpha, truth).sum() / np.maximum(alpha, truth).sum() > 0.97
    assert doubts == []


def test_the_outline_is_soft_and_free_of_background() -> None:
    image, truth = scene(plain(255), (180, 20, 20))
    rgba, _ = cut_out(image)
    edge = (truth > 0.2) & (truth < 0.8)
    assert np.abs(rgba[..., 3][edge] / 255.0 - truth[edge]).mean() < 0.15
    assert rgba[edge][:, 1].mean() < 90  # a quarter of white would leave over 64 + 20


def test_background_seen_through_the_object_goes() -> None:
    image, _ = scene(plain(250), (60, 90, 160))
    u, v = pixel_grid(240)
    image[np.hypot(u, v) < 0.2] = 250
    rgba, _ = cut_out(image)
    assert rgba[120, 120, 3] == 0 and rgba[120, 160, 3] == 255


def test_large_pictures_are_shrunk() -> None:
    image, _ = scene(plain(255, 1500), (180, 50, 40))
    assert cut_out(image)[0].shape == (1024, 1024, 4)


@pytest.mark.parametrize("kind", ["busy", "touching", "tiny"])
def test_doubt_is_said_aloud(kind: str) -> None:
    image, _ = scene(plain(255), (180, 50, 40))
    if kind == "busy":
        image = (
            np.random.default_rng(0).integers(0, 255, (30, 30, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        )
        image[80:160, 80:160] = (250, 20, 20)
    elif kind == "touching":
        image = image[:, 100:]
    else:
        image = np.full((240, 240, 3), 255, np.uint8)
        image[110:124, 110:124] = (180, 50, 40)
    try:
        doubts = cut_out(image)[1]
    except ImageError as error:
        doubts = [str(error)]
    expected = {"busy": ("not plain", "no object"), "touching": ("border",), "tiny": ("covers only",)}[kind]
    assert any(word in doubt for doubt in doubts for word in expected)
    assert all("RGBA" in doubt for doubt in doubts)


def test_a_nearly_blank_picture_has_no_object() -> None:
    noise = np.random.default_rng(0).normal(250, 1.5, (200, 200, 3)).clip(0, 255).astype(np.uint8)
    with pytest.raises(ImageError, match="no object"):
        cut_out(noise)


# preprocess


def test_what_the_networks_get(object_png: Path) -> None:
    given = preprocess(object_png, PX)
    assert given.image.shape == (3, PX, PX) and given.image.dtype == np.float32
    assert given.image.flags.c_contiguous and given.image.min() >= 0.0 and given.image.max() <= 1.0
    assert (given.image[:, 0, 0] == 1.0).all() and given.focal == FOCAL_UNKNOWN and given.notes == ()
    assert given.image[0, PX // 2, PX // 2 + 8] > given.image[2, PX // 2, PX // 2 + 8]  # channels are RGB


def test_paths_pictures_and_arrays_give_the_same(object_png: Path) -> None:
    want = preprocess(object_png, PX).image
    rgba = object_rgba()
    for source in (str(object_png), Image.fromarray(rgba), rgba, rgba.astype(np.float32) / 255):
        np.testing.assert_allclose(preprocess(source, PX).image, want, atol=1e-6)


def test_the_callers_array_is_left_alone() -> None:
    image, _ = scene(plain(255), (180, 50, 40))
    before = image.copy()
    preprocess(image, PX)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
    "array",
    [np.zeros((40, 40), np.uint8), np.zeros((40, 40, 2), np.uint8), np.zeros((40, 40, 3), np.int64),
     np.full((40, 40, 3), 2.0), np.full((40, 40, 3), np.nan), np.zeros((4, 4, 3), np.uint8)],
)  # fmt: skip
def test_arrays_that_are_no_image(array: np.ndarray) -> None:
    with pytest.raises(ImageError):
        preprocess(array, PX)


def test_an_object_of_a_few_pixels() -> None:
    with pytest.raises(ImageError, match="only 5 px"):
        preprocess(rectangle(100, 100, (50, 55, 50, 53)), PX)
    assert "only 20 px" in preprocess(rectangle(100, 100, (50, 70, 50, 70)), PX).notes[0]


def test_an_object_cut_by_the_border_is_noted() -> None:
    assert "border" in preprocess(rectangle(200, 200, (50, 200, 20, 180)), PX).notes[0]


def test_opaque_alpha_does_not_count_as_a_mask() -> None:
    image, _ = scene(plain(255), (180, 50, 40))
    rgba = np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])
    np.testing.assert_array_equal(preprocess(rgba, PX).image, preprocess(image, PX).image)


@pytest.mark.parametrize(
    ("focal_mm", "focal", "noted"),
    [(None, FOCAL_UNKNOWN, False), (0.0, 0.0, False), (35.0, 1.0, False), (50.0, 50 / 35, False),
     (135.0, 135 / 35, False), (24.0, 1.0, True), (400.0, 135 / 35, True)],
)  # fmt: skip
def test_focal_lengths(object_png: Path, focal_mm: float | None, focal: float, noted: bool) -> None:
    given = preprocess(object_png, PX, focal_mm)
    assert given.focal == pytest.approx(focal) and bool(given.notes) is noted


@pytest.mark.parametrize("focal_mm", [-5.0, 10.0, float("nan"), float("inf")])
def test_focal_lengths_that_cannot_be(object_png: Path, focal_mm: float) -> None:
    with pytest.raises(UsageError, match="focal"):
        preprocess(object_png, PX, focal_mm)


def test_the_users_focal_length_wins_over_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x8769] = {0xA405: 85}
    path = save(tmp_path, Image.fromarray(object_rgba()), "a.png", exif=exif)
    assert preprocess(path, PX).focal == pytest.approx(85 / 35)
    assert preprocess(path, PX, 50.0).focal == pytest.approx(50 / 35)
    exif[0x8769] = {0xA405: 0}  # EXIF's "unknown"
    path = save(tmp_path, Image.fromarray(object_rgba()), "b.png", exif=exif)
    assert preprocess(path, PX).focal == FOCAL_UNKNOWN
