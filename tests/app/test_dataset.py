"""The Dataset tab: what is shown of the images, how they are captioned and removed."""

from __future__ import annotations

import base64
import errno
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
import pytest
from huggingface_hub import constants
from PIL import Image

from app.context import AppContext, make_context
from app.dataset.captioning import (
    END,
    FRONT,
    REMOVE,
    REPLACE,
    caption_all,
    caption_by_model,
    change_all,
    changed_captions,
    empty_captions,
    undo_captions,
    use_trigger,
)
from app.dataset.cards import card_functions, cards_page
from app.dataset.layout import build_intake
from app.dataset.tab import load_samples_icons, remove_all, show, upload
from app.dataset.thumbnails import Thumbnails, as_trained
from app.dataset.view import Card, Framing, fill_captions, load_view, training_size
from app.forms.forms import ConfigForm, preset_settings
from app.settings import AppSettings
from app.uploads.captions import captions_from_names
from flatlora_diffusion.config import SAMPLES, ModelConfig


@pytest.fixture
def context(tmp_path: Path) -> AppContext:
    return make_context(AppSettings(runs_dir=str(tmp_path / "runs"), data_dir=(str(tmp_path),)))


def session_of(context: AppContext, folder: Path, *files: tuple[str, tuple[int, int]]) -> str:
    folder.mkdir(exist_ok=True)
    for index, (name, size) in enumerate(files):
        Image.effect_noise(size, 50 + 10 * index).save(folder / name)
    return upload(context, "", [str(folder / name) for name, _ in files])[0]


def test_names_outlive_the_page_and_go_with_their_image(context: AppContext, tmp_path: Path) -> None:
    session = session_of(context, tmp_path / "in", ("Sea fox.png", (64, 64)), ("owl.png", (64, 64)))
    again = make_context(context.settings)
    assert again.uploads.names(session) == {"0001.png": "Sea fox.png", "0002.png": "owl.png"}
    _, remove, _ = card_functions(again)
    assert remove({"session": session, "image": "0001.png"}) == {"message": ""}
    assert again.uploads.names(session) == {"0002.png": "owl.png"}
    assert "not among yours" in remove({"session": session, "image": "0001.png"})["message"]
    assert "reload the page" in remove({"session": "../../x", "image": "0001.png"})["message"]
    again.uploads.clear(session)
    assert again.uploads.names(session) == {}


def test_a_drop_of_good_and_bad_files_shows_the_good_ones_and_empties_the_drop_zone(
    context: AppContext, thumbnails: Thumbnails, tmp_path: Path
) -> None:
    second = Image.new("RGB", (64, 64), "blue")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "two.jpg", "MPO", save_all=True, append_images=[second])
    (tmp_path / "<b>odd.ppm").write_bytes(b"P6 x 8 255\n")
    Image.new("RGB", (64, 64), "green").save(tmp_path / "fox.png")
    names = ("two.jpg", "<b>odd.ppm", "fox.png")
    session, drop, told, _ = upload(context, "", [str(tmp_path / name) for name in names])
    assert drop is None
    assert "<li>&lt;b&gt;odd.ppm: invalid literal for int" in told
    cards = show(context, thumbnails, session, "", "white", False, "tiny", "64")[0]
    assert re.findall(r'"Caption of (.*?)"', cards) == ["two.jpg", "fox.png"]
    assert [one.convert("RGB").tobytes()[0] > 200 for one in pictures_of(cards)] == [True, False]
    session, drop, told, _ = upload(context, "no session", [str(tmp_path / "fox.png")])
    assert (drop, "reload the page" in told) == (None, True)


def test_samples_do_not_take_the_place_of_the_users_images(context: AppContext, tmp_path: Path) -> None:
    session = session_of(context, tmp_path / "in", ("owl.png", (64, 64)))
    with pytest.raises(gr.Error, match="you have 1 images, and the samples would mix"):
        load_samples_icons(context, session)
    assert context.uploads.names(session) == {"0001.png": "owl.png"}
    context.uploads.clear(session)
    load_samples_icons(context, session)
    assert len(context.uploads.images(session)) == 23


def test_the_training_size_is_that_of_the_bases_own_configs(base: Path) -> None:
    assert training_size(ModelConfig(pretrained_model_name_or_path=str(base)), None) == 32
    assert training_size(ModelConfig(pretrained_model_name_or_path="tiny"), None) == 64
    assert training_size(ModelConfig(pretrained_model_name_or_path="no/such-base"), None) == 1024
    assert training_size(ModelConfig(pretrained_model_name_or_path="tiny"), 48) == 48


