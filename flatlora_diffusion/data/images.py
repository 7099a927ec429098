"""Reading of images, shared by the trainer and the app's previews, so that both see the same pixels."""

from __future__ import annotations

import codecs
import glob
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from flatlora_diffusion.config import ConfigError

# Supported formats with their suffix. Not all that Pillow reads: EPS would start Ghostscript.
FORMATS = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "WEBP": ".webp",
    "AVIF": ".avif",
    "GIF": ".gif",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "PPM": ".ppm",
    "ICO": ".ico",
    "JPEG2000": ".jp2",
}
CAPTION_SUFFIXES = (".txt", ".caption")
# Files beside images that are never read as images.
SIDECAR_SUFFIXES = (*CAPTION_SUFFIXES, ".json", ".jsonl")
MASK = "-masklabel"  # suffix of the stem of a file with the loss weights of an image's pixels
HELDOUT_FOLDER = "heldout"  # the folder of held-out images beside the training images
# Text files, which are skipped without mention.
_TEXT_SUFFIXES = (".md", ".rst", ".csv", ".yaml", ".yml", ".toml", ".ini", ".log", ".py", ".sh", ".bat", ".ipynb")

_MAX_ASPECT_RATIO = 50  # resizing a thinner image to cover a square would need gigabytes
_HALVED_FROM, _MAX_JPEG_PIXELS = 25_000_000, 100_000_000
_MAX_ICON_PIXELS = 25_000_000
_ICON_START, _PNG_START = b"\0\0\1\0", b"\x89PNG\r\n\x1a\n"

Source = Path | bytes  # a file or its encoded bytes


class ImageError(ConfigError):
    """A file that cannot be read as an image; `reason` is the cause without the file's name."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} cannot be read as an image: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Header:
    """Pillow's name of an image's format, and its size in pixels before rotation by EXIF."""

    kind: str
    width: int
    height: int


def load_image(source: Source, background: str = "white") -> Image.Image:
    """Read an image as an upright 8-bit sRGB picture on `background`, without metadata.

    EXIF orientation is applied, ICC profiles are converted (broken ones ignored), 16-bit gray is scaled to 8 bits, and
    only the first picture of animations and multi-page files is read. A JPEG of more than 25 million pixels is decoded
    at half its width and height, which takes a quarter of the memory.

    Args:
        background: a colour name or hex value for transparent pixels.

    Raises:
        ImageError: the file cannot be read.
        ConfigError: the colour is invalid.
    """
    fill = _opaque_colour(background)
    with _read_errors(source):
        colour, alpha = _decode(source)
    canvas = Image.new("RGB", colour.size, fill)
    canvas.paste(colour, mask=alpha)
    return canvas


def load_alpha(source: Source) -> Image.Image:
    """Read the upright alpha channel (mode L); 255 everywhere for an image without alpha. Raises ImageError."""
    with _read_errors(source):
        colour, alpha = _decode(source)
    return Image.new("L", colour.size, 255) if alpha is None else alpha


def load_mask(mask: Path, size: tuple[int, int]) -> Image.Image:
    """Read the mask (mode L) of an image of this (width, height). Raises ImageError for another size."""
    with _read_errors(mask):
        colour, _ = _decode(mask)
    if colour.size != size and tuple((side + 1) // 2 for side in colour.size) == size:
        colour = colour.reduce(2)  # the image is a large JPEG
    if colour.size != size:
        (width, height), (wide, high) = size, colour.size
        raise ImageError(mask.name, f"it has {wide} x {high} pixels, but its image has {width} x {height}")
    return colour.convert("L")


def mask_beside(image: Path) -> Path | None:
    """Return the mask file of an image, `NAME-masklabel.png` as in OneTrainer; None without one."""
    mask = image.with_name(f"{image.stem}{MASK}.png")
    return mask if mask.is_file() else None


def read_header(source: Source) -> Header:
    """Read format and size without decoding pixels. Raises ImageError."""
    with _read_errors(source), _open(source) as file:
        # Pillow calls a JPEG with several pictures MPO; other tools see a JPEG.
        kind = "JPEG" if file.format == "MPO" else str(file.format)
        return Header(kind, file.width, file.height)


def find_images(folder: Path, only_headers: bool = False) -> tuple[list[Path], list[tuple[str, str]]]:
    """Find the readable images directly in `folder`.

    A file is an image if it decodes completely, whatever its suffix; with `only_headers`, which is fast, if its header
    can be read.

    Returns:
        The paths sorted by name, and (name, reason) of each skipped file. Hidden files, captions, JSON, texts and the
        folder `heldout` are not reported.

    Raises:
        ConfigError: `folder` is not a folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"image folder {folder} {'is not a folder' if folder.exists() else 'does not exist'}")
    images, skipped = [], []
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if not path.name.startswith("__") and path.name != HELDOUT_FOLDER:  # __pycache__, __MACOSX
                skipped.append((path.name, "a subfolder; only images directly in the folder are read"))
            continue
        if path.suffix.lower() in SIDECAR_SUFFIXES or _is_mask(path):
            continue
        try:
            with _read_errors(path):
                read_header(path) if only_headers else _decode(path)
        except ImageError as error:
            if not _is_text(path):
                skipped.append((path.name, error.reason))
        else:
            images.append(path)
    return images, skipped


