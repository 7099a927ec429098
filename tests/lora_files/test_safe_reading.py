"""Hostile and broken files are an error of one sentence and take little memory; valid files are read bit for bit."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.lora_files.safe_reading import MAX_FILE_BYTES, MAX_HEADER_BYTES, printable, read_header

SOUND: dict[str, Any] = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


def written(path: Path, header: Mapping[str, Any] | bytes, data: bytes = bytes(16), length: int | None = None) -> Path:
    """A file with this header, whatever it says, and these bytes behind it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def changed(**values: Any) -> dict[str, Any]:
    return {"a": SOUND["a"] | values}


def error_message(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_header(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500 + len(str(path))
    return message


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool],
    ids=str,
)
def test_a_valid_file_is_read_as_it_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    values = {"a": torch.arange(6).reshape(2, 3).to(dtype), "b": torch.tensor(1).to(dtype), "c": torch.empty(0, 4)}
    save_file(values, tmp_path / "x.safetensors", metadata={"ss_steps": "7"})
    file = read_header(tmp_path / "x.safetensors")
    assert file.metadata == {"ss_steps": "7"}
    assert file.entries.keys() == values.keys()
    for name, value in values.items():
        read = file.tensor(name)
        assert read.dtype == value.dtype
        assert torch.equal(read.float(), value.float())


def test_the_unchanged_file_of_these_tests_is_valid(tmp_path: Path) -> None:
    assert read_header(written(tmp_path / "x.safetensors", SOUND)).tensor("a").shape == (2, 2)


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' + b"9" * 5_000 + b"}", "not JSON"),
        (b"{}", "no tensor"),
        (b'{"a": 1, "a": 2}', "twice"),
        (json.dumps(SOUND).encode()[:-1] + b"," + json.dumps(SOUND).encode()[1:], "twice"),
        (SOUND | {"__metadata__": {"x": 1}}, "metadata are not strings"),
        (SOUND | {"__metadata__": []}, "metadata are not strings"),
        ({"a": 1}, "does not describe a"),
        ({"a": {"dtype": "F32"}}, "does not describe a"),
        (changed(dtype="F13"), "unknown dtype F13"),
        (changed(dtype=["F32"]), "unknown dtype"),
        (changed(dtype="F64"), "do not fit its shape"),
        (changed(shape=[2, 3]), "do not fit its shape"),
        (changed(shape=[2**40, 2**40]), "do not fit its shape"),
        (changed(shape=[-2, -2]), "invalid shape"),
        (changed(shape=[2.0, 2.0]), "invalid shape"),
        (changed(shape=[True, 4]), "invalid shape"),
        (changed(shape=[1] * 9 + [4]), "invalid shape"),
        (changed(shape="22"), "invalid shape"),
        (changed(data_offsets=[0]), "invalid shape"),
        (changed(data_offsets=[16, 0]), "do not fit its shape"),
        (changed(data_offsets=[16, 32]), "lies outside the file"),
        (changed(data_offsets=[10**15, 10**15 + 16]), "lies outside the file"),
        (changed(shape=[2], data_offsets=[8, 16]), "unused bytes before it"),
        (changed(shape=[2], data_offsets=[0, 8]), "last 8 bytes"),
        (SOUND | {"b": SOUND["a"]}, "overlaps another tensor"),
        (SOUND | {"b": {"dtype": "U8", "shape": [9], "data_offsets": [7, 16]}}, "overlaps another tensor"),
    ],
)
def test_an_invalid_header_is_an_error(tmp_path: Path, header: Any, sentence: str) -> None:
    assert sentence in error_message(written(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize("size", [1, 7, 8, 20, -1])
def test_a_truncated_file_is_an_error(tmp_path: Path, size: int) -> None:
    whole = written(tmp_path / "whole.safetensors", SOUND).read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:size])
    assert "truncated" in error_message(tmp_path / "x.safetensors")


