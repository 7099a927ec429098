"""Which files and folders a setting from the browser may name."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
import pytest

from app.context import AppContext, make_context
from app.dataset.captioning import caption_by_model
from app.dataset.tab import load_samples_icons, show
from app.dataset.thumbnails import Thumbnails
from app.forms.forms import DECIDED_BY_THE_APP, ConfigForm
from app.runs.allowed_paths import MODELS, PARTS, READ, WRITTEN
from app.runs_tab.tab import take_lora
from app.settings import AppSettings
from app.train.tab import PLAIN, start, summary
from flatlora_diffusion.config import SAMPLES, ConfigError, TrainConfig, settings_with


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AppContext:
    """An app with one folder that the operator allowed, in which a link leads out; a run, and somebody's uploads."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for folder in ("data/icons", "outside/model", "runs/mine/checkpoint-1", "work/owner/model"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("outside/secret.safetensors", "data/lora.safetensors", "runs/mine/config.json"):
        (tmp_path / file).write_text('{"secret": 12345678}')
    (tmp_path / "runs/mine/manifest.json").write_text("[]")
    (tmp_path / "data/link").symlink_to(tmp_path / "outside")
    (tmp_path / "runs/link").symlink_to(tmp_path / "outside")
    (tmp_path / "data/circle").symlink_to(tmp_path / "data/circle")
    context = make_context(AppSettings(runs_dir=str(tmp_path / "runs"), data_dir=(str(tmp_path / "data"),)))
    load_samples_icons(context, "s" * 16)
    context.uploads.freeze("s" * 16)
    return context


def refusal(context: AppContext, name: str, value: str) -> str:
    """Why the setting is refused; empty when it is not."""
    try:
        context.allowed_paths.check(TrainConfig.from_dict({name: value}))
    except ConfigError as error:
        return str(error)
    return ""


def test_every_setting_that_names_a_place_is_checked_or_decided_by_the_app() -> None:
    places = [*READ, *WRITTEN, *MODELS, *PARTS]
    assert len(set(places)) == len(places)
    assert set(settings_with("path_kind")) - set(DECIDED_BY_THE_APP) == set(places)
    assert set(settings_with("is_path")) - {"output_dir"} <= set(places)


OUTSIDE = {
    "outside": "{root}/outside",
    "a file outside": "{root}/outside/secret.safetensors",
    "not there": "{root}/outside/nothing",
    "up": "../outside",
    "up from an allowed folder": "{root}/data/../outside",
    "up from nowhere": "{root}/data/nothing/../../outside",
    "a link": "{root}/data/link",
    "through a link": "{root}/data/link/model",
    "through a link of the runs": "{root}/runs/link/model",
    "links in a circle": "{root}/data/circle/../../outside",
    "the system's": "/etc",
    "a process's": "/proc/self/environ",
    "the root": "/",
    "the working folder": ".",
    "a folder below it": "owner/model",
    "a beginning of an allowed name": "{root}/data-of-others",
    "the home": "~",
    "somebody's home": "~root/.ssh",
    "a URL": "https://example.org/model",
    "a file URL": "file:///etc/passwd",
    "a bucket": "s3://bucket/cache",
    "another machine": "//server/share",
    "another machine on Windows": "\\\\server\\share",
    "a null character": "{root}/data/\x00",
    "too long": "{root}/" + "x/" * 3000,
    "the app's own files": "{root}/runs/.app",
    "its database": "{root}/runs/.app/app.db",
    "the uploads of all": "{root}/runs/.app/uploads/sessions",
    "the uploads of another": "{root}/runs/.app/uploads/sessions/ssssssssssssssss",
    "all that is trained on": "{root}/runs/.app/uploads/frozen",
    "the trash": "{root}/runs/.trash",
}


@pytest.mark.parametrize("name", [*READ, *WRITTEN, *MODELS])
def test_nothing_outside_may_be_named_and_none_is_told_to_exist(
    context: AppContext, tmp_path: Path, name: str
) -> None:
    told = {}
    for place, text in OUTSIDE.items():
        value = text.format(root=tmp_path)
        told[place] = refusal(context, name, value).replace(repr(value), "'X'")
    assert told == dict.fromkeys(OUTSIDE, told["outside"]), "the same sentence for all"
    assert told["outside"].startswith(f"{name}='X' is outside of the folders that the browser may name")
    assert "12345678" not in told["outside"]


