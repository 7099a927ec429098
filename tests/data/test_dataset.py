"""Reading of a training set: captions, metadata and error messages."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.data.dataset import load_samples, manifest


def add_image(folder: Path, name: str, caption: str | None = None, size: tuple[int, int] = (6, 4)) -> Path:
    path = folder / name
    Image.new("RGB", size, "red").save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def add_metadata(folder: Path, *rows: Any) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def captions(folder: Path, *args: str | None) -> dict[str, str]:
    return {sample.id: sample.caption for sample in load_samples(folder, *args).samples}


# Captions


def test_samples_are_sorted_and_described(tmp_path: Path) -> None:
    path = add_image(tmp_path, "b.png", "a TOK icon", size=(8, 5))
    add_image(tmp_path, "a.png", "another")
    first, second = load_samples(tmp_path).samples
    assert (first.id, second.id) == ("a.png", "b.png")
    assert second.source == path
    assert second.caption == "a TOK icon"
    assert second.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (second.width, second.height) == (8, 5)


def test_sizes_are_those_of_the_upright_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("jpg", "png", "tif"):
        Image.new("RGB", (20, 10)).save(tmp_path / f"a.{suffix}", exif=exif)
    assert {(sample.width, sample.height) for sample in load_samples(tmp_path, "a").samples} == {(10, 20)}


def test_caption_files_are_read_as_a_single_line(tmp_path: Path) -> None:
    add_image(tmp_path, "a.png", "\ufeffein Würfel,\n  blau \r\n")
    add_image(tmp_path, "b.v2.png")
    (tmp_path / "b.v2.caption").write_text("from .caption")
    add_image(tmp_path, "c.png", "from .txt")
    (tmp_path / "c.caption").write_text("from .caption")
    assert captions(tmp_path) == {"a.png": "ein Würfel, blau", "b.v2.png": "from .caption", "c.png": "from .txt"}


def test_captions_come_from_metadata_then_caption_files_then_the_instance_prompt(tmp_path: Path) -> None:
    add_image(tmp_path, "a.png", "sidecar a")
    add_image(tmp_path, "b.png", "sidecar b")
    add_image(tmp_path, "c.png", "  \n")
    add_image(tmp_path, "d.png")
    add_metadata(tmp_path, {"file_name": "a.png", "text": "line\u2028a"}, "", {"file_name": "d.png", "text": None})
    result = load_samples(tmp_path, "the prompt")
    assert [sample.caption for sample in result.samples] == ["line a", "sidecar b", "the prompt", "the prompt"]
    assert result.captioned == 2
    assert result.summary.startswith("4 images, captions 2/4, ")


@pytest.mark.parametrize("column", ["text", "prompt", "caption"])
def test_the_caption_column_is_found_by_its_known_names(tmp_path: Path, column: str) -> None:
    add_image(tmp_path, "a.png")
    add_metadata(tmp_path, {"file_name": "a.png", "note": "no", column: "yes"})
    assert captions(tmp_path) == {"a.png": "yes"}


def test_the_given_caption_column_is_used(tmp_path: Path) -> None:
    add_image(tmp_path, "a.png")
    add_metadata(tmp_path, {"file_name": "a.png", "text": "no", "note": "yes"})
    assert captions(tmp_path, None, "note") == {"a.png": "yes"}


def test_images_without_captions_use_the_instance_prompt(tmp_path: Path) -> None:
    add_image(tmp_path, "a.png")
    result = load_samples(tmp_path, " a photo of sks dog ")
    assert result.samples[0].caption == "a photo of sks dog"
    assert result.summary.startswith("1 image, captions 0/1, ")


def test_the_summary_lists_skipped_files(tmp_path: Path) -> None:
    add_image(tmp_path, "a.png", "a")
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    result = load_samples(tmp_path)
    assert result.skipped == [("notes.pdf", "not in a supported image format")]
    assert result.summary == (
        "1 image, captions 1/1, 6 x 4 pixels; skipped: notes.pdf (not in a supported image format)"
    )
    for number in range(9):
        (tmp_path / f"x{number}.pdf").touch()
    assert load_samples(tmp_path).summary.endswith("x3.pdf (not in a supported image format) and 5 more")


def test_reading_a_folder_does_not_change_it(tmp_path: Path) -> None:
    add_image(tmp_path, "a.png", "a")
    add_image(tmp_path, "b.jpg")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    load_samples(tmp_path, "prompt")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# Refusals


def check_refused(folder: Path, message: str, *args: str | None) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        load_samples(folder, *args)


def test_a_missing_caption_is_an_error_with_the_image_and_a_remedy(tmp_path: Path) -> None:
    add_image(tmp_path, "a.png", "a")
    add_image(tmp_path, "b.png")
    ways_out = "write it to b.txt beside the image, or give an --instance_prompt"
    check_refused(tmp_path, f"b.png has no caption: {ways_out}")
    check_refused(tmp_path, f"b.png has no caption: {ways_out}", "  ")
    add_image(tmp_path, "c.png", "")
    check_refused(tmp_path, f"b.png and 1 more have no caption: {ways_out}")


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    check_refused(tmp_path / "absent", f"image folder {tmp_path / 'absent'} does not exist")
    empty = f"image folder {tmp_path} has no readable image"
    check_refused(tmp_path, f"{empty}; put the training images directly into it", "prompt")
    (tmp_path / "a.png").write_bytes(b"broken")
    check_refused(tmp_path, f"{empty}: a.png (not in a supported image format)", "prompt")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "z.png", "text": "z"}, "names z.png, which is not in"),
        ({"file_name": "sub/a.png", "text": "z"}, "names sub/a.png, which is not in"),
        ({"file_name": "../a.png", "text": "z"}, "names ../a.png, which is not in"),
        ({"file_name": "a.png", "text": "again"}, "names a.png a second time: keep one line per image"),
        ({"text": "z"}, 'must be an object with a "file_name" of an image in the folder'),
        (["a.png"], 'must be an object with a "file_name" of an image in the folder'),
        ('{"file_name": ', "is not JSON: "),
    ],
)
def test_metadata_that_does_not_match_the_images_is_an_error(tmp_path: Path, row: Any, message: str) -> None:
    add_image(tmp_path, "a.png")
    (tmp_path / "sub").mkdir()
    add_image(tmp_path / "sub", "a.png")
    add_metadata(tmp_path, {"file_name": "a.png", "text": "a"}, row)
    check_refused(tmp_path, f"metadata.jsonl line 2 {message}", "prompt")


def test_a_caption_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    add_image(tmp_path, "a.png")
    add_metadata(tmp_path, {"file_name": "a.png", "text": 3})
    check_refused(tmp_path, 'metadata.jsonl line 1: "text" must be a text')


def test_a_missing_caption_column_is_an_error(tmp_path: Path) -> None:
    add_image(tmp_path, "a.png", "a")
    check_refused(tmp_path, "caption_column=note needs a metadata.jsonl, and ", None, "note")
    add_metadata(tmp_path, {"file_name": "a.png", "text": "a"})
    message = "caption_column=note is not in metadata.jsonl line 1, which has: file_name, text"
    check_refused(tmp_path, message, None, "note")


def test_a_caption_file_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    add_image(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes("ein Würfel".encode("cp1252"))
    check_refused(tmp_path, "a.txt is not UTF-8 text: save it as UTF-8", "prompt")


# What is shown before training


def test_images_that_look_alike_are_listed(tmp_path: Path) -> None:
    picture = Image.linear_gradient("L").rotate(30).resize((40, 40))
    picture.save(tmp_path / "a.png")
    picture.resize((64, 64)).save(tmp_path / "b.jpg")
    Image.radial_gradient("L").resize((40, 40)).save(tmp_path / "c.png")
    Image.new("L", (40, 40)).save(tmp_path / "d.png")
    Image.new("L", (40, 40), 255).save(tmp_path / "e.png")
    result = load_samples(tmp_path, "prompt")
    assert result.duplicates() == [("b.jpg", "a.png")]
    assert result.summary == "5 images, captions 0/5, 40 x 40 to 64 x 64 pixels; look alike: b.jpg (a.png)"


def test_the_manifest_identifies_the_data_without_revealing_it(tmp_path: Path) -> None:
    add_image(tmp_path, "a.png", "a secret caption", size=(8, 5))
    samples = load_samples(tmp_path).samples
    (entry,) = json.loads(json.dumps(manifest(samples)))
    assert entry == {
        "id": "a.png",
        "sha256": samples[0].sha256,
        "width": 8,
        "height": 5,
        "caption_sha256": hashlib.sha256(b"a secret caption").hexdigest(),
    }