@pytest.mark.parametrize("length", [100 * 10**9, 2**64 - 1, MAX_HEADER_BYTES + 1])
def test_a_huge_header_is_an_error_and_is_not_read(tmp_path: Path, length: int) -> None:
    path = written(tmp_path / "x.safetensors", SOUND, length=length)
    tracemalloc.start()
    try:
        message = error_message(path)
        assert "another format or damaged" in message
        assert str(length) not in message, "a number that means nothing to anybody"
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("size", "length", "sentence"),
    [
        (200 * 10**9, 100 * 10**9, f"limit of {MAX_HEADER_BYTES}"),
        (MAX_FILE_BYTES + 1, 10, f"limit of {MAX_FILE_BYTES}"),
    ],
)
def test_a_huge_file_is_an_error_and_is_not_read(tmp_path: Path, size: int, length: int, sentence: str) -> None:
    path = written(tmp_path / "x.safetensors", SOUND, length=length)
    try:
        os.truncate(path, size)  # a hole, not bytes on the disk
    except OSError:
        pytest.skip("this file system has no files of that size")
    tracemalloc.start()
    try:
        assert sentence in error_message(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_an_archive_or_a_pickle_with_the_wrong_ending_is_named(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "saved.safetensors")
    assert "torch.save" in error_message(tmp_path / "saved.safetensors")
    with zipfile.ZipFile(tmp_path / "zip.safetensors", "w") as archive:
        archive.writestr("a", "a")
    assert "a zip archive" in error_message(tmp_path / "zip.safetensors")
    for protocol in (2, 3, 4, 5):
        (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps({"a": [1.0] * 9}, protocol))
        assert "Python pickle" in error_message(tmp_path / "pickle.safetensors")
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    assert "Python pickle" in error_message(tmp_path / "old.safetensors")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (LFS, "`git lfs pull`"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
        (b"\xef\xbb\xbf\n  <HTML lang=en>", "an HTML page"),
        (b'{"error": "Not Found", "status": 404}', "a JSON text"),
        (b"The quick brown fox jumps over the lazy dog", "another format or damaged"),
    ],
)
def test_the_error_names_the_kind_of_a_wrong_download(tmp_path: Path, content: bytes, kind: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    assert kind in error_message(tmp_path / "x.safetensors")


def test_a_header_may_have_any_length(tmp_path: Path) -> None:
    """Also one whose first byte is that of a JSON text, or whose first two are those of an archive."""
    for length in (ord("{") + 256, 0x8B1F, 0x4BFE):
        padded = json.dumps(SOUND).encode().ljust(length)
        assert read_header(written(tmp_path / "x.safetensors", padded)).tensor("a").shape == (2, 2)


def test_a_path_that_is_not_a_file_is_an_error(tmp_path: Path) -> None:
    assert "is a folder" in error_message(tmp_path)
    assert "does not exist" in error_message(tmp_path / "nowhere.safetensors")
    (tmp_path / "empty.safetensors").touch()
    assert "it is empty" in error_message(tmp_path / "empty.safetensors")
    if hasattr(os, "mkfifo"):  # opening one would wait for ever
        os.mkfifo(tmp_path / "pipe.safetensors")
        assert "not a regular file" in error_message(tmp_path / "pipe.safetensors")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", SOUND)
    path.chmod(0)
    assert "cannot be read: Permission denied" in error_message(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2], ids=str)
def test_reading_a_tensor_with_nan_or_infinity_is_an_error(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    save_file({"good": torch.ones(3), "bad": torch.tensor([1.0, value]).to(dtype)}, tmp_path / "x.safetensors")
    file = read_header(tmp_path / "x.safetensors")
    assert torch.equal(file.tensor("good"), torch.ones(3))
    with pytest.raises(ConfigError, match=r"bad .*NaN"):
        file.tensor("bad")


def test_a_file_that_shrinks_after_the_check_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", SOUND)
    file = read_header(path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ConfigError, match=r"x\.safetensors changed"):
        file.tensor("a")


def test_names_from_a_file_cannot_send_terminal_escapes(tmp_path: Path) -> None:
    name = "\x1b[2J" + "x" * 10_000
    message = error_message(written(tmp_path / "x.safetensors", {name: 1}))
    assert "\x1b" not in message
    assert printable("plain.name-1") == "plain.name-1"
