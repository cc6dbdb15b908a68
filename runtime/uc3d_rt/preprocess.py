"""Any image file to the square network input.

`load_image` reads whatever Pillow reads into straight-alpha RGBA; `background` cuts the object
out where the file brings no alpha; `frame_object` centres it on white.  Training frames its
renders on their device in the same `Frame`, and a test holds the two together.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageCms, ImageOps, UnidentifiedImageError

from uc3d_rt.contract import FOCAL_UNKNOWN
from uc3d_rt.errors import ImageError, UsageError
from uc3d_rt.views import BOUNDING_RADIUS, FOCAL_LENGTHS_MM, REFERENCE_FOCAL_MM, SENSOR_HALF_WIDTH_MM

ByteArray = NDArray[np.uint8]
FloatArray = NDArray[np.float32]
ImageSource = str | Path | Image.Image | NDArray[np.generic]
"""What `preprocess` takes: a path, a Pillow image, or an RGB / RGBA array (H, W, 3 or 4)."""

FILL = 0.82
"""The longer side of the object's box over the side of the square."""

SOLID = 127
"""Alpha above this belongs to the object's box."""

MIN_SIDE_PX = 16
MAX_PIXELS = 64_000_000
"""A picture of more pixels is refused from its header, before anything is decoded."""

_MIN_OBJECT_PX = 8  # below this the box holds nothing a network could see
_SMALL_OBJECT_PX = 64  # below this the user is told
_OPAQUE = 250  # an alpha channel that nowhere falls below this cuts nothing out
_EXIF_IFD, _FOCAL_IN_35MM = 0x8769, 0xA405
_UNSAFE_FORMATS = frozenset({"EPS"})  # decoded by running Ghostscript
# What Pillow's decoders raise on damaged files.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


@dataclass(frozen=True)
class SourceImage:
    """A decoded picture, upright, sRGB."""

    rgba: ByteArray  # (H, W, 4), straight alpha
    focal_mm: float | None  # 35 mm equivalent from EXIF
    has_alpha: bool  # whether alpha cuts the object out; an all-opaque channel does not count
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conditioning:
    """What the networks are told about the input."""

    image: FloatArray  # (3, px, px), sRGB in [0, 1], white background
    focal: float  # f~ = focal_mm / 35; 0 orthographic, FOCAL_UNKNOWN
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Frame:
    """A square of a picture, in pixels from its upper left corner; it may reach beyond the border."""

    left: float
    top: float
    side: float

    @property
    def pixels(self) -> tuple[int, int, int, int]:
        """Whole pixels `(left, top, right, bottom)` that hold the square, for `Image.crop`."""
        left, top, side = int(np.floor(self.left)), int(np.floor(self.top)), int(np.ceil(self.side)) + 1
        return left, top, left + side, top + side

    @property
    def within(self) -> tuple[float, float, float, float]:
        """The square in the picture cropped to `pixels`, for `Image.resize`."""
        left, top = self.left - int(np.floor(self.left)), self.top - int(np.floor(self.top))
        return left, top, left + self.side, top + self.side


def frame_object(rgba: ByteArray, image_px: int) -> ByteArray:
    """Crop to the object, centre it on a white square, its longer side filling `FILL` of it.

    Args:
        rgba: (H, W, 4), straight alpha; the object is where alpha > 127.
        image_px: side of the result.

    Returns:
        (image_px, image_px, 3) sRGB, resampled with premultiplied alpha and antialiasing.

    Raises:
        ImageError: alpha is nowhere above 127.
    """
    frame = frame_of_box(*object_box(rgba[..., 3]))
    # "RGBa" is premultiplied; a crop beyond the border is filled with transparent black.
    premultiplied = Image.fromarray(rgba).crop(frame.pixels).convert("RGBa")
    square = premultiplied.resize(
        (image_px, image_px),
        Image.Resampling.HAMMING,  # no overshoot at the outline, half the time of bicubic
        box=frame.within,
    )
    red, green, blue, alpha = square.split()
    white = ImageChops.invert(alpha)  # what premultiplied white adds behind each pixel
    return np.asarray(Image.merge("RGB", [ImageChops.add(band, white) for band in (red, green, blue)]))


def frame_of_box(left: int, top: int, right: int, bottom: int) -> Frame:
    """The square around a box of pixels, whose longer side fills `FILL` of it."""
    side = max(right - left, bottom - top) / FILL
    return Frame((left + right - side) / 2, (top + bottom - side) / 2, side)