def test_buckets_are_told_and_shown_in_their_shape(
    context: AppContext, thumbnails: Thumbnails, tmp_path: Path
) -> None:
    session = session_of(context, tmp_path / "in", ("wide.png", (200, 100)), ("square.png", (100, 100)))
    cards, count, *_ = show(context, thumbnails, session, "TOK", "white", True, "tiny", "64")
    assert [one.size for one in pictures_of(cards)] == [(96, 48), (64, 64)]
    assert re.findall(r"<p>bucket (\d+ x \d+)", cards) == ["96 x 48", "64 x 64"]
    assert "about 64 x 64 pixels" in count
    cards = show(context, thumbnails, session, "TOK", "white", False, "tiny", "64")[0]
    assert pictures_of(cards)[0].size == (64, 64)
    assert "bucket" not in cards


def test_a_colour_that_is_none_is_told_and_the_gallery_stays(
    context: AppContext, thumbnails: Thumbnails, tmp_path: Path
) -> None:
    session = session_of(context, tmp_path / "in", ("owl.png", (64, 64)))
    cards, count, *_ = show(context, thumbnails, session, "TOK", "whi", False, "tiny", "")
    assert cards == gr.skip()
    assert "whi" in count
    assert "fl-bad" in count
    assert "32 x 32" in show(context, thumbnails, session, "TOK", "white", False, "tiny", "32")[1]
    assert "64 x 64" in show(context, thumbnails, session, "TOK", "white", False, "tiny", "99999")[1]


def test_thumbnails_are_made_once_for_the_same_content(
    context: AppContext, thumbnails: Thumbnails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def counted(path: Path, background: str, size: tuple[int, int]) -> Image.Image:
        made.append((path.name, background, size))
        return as_trained(path, background, size)

    monkeypatch.setattr("app.dataset.thumbnails.as_trained", counted)
    session = session_of(context, tmp_path / "in", ("a.png", (64, 64)), ("b.png", (64, 64)))
    first = load_view(context.uploads, thumbnails, session, Framing("white", 32))
    other = Thumbnails(thumbnails.folder)  # as after a restart
    second = load_view(context.uploads, other, session, Framing("white", 32))
    assert len(made) == 2
    assert [one.picture.tobytes() for one in first] == [one.picture.tobytes() for one in second]
    load_view(context.uploads, other, session, Framing("white", 16))
    assert len(made) == 4
    path = context.uploads.images(session)[0]
    Image.new("RGB", (64, 64), "red").save(path)
    shown = load_view(context.uploads, other, session, Framing("white", 32))[0].picture
    assert shown.getpixel((5, 5)) == (255, 0, 0)


def test_a_model_captions_only_what_has_no_caption(context: AppContext, tmp_path: Path) -> None:
    files = [(f"IMG_{number}.png", (64, 64)) for number in range(6)]
    session = session_of(context, tmp_path / "in", *files, ("owl.png", (64, 64)))
    assert context.uploads.captions(session)["0001.png"] == ""

    def captioner(images: Sequence[Image.Image]) -> list[str]:
        context.uploads.save_captions(session, {"0002.png": "mine"})  # the user goes on meanwhile
        return ["a fox, in the style of TOK"] * len(images)

    told: list[tuple[int, int]] = []
    fill_captions(context.uploads, session, captioner, lambda done, of: told.append((done, of)))
    captions = context.uploads.captions(session)
    assert captions["0001.png"] == captions["0006.png"] == "a fox, in the style of TOK"
    assert (captions["0002.png"], captions["0007.png"]) == ("mine", "owl")
    assert told == [(4, 6), (6, 6)]


def add_model(folder: Path, architecture: str, size: int) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    (folder / "model.safetensors").write_bytes(b"x" * size)


def test_a_captioner_that_is_on_this_computer_is_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: AppContext
) -> None:
    cache, blip = tmp_path / "hub", "BlipForConditionalGeneration"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    def offered() -> tuple[str | None, list[str], bool]:
        with gr.Blocks() as page:
            model = build_intake(context, ConfigForm()).model
        (fold,) = [one for one in page.blocks.values() if getattr(one, "label", "") == "Caption with a model"]
        return model.value, [name for name, _ in model.choices], fold.open

    assert offered() == (None, [], False)
    for name, kind, size in (("a--large", blip, 500), ("b--base", blip, 50), ("c--clip", "CLIPModel", 5)):
        repo = cache / f"models--{name}"
        add_model(repo / "snapshots" / ("0" * 40), kind, size)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("0" * 40)
        (repo / "blobs").mkdir()
    assert offered() == ("b/base", ["b/base", "a/large"], True)
    mine = tmp_path / "mine"  # in a folder that --data_dir allows
    add_model(mine, blip, 5)
    assert offered()[1] == ["b/base", "a/large", mine.as_posix()]
    (mine / "model.safetensors").unlink()  # a pickle alone is not read
    assert offered()[1] == ["b/base", "a/large"]
    add_model(mine.with_name("florence"), "Florence2ForConditionalGeneration", 5)
    mine.with_name("tagger").mkdir()
    for name in ("model.onnx", "selected_tags.csv"):
        (mine.with_name("tagger") / name).touch()
    assert offered()[1][2:] == [mine.with_name(name).as_posix() for name in ("florence", "tagger")]