def _is_mask(path: Path) -> bool:
    """Whether `path` is the mask of an image beside it."""
    stem = path.stem.removesuffix(MASK)
    if stem == path.stem:
        return False
    return any(file.suffix.lower() not in SIDECAR_SUFFIXES for file in path.parent.glob(f"{glob.escape(stem)}.*"))


def _is_text(path: Path) -> bool:
    """Whether a file is a text, by its suffix, or by its content if it has no suffix."""
    if path.suffix:
        return path.suffix.lower() in _TEXT_SUFFIXES
    try:
        with path.open("rb") as file:
            return "\0" not in codecs.getincrementaldecoder("utf-8")().decode(file.read(4096))
    except (OSError, UnicodeDecodeError):
        return False


def _opaque_colour(background: str) -> tuple[int, ...]:
    try:
        colour = ImageColor.getrgb(background)
    except ValueError:
        colour = None
    if colour is None or len(colour) != 3:
        raise ConfigError(
            f"background_color={background!r} is not an opaque colour: use a name such as white or #rrggbb"
        )
    return colour


@contextmanager
def _read_errors(source: Source) -> Iterator[None]:
    """Convert any exception that a damaged file causes in Pillow to an ImageError."""
    try:
        yield
    except Exception as error:  # Pillow's parsers raise errors of many types on damaged files
        name = source.name if isinstance(source, Path) else "an image of the dataset"
        raise ImageError(name, _reason(error)) from error


def _open(source: Source) -> Image.Image:
    with open(source, "rb") if isinstance(source, Path) else io.BytesIO(source) as file:
        _check_icon(file)
    return Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=tuple(FORMATS))


def _check_icon(file: BinaryIO) -> None:
    """Raise ValueError for an icon with too large a picture, because Pillow decodes icons on opening.

    The sizes are read from the pictures, because an icon's directory may have wrong ones.
    """
    start = file.read(6)
    if not start.startswith(_ICON_START):
        return
    directory = file.read(16 * int.from_bytes(start[4:], "little"))
    for entry in range(0, len(directory) - 15, 16):
        file.seek(int.from_bytes(directory[entry + 12 : entry + 16], "little"))
        header = file.read(24)
        if header.startswith(_PNG_START):
            width, height = int.from_bytes(header[16:20]), int.from_bytes(header[20:])
        else:  # a bitmap and its mask, one above the other
            width, height = (abs(int.from_bytes(header[at : at + 4], "little", signed=True)) for at in (4, 8))
        if width * height > _MAX_ICON_PIXELS:
            raise ValueError(f"an icon of {width} x {height} pixels, more than the limit of {_MAX_ICON_PIXELS}")


def _decode(source: Source) -> tuple[Image.Image, Image.Image | None]:
    """Return the upright sRGB colours (mode RGB) and the alpha channel (mode L), if any. Raises as Pillow does."""
    with _open(source) as file:
        width, height = file.size
        is_jpeg = isinstance(file, JpegImageFile)
        # Pillow only warns up to twice MAX_IMAGE_PIXELS.
        limit = _MAX_JPEG_PIXELS if is_jpeg else Image.MAX_IMAGE_PIXELS
        if limit is not None and width * height > limit:
            raise ValueError(f"{width} x {height} pixels, more than the limit of {limit}; make it smaller")
        if max(file.size) > _MAX_ASPECT_RATIO * min(file.size):
            raise ValueError(
                f"{width} x {height} pixels, one side more than {_MAX_ASPECT_RATIO} times the other; crop it"
            )
        if is_jpeg and width * height > _HALVED_FROM:
            file.draft(None, (width // 2, height // 2))
        ImageOps.exif_transpose(file, in_place=True)
        colour, alpha = _split_alpha(_to_8_bits(file))
        return _to_srgb(colour, file.info.get("icc_profile")), alpha


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray modes to L (Pillow's conversion would clip at 255); return other modes unchanged."""
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits per channel")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels; save it with 8 or 16 bits per channel")
    gray = Image.fromarray(np.round(values / 257).astype(np.uint8))
    if "transparency" in image.info:  # PNG: the one gray value that means transparent
        gray.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return gray


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours as L, RGB or CMYK, the modes of ICC profiles, and the alpha channel."""
    if image.mode in ("L", "CMYK") and not image.has_transparency_data:
        return image, None
    if image.mode in ("L", "LA", "La"):
        gray = image.convert("LA")
        return gray.getchannel("L"), gray.getchannel("A")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A")
    return image.convert("RGB"), None


def _to_srgb(colour: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert to RGB by the embedded profile, or by Pillow's conversion if it is missing, broken or unsuitable."""
    if not profile:
        return colour.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if colour.mode == "L" and source.profile.xcolor_space.strip() == "RGB":
            colour = colour.convert("RGB")
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), colour.mode, "RGB").apply(colour)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return colour.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not in a supported image format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, Image.DecompressionBombError):
        return f"more than twice the limit of {Image.MAX_IMAGE_PIXELS} pixels; make it smaller"
    text = " ".join(str(error).split())
    if "MAX_TEXT_" in text:  # Pillow's limit for compressed texts
        return "it carries a text that unpacks to more than a megabyte; save it again without metadata"
    return text or type(error).__name__