def object_box(alpha: ByteArray) -> tuple[int, int, int, int]:
    """Pixel-edge box `(left, top, right, bottom)` of alpha (H, W) > 127.

    Raises:
        ImageError: there is no such pixel.
    """
    solid = alpha > SOLID
    columns, rows = np.flatnonzero(solid.any(axis=0)), np.flatnonzero(solid.any(axis=1))
    if not columns.size:
        raise ImageError("the image is transparent everywhere; give one in which the object is opaque")
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def load_image(path: str | Path) -> SourceImage:
    """Decode a picture: upright, sRGB, straight alpha; of an animation the first frame.

    Raises:
        ImageError: missing, empty, no image, damaged, under 16 px a side, over 64 megapixels,
            transparent everywhere, or of one colour everywhere.
    """
    path = Path(path)
    if not path.exists():
        raise ImageError(f"{path} does not exist; check the path")
    if not path.is_file():
        raise ImageError(f"{path} is not a file; give one image file")
    try:
        if path.stat().st_size == 0:
            raise ImageError(f"{path} is empty (0 bytes); fetch or save it again")
        with _open_header(path) as picture:
            return source_from_picture(picture, str(path))
    except PermissionError as error:
        raise ImageError(f"{path} cannot be read: permission denied; change its permissions") from error


def source_from_picture(picture: Image.Image, name: str = "the image") -> SourceImage:
    """Decode an opened Pillow image; `name` stands in messages.  Raises as `load_image`."""
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name} is {width}×{height} px ({width * height / 1e6:.0f} megapixels); "
            f"shrink it to at most {MAX_PIXELS // 1_000_000} megapixels"
        )
    if min(width, height) < MIN_SIDE_PX:
        raise ImageError(
            f"{name} is {width}×{height} px; give one of at least {MIN_SIDE_PX}×{MIN_SIDE_PX} px"
        )
    notes = []
    try:
        frames = getattr(picture, "n_frames", 1)
        # A phone's MPO holds the picture and its thumbnails or depth: no animation.
        if frames > 1 and picture.format != "MPO":
            notes.append(f"the image holds {frames} frames; only the first is used")
        picture.load()
    except _DECODE_ERRORS as error:
        raise ImageError(f"{name} is damaged or cut short ({error}); fetch or save it again") from error
    focal_mm = _focal_in_35mm(picture)
    try:
        picture = ImageOps.exif_transpose(picture)
    except _DECODE_ERRORS:
        notes.append("the EXIF data is damaged; orientation and focal length are not used")
    rgba = _straight_rgba(picture, notes)
    alpha = rgba[..., 3]
    if int(alpha.max()) == 0:
        raise ImageError(f"{name} is fully transparent; give one in which the object is opaque")
    has_alpha = int(alpha.min()) < _OPAQUE
    if not has_alpha:
        rgba[..., 3] = 255
        lows, highs = rgba.min(axis=(0, 1)).astype(int), rgba.max(axis=(0, 1)).astype(int)
        if int((highs - lows).max()) <= 2:
            raise ImageError(f"{name} is blank (one colour everywhere); give one that shows an object")
    return SourceImage(rgba, focal_mm, has_alpha, tuple(notes))


def preprocess(source: ImageSource, image_px: int, focal_mm: float | None = None) -> Conditioning:
    """Read, cut out and frame a picture for the networks.

    Args:
        source: path, Pillow image, or RGB / RGBA array (H, W, 3 or 4), uint8 or float in [0, 1].
        image_px: side the networks expect.
        focal_mm: 35 mm equivalent; overrides EXIF; 0 says orthographic.

    Raises:
        ImageError: as `load_image`, or no object stands out from the background.
        UsageError: `focal_mm` would put the camera inside the object.
    """
    if isinstance(source, np.ndarray):
        picture = source_from_picture(_picture_from_array(source))
    elif isinstance(source, Image.Image):
        picture = source_from_picture(source)
    else:
        picture = load_image(source)
    notes = list(picture.notes)
    rgba = picture.rgba
    if not picture.has_alpha:
        # scikit-image and scipy load only here: RGBA input never waits for them.
        from uc3d_rt.background import cut_out

        rgba, doubts = cut_out(rgba[..., :3])
        notes += doubts
    left, top, right, bottom = object_box(rgba[..., 3])
    long_px = max(right - left, bottom - top)
    if long_px < _MIN_OBJECT_PX:
        raise ImageError(f"the object is only {long_px} px wide; give a larger picture of it")
    if long_px < _SMALL_OBJECT_PX:
        notes.append(f"the object is only {long_px} px wide; a larger picture gives a sharper result")
    if picture.has_alpha and _cut_by_border(rgba[..., 3]):
        notes.append("the object touches the image border; if it is cut off there, so is the mesh")
    framed = frame_object(rgba, image_px).astype(np.float32) / np.float32(255.0)
    focal = normalized_focal(picture.focal_mm if focal_mm is None else focal_mm, notes, focal_mm is not None)
    return Conditioning(np.ascontiguousarray(framed.transpose(2, 0, 1)), focal, tuple(notes))