def test_a_dataset_file_that_may_be_read_may_not_name_folders_that_may_not(
    context: AppContext, tmp_path: Path
) -> None:
    file = tmp_path / "data" / "my.toml"
    for folder, is_refused in (("icons", False), (f"{tmp_path}/outside", True), ("link", True)):
        file.write_text(f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{folder}'\n")
        assert ("image_dir" in refusal(context, "dataset_config", str(file))) is is_refused


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("place", ["runs", "runs/mine", "runs/mine/checkpoint-1", "runs/mine/new", "runs/.results/x"])
def test_nothing_is_written_into_runs_or_what_is_the_apps_own(
    context: AppContext, tmp_path: Path, name: str, place: str
) -> None:
    assert "is outside of the folders" in refusal(context, name, f"{tmp_path}/{place}")
    assert "is outside of the folders" in refusal(context, name, str(SAMPLES / "class"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("instance_data_dir", "{root}/data/icons"),
        ("instance_data_dir", "../data/icons"),
        ("instance_data_dir", "{root}/runs/mine/images"),
        ("instance_data_dir", str(SAMPLES / "icons_3d")),
        ("init_lora", "{root}/data/lora.safetensors"),
        ("validation_data_dir", str(SAMPLES / "icons_3d/heldout")),
        ("class_data_dir", "{root}/data/class/new"),
        ("class_data_dir", "{root}/runs/class-images"),
        ("embedding_cache_dir", "{root}/runs/cache/embeddings"),
        ("cache_dir", "../data/cache"),
        ("pretrained_model_name_or_path", "tiny"),
        ("pretrained_model_name_or_path", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("pretrained_model_name_or_path", "{root}/data/base"),
        ("pretrained_vae_model_name_or_path", "madebyollin/sdxl-vae-fp16-fix"),
        ("revision", "refs/pr/5"),
        ("variant", "fp16"),
        ("logging_dir", "logs/mine"),
    ],
)
def test_the_apps_own_places_allowed_folders_and_hub_ids_may_be_named(
    context: AppContext, tmp_path: Path, name: str, value: str
) -> None:
    assert refusal(context, name, value.format(root=tmp_path)) == ""


def test_an_upload_that_is_trained_on_may_be_named_again(context: AppContext) -> None:
    (frozen,) = context.uploads.frozen.iterdir()
    assert refusal(context, "instance_data_dir", str(frozen)) == ""


def test_an_allowed_folder_around_the_runs_does_not_open_the_apps_own_files(tmp_path: Path) -> None:
    context = make_context(AppSettings(runs_dir=str(tmp_path / "runs"), data_dir=(str(tmp_path),)))
    for name in ("instance_data_dir", "class_data_dir"):
        assert refusal(context, name, f"{tmp_path}/pictures") == ""
        assert "is outside" in refusal(context, name, f"{tmp_path}/runs/.app/uploads/sessions")


def test_every_handler_that_takes_a_place_refuses_others(context: AppContext, tmp_path: Path) -> None:
    form, session, outside = ConfigForm(), "s" * 16, f"{tmp_path}/outside"
    values = form.write({"class_data_dir": outside, "report_to": "none", "max_train_steps": 2})
    with pytest.raises(gr.Error, match=r"Class data folder = "):
        start(context, form, session, "run", PLAIN, *values)
    assert "is outside of the folders" in summary(context, form, session, PLAIN, *values)
    assert context.queue.jobs() == []
    shown = show(context, Thumbnails(tmp_path / "t"), session, "", "white", False, outside, None)
    assert "is outside of the folders" in shown[1]
    context.uploads.save_captions(session, {"0001.png": ""})
    with pytest.raises(gr.Error, match=r"captioning model=.* is outside of the folders"):
        caption_by_model(context, session, outside, "", lambda done, of: None)
    lora = tmp_path / "upload.safetensors"
    lora.write_text("x")
    assert "is outside of the folders" in take_lora(context, str(lora), outside)[0]
