"""Partial files: none after a full disk; those of killed processes are removed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.storage.atomic_io import explain_write_errors, remove_partial_files, write_text
from flatlora_diffusion.storage.tensor_io import load_tensors, save_tensors

resource = pytest.importorskip("resource", reason="no limits for files on this system")


@contextmanager
def longest_file(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes while this is open: the nearest to a full disk that needs no rights."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_tensors_that_do_not_fit_on_the_disk_are_an_oserror_and_leave_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(2)})
    with longest_file(1000), pytest.raises(OSError, match=r"File too large") as caught:
        save_tensors(path, {"a": torch.ones(1000)})
    assert caught.value.errno == 27
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert torch.equal(load_tensors(path)[0]["a"], torch.ones(2))
    with (
        longest_file(1000),
        pytest.raises(ConfigError, match=r"cache_dir='.*' cannot be written: File too large; give another folder"),
        explain_write_errors(tmp_path, "cache_dir"),
    ):
        save_tensors(path, {"a": torch.ones(1000)})


def test_a_text_file_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    write_text(path, "before" + "\n")
    with longest_file(10), pytest.raises(OSError, match="File too large"):
        write_text(path, "much longer than that" + "\n")
    assert os.listdir(tmp_path) == ["README.md"]
    assert path.read_bytes() == b"before\n"


def test_only_partial_files_are_removed_and_with_an_age_limit_only_old_ones(tmp_path: Path) -> None:
    old, new = tmp_path / ".a.safetensors.1.part", tmp_path / ".b.safetensors.2.part"
    for path in (old, new, tmp_path / "b.part", tmp_path / ".hidden", tmp_path / ".c.part"):
        path.touch()
    (tmp_path / ".d.3.part").mkdir()
    os.utime(old, (time.time() - 7200,) * 2)
    remove_partial_files(tmp_path, seconds=3600)
    kept = {".b.safetensors.2.part", "b.part", ".hidden", ".c.part", ".d.3.part"}
    assert set(os.listdir(tmp_path)) == kept
    remove_partial_files(tmp_path)
    assert set(os.listdir(tmp_path)) == kept - {new.name}
    remove_partial_files(tmp_path / "not there")