def test_a_captioner_that_is_not_there_is_one_sentence(context: AppContext, tmp_path: Path) -> None:
    def caption(session: str, model: str | None) -> str:
        return caption_by_model(context, session, model, "TOK", lambda done, of: None)

    with pytest.raises(gr.Error, match="no images to caption"):
        caption("", "x")
    session = session_of(context, tmp_path / "in", ("owl.png", (64, 64)))
    with pytest.raises(gr.Error, match="every image has a caption"):
        caption(session, "x")
    empty_captions(context, session)
    with pytest.raises(gr.Error, match="no captioning model is given"):
        caption(session, None)
    with pytest.raises(gr.Error, match=r"captioner .* cannot be loaded") as told:
        caption(session, str(tmp_path / "nothing"))
    assert "\n" not in str(told.value)
    assert context.uploads.captions(session) == {"0001.png": ""}


def test_a_card_saves_its_caption_only_over_the_one_it_has_shown(context: AppContext, tmp_path: Path) -> None:
    session = session_of(context, tmp_path / "in", ("fox.png", (64, 64)), ("owl.png", (64, 64)))
    save, *_ = card_functions(context)
    versions = [card.version for card in view_of(context, session, tmp_path)]
    mine = {"session": session, "image": "0001.png", "version": versions[0], "text": "a fox, mine"}
    kept = save(mine)
    assert (kept["is_saved"], kept["text"]) == (True, "a fox, mine")
    assert save(mine | {"version": kept["version"], "text": "a fox, again"})["is_saved"]
    late = save(mine | {"text": "from a window that was open before"})
    assert (late["is_saved"], late["text"]) == (False, "a fox, again")
    assert save(mine | {"version": late["version"], "text": "kept"})["is_saved"]  # after it was shown
    assert context.uploads.captions(session) == {"0001.png": "kept", "0002.png": "owl"}
    assert [card.version for card in view_of(context, session, tmp_path)][1] == versions[1]
    undo_captions(context, session)
    assert context.uploads.captions(session)["0001.png"] == "a fox, again"
    for wrong in (
        {"image": "../../names.json"},
        {"session": "x"},
        {"text": "x" * 2001},
        {"image": 7},
        {"session": None},
    ):
        told = save(mine | {"version": late["version"]} | wrong)
        assert told["message"].startswith("Not saved: "), wrong
        assert told["can_retry"] is False, "it would be refused for ever"


def test_what_is_typed_into_a_card_in_one_stay_is_one_change_to_undo(context: AppContext, tmp_path: Path) -> None:
    session = session_of(context, tmp_path / "in", ("fox.png", (64, 64)), ("owl.png", (64, 64)))
    save, *_ = card_functions(context)
    version = view_of(context, session, tmp_path)[0].version

    def typed(text: str, goes_on: bool) -> None:
        nonlocal version
        kept = save({"session": session, "image": "0001.png", "version": version, "text": text, "goes_on": goes_on})
        version = kept["version"]

    def caption() -> str:
        return context.uploads.captions(session)["0001.png"]

    typed("a r", False)
    typed("a red fox", True)
    undo_captions(context, session)
    assert caption() == "fox"
    undo_captions(context, session)
    assert caption() == "a red fox"
    version = view_of(context, session, tmp_path)[0].version
    typed("a red f", False)
    context.uploads.save_captions(session, {"0002.png": "in another window"})
    typed("a red fur", True)
    undo_captions(context, session)
    assert context.uploads.captions(session) == {"0001.png": "a red f", "0002.png": "in another window"}


