"""The table of a run's training images: what it shows of them, and what it never does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.context import AppContext
from app.dataset.thumbnails import Thumbnails
from app.runs_tab.image_table import close, fill
from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.storage.atomic_io import file_sha256

RUN = "icons"


def save_image(path: Path, shade: int) -> None:
    Image.effect_noise((40, 40), shade).convert("RGB").save(path)


@pytest.fixture
def images(context: AppContext) -> Path:
    """The frozen images of an upload, with the user's names."""
    folder = context.uploads.frozen / "0123456789abcdef"
    folder.mkdir(parents=True)
    for number in range(1, 4):
        save_image(folder / f"000{number}.png", 40 * number)
        (folder / f"000{number}.txt").write_text(f"an icon of <b>thing {number}</b>")
    (folder / "0004.png").write_bytes((folder / "0001.png").read_bytes())
    (folder / "names.json").write_text(json.dumps({"0001.png": "<i>fox</i>.png", "0004.png": "again.png"}))
    return folder


def add_run(context: AppContext, images: Path, names: list[str], **more: Any) -> Path:
    """A finished run whose first image is learned least, and whose second has a caption that does not fit."""
    run = context.runs.folder / RUN
    run.mkdir(parents=True)
    config = TrainConfig.from_dict({"instance_data_dir": str(images), "max_train_steps": 4, "method": "lora"})
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    rows = [{"id": name, "sha256": file_sha256(images / name)} for name in names if (images / name).is_file()]
    (run / "manifest.json").write_text(json.dumps(rows))
    losses = {name: [0.4, 0.1, 0.02] for name in names}
    after = {
        name: [0.39 - 0.1 * index, 0.099 - 0.02 * index, 0.0195 - 0.004 * index] for index, name in enumerate(names)
    }
    bare = {name: [0.3, 0.07, 0.015] if index == 1 else [0.5, 0.13, 0.03] for index, name in enumerate(names)}
    events = [
        {"event": "image_losses", "step": 0, "losses": losses, "without_caption": bare},
        {"event": "image_losses", "step": 4, "losses": after},
        {"event": "finished", "step": 4},
        {"event": "image_losses", "step": 6, "losses": losses},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


def rows_of(page: str) -> list[str]:
    return page.split("<tbody>")[1].split("<tr>")[1:]


def test_each_image_is_shown_with_its_own_name_caption_and_marks(
    context: AppContext, images: Path, thumbnails: Thumbnails
) -> None:
    add_run(context, images, ["0001.png", "0002.png", "0003.png", "0004.png"])
    rows = rows_of(fill(context, thumbnails, RUN))
    assert len(rows) == 4
    assert all("data:image/webp;base64," in row and "<svg" in row for row in rows)
    assert "&lt;i&gt;fox&lt;/i&gt;.png" in rows[0]
    assert "an icon of &lt;b&gt;thing 1&lt;/b&gt;" in rows[0]
    assert "learned least" in rows[0]
    assert [index for index, row in enumerate(rows) if "check the caption" in row] == [1]
    assert "looks like &lt;i&gt;fox" in rows[3]
    assert "learned most" in rows[3]
    assert "<i>" not in "".join(rows)
    assert "<b>" not in "".join(rows)


def test_an_image_that_changed_since_or_lies_elsewhere_has_figures_alone(
    context: AppContext, images: Path, thumbnails: Thumbnails
) -> None:
    save_image(images.parent / "other.png", 99)
    run = add_run(context, images, ["0001.png", "0002.png", "../other.png"])
    rows = json.loads((run / "manifest.json").read_text())
    assert [row["id"] for row in rows] == ["0001.png", "0002.png", "../other.png"]
    save_image(images / "0002.png", 7)
    found = rows_of(fill(context, thumbnails, RUN))
    assert ["data:image" in row for row in found] == [True, False, False]
    assert "thing 2" not in found[1]


def test_a_folder_that_the_browser_may_not_name_is_not_read(
    context: AppContext, images: Path, thumbnails: Thumbnails, tmp_path: Path
) -> None:
    private = tmp_path / "private"
    private.mkdir()
    save_image(private / "a.png", 50)
    add_run(context, private, ["a.png"])
    assert "data:image" not in fill(context, thumbnails, RUN)


def test_a_run_that_measured_nothing_says_which_setting_does(
    context: AppContext, images: Path, thumbnails: Thumbnails
) -> None:
    run = add_run(context, images, ["0001.png"])
    (run / "events.jsonl").write_text('{"event": "finished", "step": 4}\n')
    assert "Draws of the loss by image" in fill(context, thumbnails, RUN)
    fold, table = close(RUN)
    assert (fold.open, fold.visible, table) == (False, True, "")
    assert close(None)[0].visible is False
    assert fill(context, thumbnails, None) == ""
