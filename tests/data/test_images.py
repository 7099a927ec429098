"""Reading of images: each file gives the pixels that a viewer shows, or an error that names it."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from flatlora_diffusion.config import ConfigError, Interpolation
from flatlora_diffusion.data.crops import choose_view, image_to_tensor, view_image
from flatlora_diffusion.data.images import ImageError, find_images, load_alpha, load_image, load_mask, read_header

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# sRGB with red and green exchanged: an image that carries it shows green where it says red.
SWAPPED = SRGB.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def colour_at(path: Path, x: int = 0, y: int = 0, background: str = "white") -> tuple[int, ...]:
    image = load_image(path, background)
    assert image.mode == "RGB"
    assert image.info == {}  # nothing that a later save would write again, such as a profile
    colour = image.getpixel((x, y))
    assert isinstance(colour, tuple)
    return colour


def is_near(colour: tuple[int, ...], expected: tuple[int, ...], distance: int = 3) -> bool:
    return all(abs(a - b) <= distance for a, b in zip(colour, expected, strict=True))


def noise_image(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# What each kind of file becomes


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste(RED, (0, 0, 16, 16))  # the red corner is at the top left of the upright picture
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(stored, tmp_path / f"photo.{suffix}", exif=exif)
    assert load_image(path).size == (48, 32)
    assert is_near(colour_at(path, 4, 4), RED, 6)
    assert is_near(colour_at(path, 44, 28), WHITE, 6)


@pytest.mark.parametrize("hidden", [(0, 0, 0, 0), (255, 0, 255, 0), (255, 255, 255, 0)])
def test_colours_of_fully_transparent_pixels_are_never_visible(tmp_path: Path, hidden: tuple[int, ...]) -> None:
    path = save(Image.new("RGBA", (4, 4), hidden), tmp_path / "icon.png")
    assert colour_at(path) == WHITE
    assert colour_at(path, background="#102030") == (16, 32, 48)
    assert colour_at(path, background="navy") == (0, 0, 128)


def test_half_transparency_mixes_with_the_background(tmp_path: Path) -> None:
    path = save(Image.new("RGBA", (4, 4), (*RED, 128)), tmp_path / "icon.png")
    assert is_near(colour_at(path), (255, 127, 127), 1)
    assert is_near(colour_at(path, background="black"), (128, 0, 0), 1)
    gray = save(Image.new("LA", (4, 4), (0, 128)), tmp_path / "gray.png")
    assert is_near(colour_at(gray), (127, 127, 127), 1)


def test_opaque_colours_are_unchanged(tmp_path: Path) -> None:
    image = noise_image(9, 7)
    opaque = image.copy()
    opaque.putalpha(255)
    for path in (save(image, tmp_path / "rgb.png"), save(opaque, tmp_path / "rgba.png")):
        assert np.array_equal(np.asarray(load_image(path)), np.asarray(image))


@pytest.mark.parametrize("background", ["mauve-ish", "#ff", "#ffffff80", ""])
def test_a_background_that_is_not_an_opaque_colour_is_an_error(tmp_path: Path, background: str) -> None:
    path = save(Image.new("RGB", (4, 4)), tmp_path / "icon.png")
    expected = f"^background_color='{background}' is not an opaque colour: use a name such as white or #rrggbb$"
    with pytest.raises(ConfigError, match=expected):
        load_image(path, background)


def test_palette_images_with_and_without_transparency_are_read(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([*GREEN, *BLUE, *RED])
    image.putpixel((0, 0), 0)
    image.putpixel((1, 0), 2)
    plain = save(image, tmp_path / "plain.png")
    assert [colour_at(plain, x) for x in range(3)] == [GREEN, RED, BLUE]
    one_clear = save(image, tmp_path / "one.png", transparency=0)
    assert [colour_at(one_clear, x) for x in range(3)] == [WHITE, RED, BLUE]
    with_alpha = save(image, tmp_path / "alpha.png", transparency=bytes([0, 255, 128]))
    assert [colour_at(with_alpha, 0), colour_at(with_alpha, 2)] == [WHITE, BLUE]
    assert is_near(colour_at(with_alpha, 1), (255, 127, 127), 1)
    gif = save(image, tmp_path / "one.gif", transparency=0)
    assert [colour_at(gif, x) for x in range(3)] == [WHITE, RED, BLUE]


def test_a_transparent_colour_key_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4), BLUE)
    image.putpixel((0, 0), GREEN)
    path = save(image, tmp_path / "key.png", transparency=GREEN)
    assert [colour_at(path, 0), colour_at(path, 1)] == [WHITE, BLUE]
    gray = Image.new("L", (4, 4), 40)
    gray.putpixel((0, 0), 80)
    path = save(gray, tmp_path / "gray.png", transparency=80)
    assert [colour_at(path, 0), colour_at(path, 1)] == [WHITE, (40, 40, 40)]


def test_bilevel_and_gray_images_are_read(tmp_path: Path) -> None:
    assert colour_at(save(Image.new("1", (4, 4), 1), tmp_path / "bit.png")) == WHITE
    assert colour_at(save(Image.new("L", (4, 4), 77), tmp_path / "gray.png")) == (77, 77, 77)


def test_cmyk_images_are_read(tmp_path: Path) -> None:
    tiff = save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "print.tif")
    assert colour_at(tiff) == RED
    jpeg = save(Image.new("CMYK", (8, 8), (255, 0, 255, 0)), tmp_path / "print.jpg")
    assert is_near(colour_at(jpeg), GREEN)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_gray_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 128, 129, 257, 32896, 65535]], dtype=np.uint16)
    path = save(Image.fromarray(values), tmp_path / f"deep.{suffix}")
    assert [colour_at(path, x)[0] for x in range(6)] == [0, 0, 1, 1, 128, 255]


def test_16_bit_gray_with_a_transparent_value_is_read(tmp_path: Path) -> None:
    values = np.array([[0, 257, 514]], dtype=np.uint16)
    path = save(Image.fromarray(values), tmp_path / "deep.png", transparency=257)
    assert [colour_at(path, x)[0] for x in range(3)] == [0, 255, 2]


@pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "floating-point"), (np.int32, "32-bit")])
def test_pixels_of_unknown_range_are_an_error(tmp_path: Path, dtype: type, kind: str) -> None:
    path = save(Image.fromarray(np.full((4, 4), 100_000, dtype=dtype)), tmp_path / "data.tif")
    expected = f"data.tif cannot be read as an image: {kind} pixels; save it with 8 or 16 bits per channel"
    with pytest.raises(ImageError, match=f"^{expected}$"):
        load_image(path)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_animations_give_their_first_frame(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    path = save(frames[0], tmp_path / f"moving.{suffix}", save_all=True, append_images=frames[1:])
    assert is_near(colour_at(path), RED)


def test_icc_profiles_are_converted(tmp_path: Path) -> None:
    path = save(Image.new("RGB", (4, 4), RED), tmp_path / "wide.png", icc_profile=SWAPPED)
    assert is_near(colour_at(path), GREEN)
    standard = save(Image.new("RGB", (4, 4), (10, 120, 200)), tmp_path / "srgb.png", icc_profile=SRGB)
    assert is_near(colour_at(standard), (10, 120, 200), 1)
    gray = save(Image.new("L", (4, 4), 90), tmp_path / "gray.png", icc_profile=SRGB)
    assert is_near(colour_at(gray), (90, 90, 90), 1)


def test_icc_conversion_keeps_alpha(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 4), (*RED, 255))
    image.putpixel((0, 0), (*RED, 0))
    path = save(image, tmp_path / "wide.png", icc_profile=SWAPPED)
    assert colour_at(path, 0) == WHITE
    assert is_near(colour_at(path, 1), GREEN)


@pytest.mark.parametrize("profile", [b"not a profile", SWAPPED[:200], SRGB.replace(b"RGB XYZ ", b"CMYKXYZ ")])
def test_broken_icc_profiles_are_ignored(tmp_path: Path, profile: bytes) -> None:
    path = save(Image.new("RGB", (4, 4), RED), tmp_path / "icon.png", icc_profile=profile)
    assert colour_at(path) == RED


# What cannot be read


def test_a_file_that_is_not_an_image_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "bad icon ü.png"
    path.write_bytes(b"not an image")
    expected = "^bad icon ü.png cannot be read as an image: not in a supported image format$"
    with pytest.raises(ImageError, match=expected):
        load_image(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tif"])
def test_a_truncated_image_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = save(noise_image(64, 64), tmp_path / f"cut.{suffix}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=f"^cut.{suffix} cannot be read as an image: "):
        load_image(path)


def test_a_missing_image_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"^gone.png cannot be read as an image: No such file or directory$"):
        load_image(tmp_path / "gone.png")


def test_postscript_files_are_not_executed(tmp_path: Path) -> None:
    path = save(Image.new("RGB", (4, 4)), tmp_path / "drawing.eps")
    with pytest.raises(ImageError, match="not in a supported image format"):
        load_image(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("width", "reason"),
    [(15, "15 x 10 pixels, more than the limit of 100"), (50, "more than twice the limit of 100 pixels")],
)
def test_an_image_above_pillow_s_pixel_limit_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, reason: str
) -> None:
    path = save(Image.new("RGB", (width, 10)), tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=f"^huge.png cannot be read as an image: .*{reason}"):
        load_image(path)


def test_a_jpeg_of_more_than_25_million_pixels_is_decoded_at_half_its_size(tmp_path: Path) -> None:
    slope = Image.linear_gradient("L")
    upright = Image.Exif()
    upright[0x0112] = 6
    for size, halved in (((5001, 5001), (2501, 2501)), ((6000, 4500), (3000, 2250)), ((5000, 5000), (5000, 5000))):
        path = save(slope.resize(size), tmp_path / "photo.jpg", exif=upright)
        image = load_image(path)
        assert image.size == halved[::-1]
        with Image.open(path) as whole:
            expected = whole.reduce(2).transpose(Image.Transpose.ROTATE_270).resize(image.size)
        off = np.abs(np.asarray(image.convert("L"), dtype=float) - np.asarray(expected, dtype=float))
        assert off.mean() < 1
        assert load_alpha(path).size == image.size
    assert load_image(save(slope.resize((5001, 5001)), tmp_path / "chart.png")).size == (5001, 5001)


def test_the_mask_of_a_large_jpeg_may_have_full_or_half_size(tmp_path: Path) -> None:
    image = load_image(save(Image.new("L", (6001, 4500)), tmp_path / "photo.jpg"))
    mask = Image.new("L", (6001, 4500))
    mask.paste(255, (3000, 0, 6001, 4500))
    for shown in (mask, mask.reduce(2)):
        result = load_mask(save(shown, tmp_path / "photo-masklabel.png"), image.size)
        assert result.size == image.size
        assert (result.getpixel((1400, 100)), result.getpixel((1600, 100))) == (0, 255)
    save(mask.resize((1500, 1125)), tmp_path / "photo-masklabel.png")
    with pytest.raises(ImageError, match=r"1500 x 1125 pixels.* 3001 x 2250"):
        load_mask(tmp_path / "photo-masklabel.png", image.size)


def jpeg_that_says(width: int, height: int) -> bytes:
    """A small JPEG whose header tells another size."""
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "JPEG")
    packed = buffer.getvalue()
    place = packed.index(b"\xff\xc0") + 5
    return packed[:place] + struct.pack(">HH", height, width) + packed[place + 4 :]


def test_a_jpeg_of_more_than_100_million_pixels_is_rejected_before_decoding() -> None:
    with pytest.raises(ImageError, match="10001 x 10000 pixels, more than the limit of 100000000; make it smaller"):
        load_image(jpeg_that_says(10001, 10000))


@pytest.mark.parametrize("kind", ["png", "bmp"])
def test_an_icon_with_a_larger_image_than_its_header_says_is_rejected_before_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = tmp_path / "icon.ico"
    Image.new("RGBA", (32, 24), RED).save(path, bitmap_format=kind, sizes=[(32, 24)])
    assert load_image(path).size == (32, 24)
    packed = path.read_bytes()
    sizes = {"png": struct.pack(">II", 5000, 5001), "bmp": struct.pack("<ii", 5000, 5001)}
    place = 22 + {"png": 16, "bmp": 4}[kind]
    path.write_bytes(packed[:place] + sizes[kind] + packed[place + 8 :])

    def open_it(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Image, "open", open_it)
    for read in (load_image, read_header):
        with pytest.raises(ImageError, match="an icon of 5000 x 5001 pixels, more than the limit of 25000000"):
            read(path)


def png_with_chunk(kind: bytes, data: bytes) -> bytes:
    """A small PNG with one more chunk after its header."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return buffer.getvalue()[:33] + chunk + buffer.getvalue()[33:]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            png_with_chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(2**21))),
            "a text that unpacks to more than a mega",
        ),
        (b"P6 12\xb03456789012 8 255\n", "Token too long in file header"),
        (b"P6 x 8 255\n", "invalid literal for int"),
        (b"P6 0 8 255\n", ""),
        (b"GIF89a\0\0\0\0\0\0\0;", ""),
        (b"BM" + bytes(60), ""),
    ],
    ids=["text", "token", "number", "zero", "gif-zero", "bmp-zero"],
)
def test_any_error_of_pillow_becomes_one_sentence_with_the_file(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "odd.bin"
    path.write_bytes(content)
    for read in (load_image, load_alpha, read_header):
        with pytest.raises(ImageError, match=rf"^odd.bin cannot be read as an image: [^\n]*{reason}[^\n]*$"):
            read(path)
    assert find_images(tmp_path)[0] == []


def test_an_extremely_narrow_image_is_rejected_before_it_is_enlarged(tmp_path: Path) -> None:
    path = save(Image.new("L", (1, 60_000)), tmp_path / "line.png")
    with pytest.raises(ImageError, match="1 x 60000 pixels, one side more than 50 times the other; crop it"):
        load_image(path)
    assert load_image(save(Image.new("L", (2, 100)), tmp_path / "thin.png")).size == (2, 100)


def test_a_file_with_several_images_gives_the_first(tmp_path: Path) -> None:
    second = Image.new("RGB", (8, 8), BLUE)
    path = save(Image.new("RGB", (8, 8), RED), tmp_path / "two.mpo", save_all=True, append_images=[second])
    assert Image.open(path).format == "MPO"
    assert is_near(colour_at(path), RED)
    assert read_header(path).kind == "JPEG"


# Which files of a folder are images


def test_find_images_recognizes_images_by_content_and_lists_skipped_files(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "C.webp", "ü.gif"):
        save(Image.new("RGB", (4, 4)), tmp_path / name)
    save(Image.new("RGB", (4, 4)), tmp_path / "no_suffix", format="PNG")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    (tmp_path / "notes.pdf").write_bytes(b"%PDF-1.4")
    (tmp_path / "more").mkdir()
    for quiet in ("a.txt", "b.caption", "b.JSON", "metadata.jsonl", ".DS_Store", ".hidden.png"):
        (tmp_path / quiet).write_text("x")
    (tmp_path / "__pycache__").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    images, skipped = find_images(tmp_path)
    assert [path.name for path in images] == ["C.webp", "a.jpg", "b.png", "no_suffix", "ü.gif"]
    assert skipped == [
        ("broken.png", "not in a supported image format"),
        ("more", "a subfolder; only images directly in the folder are read"),
        ("notes.pdf", "not in a supported image format"),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_find_images_does_not_list_text_files_and_folders_as_skipped(tmp_path: Path) -> None:
    save(Image.new("RGB", (4, 4)), tmp_path / "a.png")
    for text in ("LICENSE", "README.md", "build.py", "notes.CSV"):
        (tmp_path / text).write_text("Für alle", encoding="utf-8")
    (tmp_path / "heldout").mkdir()
    assert find_images(tmp_path) == ([tmp_path / "a.png"], [])
    (tmp_path / "camera").write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF")  # an image without a suffix that broke
    (tmp_path / "drawing.svg").write_text("<svg/>", encoding="utf-8")
    assert [name for name, _ in find_images(tmp_path)[1]] == ["camera", "drawing.svg"]


def test_find_images_skips_truncated_files(tmp_path: Path) -> None:
    path = save(noise_image(64, 64), tmp_path / "cut.jpg")
    path.write_bytes(path.read_bytes()[:1500])
    images, skipped = find_images(tmp_path)
    assert images == []
    assert [name for name, _ in skipped] == ["cut.jpg"]
    assert "truncated" in skipped[0][1]


def test_find_images_without_a_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^image folder .*absent does not exist$"):
        find_images(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^image folder .*file is not a folder$"):
        find_images(tmp_path / "file")


# Crop and flip


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def crop_and_flip(
    image: Image.Image,
    resolution: int,
    center_crop: bool,
    random_flip: bool,
    rng: torch.Generator,
    interpolation: Interpolation = "lanczos",
) -> tuple[torch.Tensor, tuple[int, int], tuple[int, int]]:
    """Pixels, original size and corner of a square crop, as batches and probes are made of them."""
    view = choose_view((image.height, image.width), (resolution, resolution), center_crop, random_flip, rng)
    return image_to_tensor(view_image(image, view, interpolation)), view.original_size, view.crop_top_left


def test_pixels_and_micro_conditioning_of_a_centre_crop() -> None:
    pixels, original_size, top_left = crop_and_flip(noise_image(100, 60), 30, True, False, rng())
    assert pixels.shape == (3, 30, 30)
    assert pixels.dtype == torch.float32
    assert original_size == (60, 100)
    assert top_left == (0, 10)
    white, *_ = crop_and_flip(Image.new("RGB", (8, 8), "white"), 8, True, False, rng())
    black, *_ = crop_and_flip(Image.new("RGB", (8, 8), "black"), 8, True, False, rng())
    assert torch.equal(white, torch.ones(3, 8, 8))
    assert torch.equal(black, -torch.ones(3, 8, 8))


@pytest.mark.parametrize("interpolation", ["lanczos", "bilinear", "nearest"])
@pytest.mark.parametrize("size", [(100, 61), (61, 100), (50, 50), (20, 31)])
def test_a_centre_crop_equals_the_transforms_of_diffusers(size: tuple[int, int], interpolation: str) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    mode = transforms.InterpolationMode[interpolation.upper()]
    chain = [transforms.Resize(32, mode), transforms.CenterCrop(32), transforms.ToTensor()]
    expected = transforms.Compose([*chain, transforms.Normalize([0.5], [0.5])])(noise_image(*size))
    pixels, *_ = crop_and_flip(noise_image(*size), 32, True, False, rng(), interpolation)  # type: ignore[arg-type]
    assert torch.equal(pixels, expected)


def test_random_crops_cover_the_whole_image_and_report_their_corner() -> None:
    image = noise_image(40, 30)
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 * 2 - 1
    corners = set()
    for seed in range(200):
        pixels, original_size, (top, left) = crop_and_flip(image, 30, False, False, rng(seed))
        assert torch.equal(pixels, whole[:, top : top + 30, left : left + 30])
        assert original_size == (30, 40)
        corners.add((top, left))
    assert corners == {(0, left) for left in range(11)}


def test_half_of_the_images_are_flipped_and_flips_do_not_change_the_crop() -> None:
    image = noise_image(40, 30)
    flips = 0
    for seed in range(200):
        plain, _, corner = crop_and_flip(image, 30, False, False, rng(seed))
        pixels, _, flipped_corner = crop_and_flip(image, 30, False, True, rng(seed))
        assert flipped_corner == corner
        flips += not torch.equal(pixels, plain)
    assert 70 < flips < 130


def test_a_flip_comes_before_the_crop() -> None:
    image = noise_image(40, 30)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    seed = next(seed for seed in range(100) if torch.rand(3, generator=rng(seed))[0] < 0.5)
    flipped, *_ = crop_and_flip(image, 30, False, True, rng(seed))
    expected, *_ = crop_and_flip(mirrored, 30, False, False, rng(seed))
    assert torch.equal(flipped, expected)


def test_crop_and_flip_is_a_function_of_its_generator() -> None:
    state = torch.get_rng_state()
    first, *_ = crop_and_flip(noise_image(40, 30), 16, False, True, rng(3))
    again, *_ = crop_and_flip(noise_image(40, 30), 16, False, True, rng(3))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