def test_cards_tell_every_error_as_a_sentence(
    context: AppContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(context, tmp_path / "in", ("fox.png", (64, 64)))
    version = view_of(context, session, tmp_path)[0].version
    save, remove, enlarge = card_functions(context)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("app.uploads.uploads.write_text", full)
    told = save({"session": session, "image": "0001.png", "version": version, "text": "a red fox"})
    assert (told["message"], told["can_retry"]) == (
        "Not saved: the disk is full; free some room on it, then try again",
        True,
    )
    for function in (save, remove, enlarge):
        answer = function(None)  # type: ignore[arg-type]
        assert "AttributeError" in answer["message"]
        assert answer["can_retry"]


def test_a_picture_is_enlarged_to_all_of_what_was_dropped(context: AppContext, tmp_path: Path) -> None:
    session = session_of(context, tmp_path / "in", ("wide.png", (2000, 500)), ("small.png", (100, 80)))
    *_, enlarge = card_functions(context)
    wide, small = (enlarge({"session": session, "image": f"000{number}.png"}) for number in (1, 2))
    assert [pictures_of(one["picture"] + '"')[0].size for one in (wide, small)] == [(1600, 400), (100, 80)]
    assert [one["message"] for one in (wide, small)] == ["2000 x 500 pixels", "100 x 80 pixels"]
    assert "not among yours" in enlarge({"session": session, "image": "../names.json"})["message"]


def test_images_are_shown_though_no_thumbnail_can_be_kept(context: AppContext, tmp_path: Path) -> None:
    session = session_of(context, tmp_path / "in", ("fox.png", (64, 64)))
    (tmp_path / "file").touch()
    shown = load_view(context.uploads, Thumbnails(tmp_path / "file"), session, Framing("white", 32))
    assert shown[0].picture.size == (32, 32)


def test_a_card_shows_names_and_captions_as_text(context: AppContext, tmp_path: Path) -> None:
    session = session_of(context, tmp_path / "in", ("IMG_1.png", (64, 64)))
    context.uploads.save_captions(session, {"0001.png": "</textarea><b>"})
    page = cards_page(view_of(context, session, tmp_path), session)
    assert "&lt;/textarea&gt;&lt;b&gt;</textarea>" in page
    assert 'aria-label="Caption of IMG_1.png"' in page


@pytest.mark.parametrize(
    ("how", "text", "by", "changed"),
    [
        (REPLACE, "icon", "drawing", {"a": "a TOK drawing of fox", "b": "red drawing, red"}),
        (FRONT, " TOK ", "", {"b": "TOK red icon, red", "c": "TOK"}),
        (END, "in red", "", {"a": "a TOK icon of fox in red", "b": "red icon, red in red", "c": "in red"}),
        (REMOVE, "red", "", {"b": "icon"}),
        (REMOVE, "fo", "", {}),
    ],
)
def test_all_captions_are_changed_at_once(how: str, text: str, by: str, changed: dict[str, str]) -> None:
    captions = {"a": "a TOK icon of fox", "b": "red icon, red", "c": ""}
    assert changed_captions(captions, how, text, by) == changed


def test_a_change_of_all_captions_is_undone_at_once(context: AppContext, tmp_path: Path) -> None:
    session = session_of(context, tmp_path / "in", ("fox.png", (64, 64)), ("owl.png", (64, 64)))
    with pytest.raises(gr.Error, match="the text is empty"):
        change_all(context, session, REPLACE, " ", "x")
    assert "2 of 2 captions changed" in change_all(context, session, FRONT, "TOK", "")
    assert context.uploads.captions(session) == {"0001.png": "TOK fox", "0002.png": "TOK owl"}
    undo_captions(context, session)
    assert context.uploads.captions(session) == {"0001.png": "fox", "0002.png": "owl"}


def view_of(context: AppContext, session: str, folder: Path) -> list[Card]:
    return load_view(context.uploads, Thumbnails(folder / "thumbnails"), session, Framing("white", 32))


def pictures_of(cards: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(one))) for one in re.findall(r"base64,([^\"]+)", cards)]


def test_the_last_change_of_captions_can_be_undone_and_done_again(context: AppContext, tmp_path: Path) -> None:
    with pytest.raises(gr.Error, match="no captions to bring back"):
        undo_captions(context, "")
    files = [(f"IMG_{number}.png", (64, 64)) for number in range(6)]
    session = session_of(context, tmp_path / "in", *files)
    with pytest.raises(gr.Error, match="no caption was changed yet"):
        undo_captions(context, session)
    written = {f"000{number}.png": f"caption {number}" for number in range(1, 7)}
    context.uploads.save_captions(session, written)
    empty_captions(context, session)
    empty_captions(context, session)  # changes nothing, so it is no step
    assert "6 captions are as before" in undo_captions(context, session)
    assert context.uploads.captions(session) == written
    undo_captions(context, session)
    assert not any(context.uploads.captions(session).values())

    def captioner(images: Sequence[Image.Image]) -> list[str]:
        return ["a fox"] * len(images)

    context.uploads.save_captions(session, {"0001.png": "mine"})
    fill_captions(context.uploads, session, captioner, lambda done, of: None)
    context.uploads.remove(session, "0003.png")
    assert "4 captions are as before" in undo_captions(context, session)
    assert [text for text in context.uploads.captions(session).values() if text] == ["mine"]
    context.uploads.clear(session)
    with pytest.raises(gr.Error, match="no caption was changed yet"):
        undo_captions(context, session)


