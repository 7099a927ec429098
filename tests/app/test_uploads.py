"""Uploads: what is taken, what is refused and why, and that nobody gets out of a folder or into another's."""

from __future__ import annotations

import errno
import io
import random
import shutil
import stat
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.dataset.thumbnails import Thumbnails
from app.dataset.view import Framing, fill_captions, load_view
from app.uploads.save_upload import UploadResult
from app.uploads.unpack import Limits
from app.uploads.uploads import Uploads
from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.data import images
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.data.images import load_image


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    return Uploads(tmp_path / "uploads")


def png(colour: str = "red", size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "PNG")
    return buffer.getvalue()


def add(uploads: Uploads, session: str, tmp_path: Path, *files: tuple[str, bytes]) -> UploadResult:
    given = []
    for index, (name, content) in enumerate(files):
        path = tmp_path / f"received-{session[:8]}-{index}"
        path.write_bytes(content)
        given.append((name, path))
    return uploads.add(session, given)


def zipped(*members: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def everything_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_images_get_safe_names_and_captions_of_their_own_names(uploads: Uploads, tmp_path: Path) -> None:
    session = uploads.new_session()
    result = add(uploads, session, tmp_path, ("alarm_clock-.jpeg", png()), ("Löwe\x00 🦁.PNG", png("blue")))
    assert [upload.path.name for upload in result.saved] == ["0001.png", "0002.png"]
    assert [upload.original for upload in result.saved] == ["alarm_clock-.jpeg", "Löwe 🦁.PNG"]
    assert uploads.captions(session) == {"0001.png": "alarm clock", "0002.png": "Löwe"}
    found = load_samples(uploads.session_folder(session))
    assert [sample.caption for sample in found.samples] == ["alarm clock", "Löwe"]
    assert found.skipped == []


def test_captions_come_from_sidecars_in_the_zip_and_beside_plain_files(uploads: Uploads, tmp_path: Path) -> None:
    session = uploads.new_session()
    archive = zipped(
        ("set/cat.png", png()),
        ("set/cat.txt", "\ufeffa cat,\n sitting".encode()),
        ("other/cat.png", png("blue")),
        ("__MACOSX/set/._cat.png", b"junk"),
        (".DS_Store", b"junk"),
    )
    result = add(
        uploads, session, tmp_path, ("icons.zip", archive), ("dog.png", png("green")), ("dog.caption", b"a dog")
    )
    assert result.rejected == []
    assert list(uploads.captions(session).values()) == ["a cat, sitting", "cat", "a dog"]


def test_a_name_that_a_camera_gave_is_no_caption(uploads: Uploads, tmp_path: Path) -> None:
    session = uploads.new_session()
    names = ("IMG_2041.png", "DSC00012.png", "0007.png", "Screenshot 2026-01-02.png", "img fox.png", "fox 2.png")
    add(uploads, session, tmp_path, *((name, png()) for name in names))
    assert list(uploads.captions(session).values()) == ["", "", "", "", "img fox", "fox 2"]


def test_captions_are_edited_in_place(uploads: Uploads, tmp_path: Path) -> None:
    session = uploads.new_session()
    add(uploads, session, tmp_path, ("a.png", png()), ("b.png", png("blue")))
    uploads.save_captions(session, {"0001.png": " a new\n\x00one ", "0002.png": ""})
    assert uploads.captions(session) == {"0001.png": "a new one", "0002.png": ""}
    kept = {"0002.png", "names.json", "captions_before.json"}
    assert everything_in(uploads.session_folder(session)) == {"0001.png", "0001.txt"} | kept
    for name in ("../0001.png", "0003.png", "0001.txt", "/etc/passwd"):
        with pytest.raises(ConfigError, match="not among yours"):
            uploads.save_captions(session, {name: "x"})
    with pytest.raises(ConfigError, match="2001 letters; 2000 at most"):
        uploads.save_captions(session, {"0001.png": "x" * 2001})
    uploads.remove(session, "0001.png")
    assert everything_in(uploads.session_folder(session)) == kept


def test_what_is_trained_on_does_not_change_with_later_edits(uploads: Uploads, tmp_path: Path) -> None:
    session = uploads.new_session()
    with pytest.raises(ConfigError, match="no images to train on"):
        uploads.freeze(session)
    add(uploads, session, tmp_path, ("a.png", png()))
    frozen = uploads.freeze(session)
    assert uploads.freeze(session) == frozen
    uploads.save_captions(session, {"0001.png": "other"})
    assert (frozen / "0001.txt").read_text() == "a"
    assert uploads.freeze(session) != frozen


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("script.png", b"#!/bin/sh\nrm -rf /\n", "not in a supported image format"),
        ("page.png", b"<html><script>alert(1)</script></html>", "not in a supported image format"),
        ("icon.svg", b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "SVG"),
        ("icon.png", b'\xef\xbb\xbf<?xml version="1.0"?>\n<SVG onload="alert(1)"/>', "SVG"),
        ("program.exe", b"MZ\x90\x00" + bytes(100), "not in a supported image format"),
        ("half.png", png(size=64)[:90], "truncated"),
        ("empty.png", b"", "the file is empty"),
        ("fox.txt", b"a fox", "not used, as no image of the same name came with it"),
        ("notes.txt", b"\xff\xfe\x00x", "not UTF-8"),
        ("long.txt", b"x" * 20_000, "more than 16 KiB"),
        ("broken.zip", b"PK\x03\x04 and then nothing", "damaged zip"),
    ],
)
def test_what_is_no_image_is_refused_with_its_reason(
    uploads: Uploads, tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    session = uploads.new_session()
    result = add(uploads, session, tmp_path, (name, content), ("good.png", png()))
    assert [(refusal.name, reason in refusal.reason) for refusal in result.rejected] == [(name, True)]
    assert everything_in(uploads.session_folder(session)) == {"0001.png", "0001.txt", "names.json"}


def test_a_huge_png_is_refused_before_it_is_decoded(uploads: Uploads, tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"not even pixels") + chunk(b"IEND", b"")
    result = add(uploads, uploads.new_session(), tmp_path, ("bomb.png", bomb))
    assert [refusal.reason for refusal in result.rejected] == [
        "more than twice the limit of 89478485 pixels; make it smaller"
    ]
    large = struct.pack(">II", 5_001, 5_000) + header[8:]
    bomb = bomb.replace(chunk(b"IHDR", header), chunk(b"IHDR", large))
    result = add(uploads, uploads.new_session(), tmp_path, ("large.png", bomb))
    assert [refusal.reason for refusal in result.rejected] == [
        "more than 25 million pixels; make it smaller, or save it as JPEG, which may have 100 million"
    ]


def test_a_large_jpeg_is_taken_and_a_huge_one_refused(uploads: Uploads, tmp_path: Path) -> None:
    session = uploads.new_session()
    photo = encoded(Image.linear_gradient("L").resize((6000, 5000)), "JPEG")
    place = photo.index(b"\xff\xc0") + 5
    huge = photo[:place] + struct.pack(">HH", 10_000, 10_001) + photo[place + 4 :]
    result = add(uploads, session, tmp_path, ("photo.jpg", photo), ("huge.jpg", huge))
    assert [upload.original for upload in result.saved] == ["photo.jpg"]
    assert [refusal.reason for refusal in result.rejected] == ["more than 100 million pixels; make it smaller"]
    framed = load_view(uploads, Thumbnails(tmp_path / "thumbnails"), session, Framing("white", 512))
    assert framed[0].picture.size == (256, 256)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' allocators keep nothing")
def test_what_images_took_is_given_back(tmp_path: Path) -> None:
    """To threads that live on, as those of a web server do, glibc would leave some hundred megabytes."""
    Image.new("RGB", (4000, 4000), "red").save(tmp_path / "large.png")
    program = """
import sys, threading
from pathlib import Path
import psutil
from app.uploads.decoding import DECODING, return_freed_memory
from flatlora_diffusion.data.images import load_image

def used():
    return psutil.Process().memory_info().rss / 2**20

def decode():
    with DECODING:
        load_image(Path(sys.argv[1]))
    done.release()
    end.wait()

return_freed_memory()
done, end, before = threading.Semaphore(0), threading.Event(), used()
for _ in range(8):
    threading.Thread(target=decode).start()
for _ in range(8):
    done.acquire()
print(used() - before)
end.set()
"""
    command = [sys.executable, "-c", program, str(tmp_path / "large.png")]
    told = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True).stdout
    assert float(told) < 64, "MiB, what one such image has"


