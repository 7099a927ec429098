"""Relations between folders, for paths of any form."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.storage.separate_folders import check_separate, relation


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "project" / "images"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("project/images", "is"),
        ("project/images/", "is"),
        ("project/runs/../images", "is"),
        ("project/images/runs/one", "lies in"),
        ("project", "holds"),
        (".", "holds"),
        ("project/images-lora", None),
        ("project/runs/images", None),
        ("elsewhere/run", None),
    ],
)
def test_two_folders_are_equal_nested_or_separate(
    images: Path, tmp_path: Path, path: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "project" / "runs").mkdir()
    assert relation(Path(path), images) == expected
    assert relation(tmp_path / path, Path("project/images")) == expected


def test_links_are_followed_on_both_sides(images: Path, tmp_path: Path) -> None:
    link, inside = tmp_path / "link", tmp_path / "inside"
    link.symlink_to(images, target_is_directory=True)
    inside.symlink_to(images / "not-there-yet")
    assert relation(link, images) == relation(images, link) == "is"
    assert relation(link / "runs" / "one", images) == relation(inside, link) == "lies in"
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "photos").symlink_to(images, target_is_directory=True)
    assert relation(tmp_path / "away", tmp_path / "away" / "photos") is None, "what the link leads to lies elsewhere"


def test_names_in_other_case_are_the_same_folder_on_a_case_insensitive_disk(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upper = tmp_path / "project" / "IMAGES"
    assert relation(upper, images) is None

    def same(one: os.PathLike[str], other: os.PathLike[str]) -> bool:
        return os.fspath(one).lower() == os.fspath(other).lower()

    monkeypatch.setattr(os.path, "samefile", same)  # a disk of Windows or of a Mac
    assert relation(upper, images) == "is"
    assert relation(upper / "run", images) == "lies in"
    assert relation(tmp_path / "PROJECT", images) == "holds"


@pytest.mark.parametrize("path", ["project/images", "project/images/run", "project"])
def test_the_error_names_both_settings_and_suggests_a_valid_folder(images: Path, tmp_path: Path, path: str) -> None:
    written = tmp_path / path
    with pytest.raises(ConfigError) as refused:
        check_separate("output_dir", written, "instance_data_dir", [images])
    error = str(refused.value)
    assert f"output_dir={str(written)!r}" in error
    assert f"instance_data_dir={str(images)!r}" in error
    assert "\n" not in error
    offered = Path(error.rpartition("such as ")[2].strip("'"))
    check_separate("output_dir", offered, "instance_data_dir", [images])
