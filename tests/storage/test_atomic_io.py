"""Atomic writes of files, and tensors that are computed once and then read from a file."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from patience import HANGS
from torch import Tensor

from flatlora_diffusion.config import ConfigError, RunError
from flatlora_diffusion.storage.atomic_io import atomic_write, check_writable, explain_write_errors, write_json
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.storage.tensor_io import cached_tensors


def test_a_failed_write_leaves_the_old_file_and_no_temporary_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    write_json(file, {"rank": 4})

    def write_half() -> None:
        with atomic_write(file) as aside:
            aside.write_text("{")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_half()
    assert json.loads(file.read_text(encoding="utf-8")) == {"rank": 4}
    assert list(tmp_path.iterdir()) == [file]


def test_two_threads_can_write_the_same_file(tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=HANGS)

    def write(text: str) -> None:
        with atomic_write(tmp_path / "file") as aside:
            both.wait()
            aside.write_text(text)
            both.wait()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, ("one", "two")))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] in ([("file", "one")], [("file", "two")])


def test_file_names_that_are_not_valid_text_can_be_saved(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", ["\udcff.png"])
    assert json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8")) == ["\udcff.png"]


@pytest.mark.parametrize("is_kept", [False, True])
def test_cached_tensors_are_computed_once(tmp_path: Path, is_kept: bool) -> None:
    path, made = tmp_path / "latent.safetensors" if is_kept else None, []

    def make() -> Mapping[str, Tensor]:
        made.append(True)
        return {"mean": torch.arange(3.0)}

    for _ in range(2):
        assert torch.equal(cached_tensors(path, make)["mean"], torch.arange(3.0))
    assert len(made) == (1 if is_kept else 2)


class RefusedRequest(OSError):
    """As the errors of HTTP clients are."""


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(111, "Connection refused"),
        TimeoutError("timed out"),
        RefusedRequest("no route to the tracker"),
        FileNotFoundError(2, "No such file", "/elsewhere/netrc"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_unrelated_errors_are_not_attributed_to_the_folder(tmp_path: Path, error: OSError) -> None:
    for blame in (RunDir(tmp_path).writing(), explain_write_errors(tmp_path, "cache_dir")):
        with pytest.raises(type(error), match=error.strerror or str(error)), blame:
            raise error


@pytest.mark.parametrize("file", [None, "checkpoint-3/state", "."])
def test_write_errors_are_attributed_to_the_folder(tmp_path: Path, file: str | None) -> None:
    error = OSError(28, "No space left", *([] if file is None else [str(tmp_path / file)]))
    with pytest.raises(RunError, match="the run folder cannot be written: No space left"), RunDir(tmp_path).writing():
        raise error


def test_checking_that_a_folder_is_writable_does_not_change_it(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", "cache_dir")
    check_writable(tmp_path, "cache_dir")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cache_dir='.*file.folder' cannot be written: .+; give another folder"):
        check_writable(tmp_path / "file" / "folder", "cache_dir")