def test_captions_of_file_names_leave_what_the_user_has_written(context: AppContext, tmp_path: Path) -> None:
    files = [(name, (64, 64)) for name in ("red-fox.png", "owl.png", "IMG_2041.png", "cat.png", "dog.png")]
    session = session_of(context, tmp_path / "in", *files)
    context.uploads.save_captions(session, {"0002.png": "an owl that sleeps", "0004.png": ""})
    told = caption_all(context, session, "ABC")
    assert context.uploads.captions(session) == {
        "0001.png": "a ABC icon of a red fox, in the style of ABC",
        "0002.png": "an owl that sleeps",
        "0003.png": "",
        "0004.png": "a ABC icon of a cat, in the style of ABC",
        "0005.png": "a ABC icon of a dog, in the style of ABC",
    }
    assert "3 captions written from file names; 2 left as they are" in told
    caption_all(context, session, "XYZ")
    assert context.uploads.captions(session)["0001.png"] == "a XYZ icon of a red fox, in the style of XYZ"


def test_a_caption_of_a_file_name_has_the_article_of_the_samples_captions() -> None:
    """Theirs were written by another rule, with a list of all nouns among them that take none."""
    rows = [json.loads(line) for line in (SAMPLES / "icons_3d/heldout/metadata.jsonl").read_text().splitlines()]
    names = {row["name"]: row["text"] for row in rows if re.fullmatch("[a-z ]+", row["name"])}
    for path in (SAMPLES / "icons_3d").glob("*.txt"):
        names[path.stem.replace("-", " ")] = path.read_text().strip()
    made = captions_from_names({name: f"{name}.png" for name in names}, dict.fromkeys(names, ""), "TOK")
    others = {name: made[name] for name, text in names.items() if made[name] != text}
    assert len(names) > 80
    assert len(others) < 6, others
    for name, told in (
        ("ambulance", "an ambulance"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("grapes", "grapes"),
        ("glass of grapes", "a glass of grapes"),
        ("bus", "a bus"),
        ("my cat", "my cat"),
        ("an owl", "an owl"),
        ("2 owls", "2 owls"),
    ):
        caption = f"a TOK icon of {told}, in the style of TOK"
        assert captions_from_names({"x": f"{name}.png"}, {"x": ""}, "TOK") == {"x": caption}
        assert captions_from_names({"x": f"{name}.png"}, {"x": caption}, "ABC") == {"x": caption.replace("TOK", "ABC")}
        earlier = f"a TOK icon of {name}, in the style of TOK"  # as earlier versions wrote it
        assert captions_from_names({"x": f"{name}.png"}, {"x": earlier}, "TOK") == {"x": caption}


def test_the_trigger_word_reaches_the_preview_prompt_and_a_missing_one_is_told(
    context: AppContext, thumbnails: Thumbnails, tmp_path: Path
) -> None:
    prompt = preset_settings("Quick look", {})["validation_prompt"]
    prompt, used = use_trigger(prompt, " ABC ", "TOK")
    assert prompt.splitlines()[0] == "a ABC icon of a tomato, in the style of ABC"
    assert ("TOK" in prompt, used) == (False, "ABC")
    assert use_trigger(prompt, "", used) == (prompt, "ABC")
    session = session_of(context, tmp_path / "in", ("TOKEN.png", (64, 64)))
    values = ("white", False, "tiny", "64")
    assert "No caption has the trigger word TOK" in show(context, thumbnails, session, "TOK", *values)[1]
    assert "trigger word" not in show(context, thumbnails, session, " ", *values)[1]
    caption_all(context, session, "TOK")
    assert "trigger word" not in show(context, thumbnails, session, "TOK", *values)[1]


def test_all_captions_are_emptied_and_all_images_removed(context: AppContext, tmp_path: Path) -> None:
    session = session_of(context, tmp_path / "in", ("owl.png", (64, 64)))
    empty_captions(context, session)
    assert context.uploads.captions(session) == {"0001.png": ""}
    remove_all(context, session)
    assert context.uploads.captions(session) == {}