def test_images_are_decoded_one_at_a_time(uploads: Uploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many sessions drop, look at and caption some at once."""
    inside, most = [0], [0]
    decode = images._decode

    def counted(source: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.01)
        try:
            return decode(source)
        finally:
            inside[0] -= 1

    monkeypatch.setattr(images, "_decode", counted)

    def work(number: int) -> None:
        session = uploads.new_session()
        assert add(uploads, session, tmp_path / str(number), ("a.png", png()), ("b.png", png("blue"))).rejected == []
        uploads.save_captions(session, {"0001.png": "", "0002.png": ""})
        load_view(uploads, Thumbnails(tmp_path / f"thumbnails-{number}"), session, Framing("white", 16))
        fill_captions(uploads, session, lambda pictures: ["a thing"] * len(pictures), lambda done, of: None)
        assert uploads.captions(session) == {"0001.png": "a thing", "0002.png": "a thing"}

    for number in range(6):
        (tmp_path / str(number)).mkdir()
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert most == [1]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.copy().save(buffer, kind, **options)
    return buffer.getvalue()


def with_a_second(image: Image.Image, kind: str) -> bytes:
    return encoded(image, kind, save_all=True, append_images=[Image.new("RGB", image.size)])


def test_every_format_and_mode_is_taken_with_its_suffix(uploads: Uploads, tmp_path: Path) -> None:
    colours = Image.effect_noise((16, 16), 50).convert("RGB")
    session = uploads.new_session()
    files = {
        "several.jpg": with_a_second(colours, "MPO"),
        "animated.gif": with_a_second(colours, "GIF"),
        "animated.webp": with_a_second(colours, "WEBP"),
        "animated.png": with_a_second(colours, "PNG"),
        "pages.tif": with_a_second(colours, "TIFF"),
        "print.jpg": encoded(colours.convert("CMYK"), "JPEG"),
        "print.tif": encoded(colours.convert("CMYK"), "TIFF"),
        "deep.png": encoded(colours.convert("I;16"), "PNG"),
        "deep.tif": encoded(colours.convert("I;16"), "TIFF"),
        "palette.png": encoded(colours.convert("P"), "PNG"),
        "two colours.bmp": encoded(colours.convert("1"), "BMP"),
        "grey.pgm": encoded(colours.convert("L"), "PPM"),
        "half.jp2": encoded(colours.convert("LA"), "JPEG2000"),
        "icon.ico": encoded(colours, "ICO", sizes=[(16, 16)]),
    }
    result = add(uploads, session, tmp_path, *files.items())
    assert result.rejected == []
    suffixes = [upload.path.suffix for upload in result.saved]
    assert suffixes == [{".pgm": ".ppm"}.get(Path(name).suffix, Path(name).suffix) for name in files]
    assert all(load_image(upload.path).size == (16, 16) for upload in result.saved)


def mutated(content: bytes, draw: random.Random) -> bytes:
    """`content` with some bytes exchanged, or cut off, or with a piece of itself twice."""
    how, spoilt = draw.random(), bytearray(content)
    if how < 0.15:
        return content[: draw.randrange(len(content))]
    if how < 0.3:
        place = draw.randrange(len(content))
        return content[:place] + content[max(0, place - 50) :]
    reach = min(40, len(content)) if how < 0.7 else len(content)  # most damage is done in the header
    for _ in range(draw.choice((1, 2, 4, 16))):
        spoilt[draw.randrange(reach)] = draw.randrange(256)
    return bytes(spoilt)


@pytest.mark.filterwarnings("ignore:::PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF"])
def test_no_damaged_image_ends_an_upload(uploads: Uploads, tmp_path: Path, kind: str) -> None:
    draw = random.Random(kind)
    picture = Image.effect_noise((16, 12), 50)
    modes = (
        "L",
        "1",
        "RGB",
        *{"PNG": ("P", "RGBA", "I;16"), "JPEG": ("CMYK",), "TIFF": ("I;16", "RGBA")}.get(kind, ()),
    )
    contents = [encoded(picture.convert(mode), kind) for mode in modes]
    files = [(f"{number}.bin", mutated(draw.choice(contents), draw)) for number in range(60)]
    session = uploads.new_session()
    result = add(uploads, session, tmp_path, *files, ("good.png", png()))
    assert {refusal.name for refusal in result.rejected} <= {name for name, _ in files}
    assert all(refusal.reason and "\n" not in refusal.reason for refusal in result.rejected)
    assert len(result.saved) + len(result.rejected) == 61
    assert result.saved[-1].original == "good.png"
    assert len(result.rejected) >= 10
    framed = load_view(uploads, Thumbnails(tmp_path / "thumbnails"), session, Framing("white", 16))
    assert len(framed) == len(result.saved)


def test_a_file_that_is_gone_or_finds_no_room_costs_only_itself(
    uploads: Uploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "good.png").write_bytes(png())
    session = uploads.new_session()
    result = uploads.add(session, [("gone.png", tmp_path / "gone.png"), ("good.png", tmp_path / "good.png")])
    assert [(one.name, one.reason) for one in result.rejected] == [
        ("gone.png", "it cannot be read: No such file or directory")
    ]
    assert len(result.saved) == 1

    def replace(source: Path, target: Path) -> None:
        if target.name == "0002.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        shutil.move(source, target)

    monkeypatch.setattr("app.uploads.save_upload.os.replace", replace)
    result = uploads.add(session, [("full.png", tmp_path / "good.png")])
    assert [(one.name, "the disk is full" in one.reason) for one in result.rejected] == [("full.png", True)]
    assert uploads.names(session) == {"0001.png": "good.png"}
    assert not list(uploads.session_folder(session).glob("0002.*")), "not its caption either"


def test_on_a_full_disk_nothing_is_half_frozen_and_no_image_is_replaced_by_none(
    uploads: Uploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = uploads.new_session()
    add(uploads, session, tmp_path, ("fox.png", png("red")), ("owl.png", png("blue")))
    frozen = uploads.freeze(session)
    uploads.clear(session)
    add(uploads, session, tmp_path, ("cat.png", png("green")))
    before = everything_in(uploads.folder)
    copy = shutil.copyfile

    def copyfile(source: Path, target: Path) -> None:
        copy(source, target)
        if source.name != "0001.png":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("app.uploads.uploads.shutil.copyfile", copyfile)
    with pytest.raises(OSError, match="No space left"):
        uploads.replace(session, frozen)
    with pytest.raises(OSError, match="No space left"):
        uploads.freeze(session)
    assert everything_in(uploads.folder) == before
    assert uploads.names(session) == {"0001.png": "cat.png"}


def test_no_member_of_a_zip_leaves_it(uploads: Uploads, tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link.png")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    archive = zipped(
        ("../../evil.png", png()),
        ("/tmp/evil.png", png()),
        ("C:\\evil.png", png()),
        ("..\\evil.png", png()),
        (link, b"/etc/passwd"),
        ("inner.zip", zipped(("a.png", png()))),
        ("good.png", png()),
    )
    session = uploads.new_session()
    before = everything_in(tmp_path)
    result = add(uploads, session, tmp_path, ("all.zip", archive))
    assert len(result.saved) == 1
    reasons = {refusal.name: refusal.reason for refusal in result.rejected}
    assert reasons["link.png"] == "a link or device, not a file"
    assert list(reasons.values()).count("its path leads out of the zip") == 4
    assert "inner.zip" in reasons
    inside = f"uploads/sessions/{session}/"
    written = everything_in(tmp_path) - before
    assert {name for name in written if not name.startswith(("received-", "uploads/locks/"))} == {
        f"{inside}0001.png",
        f"{inside}0001.txt",
        f"{inside}names.json",
    }


def test_an_encrypted_member_is_refused(uploads: Uploads, tmp_path: Path) -> None:
    archive = bytearray(zipped(("a.png", png())))
    directory = archive.find(b"PK\x01\x02")
    archive[6] |= 1
    archive[directory + 8] |= 1
    result = add(uploads, uploads.new_session(), tmp_path, ("a.zip", bytes(archive)))
    assert result.rejected[0].reason == "it is encrypted; make a zip without a password"


def test_zip_bombs_are_cut_off_while_they_unpack(tmp_path: Path) -> None:
    zeros = bytes(9 * 2**20)
    uploads = Uploads(tmp_path / "uploads", Limits(total_bytes=20 * 2**20, zip_ratio=100))
    session = uploads.new_session()
    result = add(uploads, session, tmp_path, ("bomb.zip", zipped(*((f"{index}.png", zeros) for index in range(4)))))
    reasons = [refusal.reason for refusal in result.rejected]
    assert all("100-fold" in reason for reason in reasons[:2])
    assert all("all uploads together are larger than 20 MiB" in reason for reason in reasons[2:])
    assert everything_in(uploads.session_folder(session)) == set()
    loose = Uploads(tmp_path / "loose", Limits(file_bytes=2**20, zip_ratio=10_000))
    result = add(loose, session, tmp_path, ("bomb.zip", zipped(("0.png", zeros))))
    assert [refusal.reason for refusal in result.rejected] == ["larger than 1 MiB"]


def test_a_zip_of_too_many_files_is_not_unpacked(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "uploads", Limits(zip_members=3))
    archive = zipped(*((f"{index}.png", png()) for index in range(4)))
    result = add(uploads, uploads.new_session(), tmp_path, ("many.zip", archive))
    assert [refusal.reason for refusal in result.rejected] == ["a zip of 4 files; at most 3 are unpacked"]


def test_no_more_than_500_images(uploads: Uploads, tmp_path: Path) -> None:
    session = uploads.new_session()
    archive = zipped(*((f"{index:03}.png", png()) for index in range(499)))
    assert len(add(uploads, session, tmp_path, ("icons.zip", archive)).saved) == 499
    result = add(uploads, session, tmp_path, ("a.png", png()), ("b.png", png()))
    assert [upload.path.name for upload in result.saved] == ["0500.png"]
    assert [refusal.reason for refusal in result.rejected] == ["there are 500 images already; 500 is the most"]


def test_sessions_do_not_mix_under_concurrent_uploads(uploads: Uploads, tmp_path: Path) -> None:
    sessions = {uploads.new_session(): colour for colour in ("red", "blue")}

    for colour in sessions.values():
        (tmp_path / f"{colour}.png").write_bytes(png(colour))

    def upload(session: str) -> None:
        path = tmp_path / f"{sessions[session]}.png"
        for _ in range(5):
            assert uploads.add(session, [(path.name, path)]).rejected == []

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(upload, list(sessions) * 2))
    for session, colour in sessions.items():
        images = uploads.images(session)
        assert [path.name for path in images] == [f"{number:04}.png" for number in range(1, 11)]
        assert {path.read_bytes() for path in images} == {png(colour)}


@pytest.mark.parametrize("session", ["", "../other", "short", "a" * 65, "a/b" * 8, "x" * 16 + "\x00", "x" * 16 + "\n"])
def test_a_session_is_no_path(uploads: Uploads, session: str) -> None:
    with pytest.raises(ConfigError, match="session is not known"):
        uploads.session_folder(session)
