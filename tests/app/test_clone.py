"""Clone: a new run begins with what the run had, images included, and what cannot be the same is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from app.context import AppContext, make_context
from app.dataset.tab import load_samples_icons, prefer_upload, restore_removed, upload
from app.forms.forms import ConfigForm
from app.runs_tab.clone import clone_run
from app.runs_tab.tab import clone
from app.settings import AppSettings
from app.train.tab import FLAT, PLAIN, queue_training, summary, with_images
from app.ui import build_app
from flatlora_diffusion.config import ConfigError, TrainConfig

OTHER_VALUES = {
    "max_train_steps": 7,
    "rank": 3,
    "learning_rate": 3e-5,
    "resolution": 96,
    "snr_gamma": 5.0,
    "seed": 11,
    "report_to": "none",
    "validation_prompt": "a <fox>",
    "background_color": "#102030",
}


@pytest.fixture
def context(tmp_path: Path) -> AppContext:
    return make_context(AppSettings(runs_dir=str(tmp_path / "runs"), data_dir=(str(tmp_path),)))


def picture(folder: Path, name: str, colour: str) -> str:
    Image.new("RGB", (64, 64), colour).save(folder / name)
    return str(folder / name)


def by_hand(context: AppContext, run_id: str, **settings: Any) -> Path:
    folder = context.runs.folder / run_id
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TrainConfig().to_dict() | settings))
    (folder / "manifest.json").write_text("[]")
    return folder


@pytest.mark.parametrize(("setting", "method", "sigma"), [("lora", PLAIN, None), ("flat-lora", FLAT, 0.03)])
def test_a_clone_is_the_run_again(
    context: AppContext, tmp_path: Path, setting: str, method: str, sigma: float | None
) -> None:
    files = [picture(tmp_path, "Sea fox.png", "red"), picture(tmp_path, "owl.png", "blue")]
    session = upload(context, "", files)[0]
    context.uploads.save_captions(session, {"0001.png": "a fox, mine"})
    config = TrainConfig.from_dict(OTHER_VALUES | {"method": setting, "sigma": sigma})
    (job,) = queue_training(context, config, session, "Sea style", is_pair=False)
    assert job.run is not None
    form = ConfigForm()
    _, other, name, chosen, told, *values = clone(context, form, "", job.run)
    assert (name, chosen) == (job.run, method)
    assert context.uploads.names(other) == {"0001.png": "Sea fox.png", "0002.png": "owl.png"}
    assert context.uploads.captions(other) == {"0001.png": "a fox, mine", "0002.png": "owl"}
    assert "Its images and captions (2) are in the Dataset tab now." in told
    assert "Different" not in told
    assert "2 images, captions 2/2" in summary(context, form, other, chosen, *values)
    (again,) = queue_training(context, form.read(values, setting), other, name + " again", is_pair=False)
    assert isinstance(job.settings, dict)
    assert again.settings == job.settings


def test_images_that_come_after_a_clone_are_trained_on_and_those_before_it_come_back(
    context: AppContext, tmp_path: Path
) -> None:
    session = upload(context, "", [picture(tmp_path, "fox.png", "red")])[0]
    config = TrainConfig.from_dict(OTHER_VALUES | {"method": "lora"})
    (job,) = queue_training(context, config, session, "foxes", is_pair=False)
    mine, *_ = load_samples_icons(context, "")
    form = ConfigForm()
    *_, told = clone(context, form, mine, str(job.run))[:5]
    assert "Its images and captions (1) are in the Dataset tab now in place of 23 that were there" in told
    assert list(context.uploads.names(mine).values()) == ["fox.png"]
    assert context.uploads.replace(mine, context.uploads.freeze(mine)) == 0  # the same already
    upload(context, mine, [picture(tmp_path, "owl.png", "blue")])
    values = clone_run(context, session, str(job.run)).settings
    trained = with_images(context, form.read(form.write(values), "flat-lora"), mine).data.instance_data_dir
    assert sorted(path.name for path in Path(str(trained)).glob("*.png")) == ["0001.png", "0002.png"]
    restore_removed(context, mine)
    assert len(context.uploads.images(mine)) == 23
    restore_removed(context, mine)
    assert list(context.uploads.names(mine).values()) == ["fox.png", "owl.png"]
    context.uploads.clear(mine)
    assert context.uploads.images(mine) == []
    restore_removed(context, mine)
    assert len(context.uploads.images(mine)) == 2
    with pytest.raises(gr.Error, match="no images were removed"):
        restore_removed(context, mine)


def test_a_run_on_a_folder_keeps_it_until_new_images_come(context: AppContext, icons: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(icons, tmp_path / "icons"))
    run = by_hand(context, "cli", instance_data_dir=str(folder), seed=1, method="lora")
    (run / "manifest.json").write_text(json.dumps([{"sha256": "0"}]))
    made = clone_run(context, context.uploads.new_session(), "cli")
    assert (made.name, made.method, made.settings["instance_data_dir"]) == ("cli", "lora", str(folder))
    assert made.messages == (
        f"Its images are those in the folder {folder}, not those in the Dataset tab.",
        "Different: 1 of the 1 images of the run are not in that folder any more.",
    )
    form = ConfigForm()
    told = summary(context, form, "", PLAIN, *form.write(made.settings | {"max_train_steps": 5}))
    assert f"the images of {folder}, not those in the Dataset tab" in told
    assert prefer_upload(0, "", str(folder), "") == (gr.skip(), gr.skip(), gr.skip())
    assert prefer_upload(2, "", "", "") == (gr.skip(), gr.skip(), gr.skip())
    told, *emptied = prefer_upload(2, "<b>refused</b>", str(folder), "")
    assert emptied == ["", ""]
    assert "refused" in told
    assert "2 new images" in told
    shutil.rmtree(folder)
    made = clone_run(context, context.uploads.new_session(), "cli")
    assert made.settings["instance_data_dir"] is None
    assert (
        "is not here, or is none that --data_dir allows, so its images are those in the Dataset tab"
        in made.messages[0]
    )


def test_what_cannot_be_the_same_is_told_and_is_no_html(context: AppContext) -> None:
    by_hand(context, "odd", dataset_name="<img src=x>", seed=None, warp=9)
    *_, told = clone(context, ConfigForm(), "", "odd")[:5]
    assert "those of the data set &lt;img src=x&gt;, not those in the Dataset tab" in told
    assert "this version has no warp" in told
    assert "the run has no seed" in told
    by_hand(context, "newer", method="sharper-lora")
    with pytest.raises(ConfigError, match="trained by the method 'sharper-lora', which this version does not have"):
        clone_run(context, "", "newer")


def test_the_page_has_a_place_for_all_that_a_clone_gives(context: AppContext) -> None:
    by_hand(context, "run", seed=1)
    page = build_app(context)
    (event,) = [one for one in page.fns.values() if getattr(one.fn, "func", None) is clone]
    assert len(event.outputs) == len(event.fn("", "run"))