def normalized_focal(focal_mm: float | None, notes: list[str], asked: bool) -> float:
    """`f~` of a 35 mm-equivalent focal length; None is unknown, 0 orthographic.

    Outside the trained range the nearest trained value is taken, and `notes` says so.

    Raises:
        UsageError: `asked` for by the user, and inside the object.
    """
    if focal_mm is None:
        return FOCAL_UNKNOWN
    if focal_mm == 0.0:
        return 0.0
    shortest = SENSOR_HALF_WIDTH_MM * BOUNDING_RADIUS
    if asked and not shortest < focal_mm < np.inf:
        raise UsageError(
            f"a focal length of {focal_mm:g} mm cannot show the whole object; give the 35 mm "
            f"equivalent, more than {shortest:.1f} mm, or 0 for an orthographic picture"
        )
    trained = float(np.clip(focal_mm, min(FOCAL_LENGTHS_MM), max(FOCAL_LENGTHS_MM)))
    if trained != focal_mm:
        notes.append(f"focal length {focal_mm:g} mm is outside the trained range; {trained:g} mm is used")
    return trained / REFERENCE_FOCAL_MM


def _open_header(path: Path) -> Image.Image:
    Image.init()
    formats = [name for name in Image.ID if name not in _UNSAFE_FORMATS]
    try:
        with warnings.catch_warnings():
            # Our own, lower limit follows; Pillow's warning would come first.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(path, formats=formats)
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{path} is too large ({str(error).split(',')[0]}); "
            f"shrink it to at most {MAX_PIXELS // 1_000_000} megapixels"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{path} is not an image that can be read; give a PNG, JPEG or WebP file") from error
    except PermissionError:
        raise
    except _DECODE_ERRORS as error:
        raise ImageError(f"{path} is damaged or cut short ({error}); fetch or save it again") from error


def _focal_in_35mm(picture: Image.Image) -> float | None:
    try:
        value = picture.getexif().get_ifd(_EXIF_IFD).get(_FOCAL_IN_35MM)
        focal_mm = float(value) if value is not None else 0.0
    except (*_DECODE_ERRORS, TypeError, ZeroDivisionError, KeyError):
        return None
    return focal_mm if 0.0 < focal_mm < np.inf else None  # EXIF writes 0 for unknown


def _straight_rgba(picture: Image.Image, notes: list[str]) -> ByteArray:
    """(H, W, 4) uint8 of a picture of any mode, a fresh array."""
    mode = picture.mode
    if mode.startswith("I") or mode == "F":
        picture = Image.fromarray(_eight_bit(np.asarray(picture)))
    profile = picture.info.get("icc_profile")
    if profile and mode in ("RGB", "RGBA", "CMYK"):
        alpha = picture.getchannel("A") if mode == "RGBA" else None
        opaque = picture.convert("RGB") if mode == "RGBA" else picture
        try:
            picture = _to_srgb(opaque, profile)
        except (ImageCms.PyCMSError, *_DECODE_ERRORS):
            notes.append("the colour profile of the image is damaged and not used")
        else:
            if alpha is not None:
                picture.putalpha(alpha)
    return np.array(picture.convert("RGBA"))


def _to_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    from io import BytesIO

    converted = ImageCms.profileToProfile(
        picture, ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert converted is not None  # only in-place conversion returns None
    return converted


def _eight_bit(values: NDArray[np.generic]) -> ByteArray:
    """Grey (H, W) of 16 or 32 bits or floats, scaled to 8 bits."""
    grey = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    top = grey.max(initial=0.0)
    if values.dtype.kind == "f":
        full = 1.0 if top <= 1.0 else max(top, 255.0)
    elif values.dtype.itemsize == 2:
        full = 65535.0
    else:  # 32-bit containers hold 8- or 16-bit data
        full = 255.0 if top <= 255.0 else max(top, 65535.0)
    return np.clip(grey / full * 255.0 + 0.5, 0, 255).astype(np.uint8)


def _picture_from_array(array: NDArray[np.generic]) -> Image.Image:
    if array.ndim != 3 or array.shape[2] not in (3, 4):
        raise ImageError(f"an image array must be (H, W, 3) or (H, W, 4), got {array.shape}")
    if array.dtype.kind == "f":
        values = array.astype(np.float32)
        if not np.isfinite(values).all() or values.min() < 0.0 or values.max() > 1.0:
            raise ImageError("a float image array must lie in [0, 1]; scale it first")
        array = np.round(values * 255.0).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ImageError(f"an image array must be uint8, or float in [0, 1], got {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array))


def _cut_by_border(alpha: ByteArray) -> bool:
    """Whether a good part of one border runs through the object, more than a tight crop's touch."""
    edges = (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1])
    return any(float((edge > SOLID).mean()) > 0.1 for edge in edges)
