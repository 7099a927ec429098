"""Captioners: WD14 taggers by onnxruntime, Florence-2 by transformers, and their caption files."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_by_hand
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BartConfig,
    CLIPImageProcessorPil,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    PreTrainedTokenizerFast,
)

from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.evaluation import tagger
from flatlora_diffusion.evaluation.captioner import load_captioner
from flatlora_diffusion.evaluation.tagger import (
    Thresholds,
    as_words,
    find_tagger,
    likely_tags,
    load_tagger,
    tagger_input,
)

SIDE = 8
# How much of blue, green and red there is decides: the tag's weight for each, on pixels from 0 to 255.
TAGS = {"general": (9, (0, 0, 0)), "blue_sky": (0, (1, -1, -1)), "red_hair": (0, (-1, -1, 1)), "^_^": (0, (1, 1, 1)),
        "Ada_(poet)": (4, (-1, 1, -1))}  # fmt: skip
FLORENCE_WORDS = ["<s>", "<pad>", "</s>", "<unk>", "<image>", "Describe", "in", "detail", "what", "is", "shown", "the",
                  "image", ".", *(f"word{index}" for index in range(20))]  # fmt: skip


@pytest.fixture
def tagger_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tagger"
    folder.mkdir()
    rows = [f"{number},{name},{category},1" for number, (name, (category, _)) in enumerate(TAGS.items())]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *rows]) + "\n")
    weights = np.array([weight for _, weight in TAGS.values()], dtype=np.float32).T
    (folder / "model.onnx").write_bytes(onnx_by_hand.mean_colour_model(SIDE, weights / 255))
    return folder


class Session:
    """In place of onnxruntime's, where that is not installed: what the model made by hand computes."""

    def __init__(self, path: str, providers: list[str]) -> None:
        assert Path(path).is_file()
        self.weights = np.array([weight for _, weight in TAGS.values()], dtype=np.float32).T / 255

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="pixels", shape=["N", SIDE, SIDE, 3])]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name="scores")]

    def run(self, names: list[str], feed: dict[str, Any]) -> list[Any]:
        pixels = feed["pixels"]
        assert (names, pixels.shape, pixels.dtype) == (["scores"], (1, SIDE, SIDE, 3), np.float32)
        return [1 / (1 + np.exp(-pixels.mean(axis=(1, 2)) @ self.weights))]


@pytest.fixture(params=["onnxruntime", "a stand-in for it"])
def runtime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "onnxruntime":
        pytest.importorskip("onnxruntime")
        return
    stand_in = SimpleNamespace(InferenceSession=Session, get_available_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setitem(sys.modules, "onnxruntime", stand_in)
    monkeypatch.setattr(tagger.importlib.util, "find_spec", lambda name: name == "onnxruntime")


@pytest.mark.usefixtures("runtime")
def test_a_tagger_writes_what_is_likely_with_the_trigger_in_front(tagger_folder: Path) -> None:
    """Red and blue would be exchanged if the pixels were not BGR."""
    images = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "lime")]
    thresholds = Thresholds(general=0.7, character=0.72)
    captions = load_captioner(str(tagger_folder), thresholds=thresholds)(images)
    assert captions == ["red hair, ^_^", "blue sky, ^_^", "Ada (poet), ^_^"]
    assert load_captioner(str(tagger_folder), "TOK", thresholds)(images[:1]) == ["TOK, red hair, ^_^"]
    assert load_captioner(str(tagger_folder))(images[2:]) == ["^_^"], "a character has to be surer"


def test_a_tagger_sees_the_whole_image_on_a_white_square_in_bgr() -> None:
    pixels = tagger_input(Image.new("RGB", (8, 4), (10, 20, 30)), 8)
    assert (pixels.shape, pixels.dtype) == ((1, 8, 8, 3), np.float32)
    assert pixels[0, 4, 4].tolist() == [30, 20, 10]
    assert pixels[0, 0, 0].tolist() == pixels[0, 7, 7].tolist() == [255, 255, 255]
    assert pixels[0, 1:7].mean() < 255
    assert tagger_input(Image.new("RGB", (90, 30), "black"), 9)[0, :, 0].mean(axis=-1).tolist()[4] == 0


@pytest.mark.parametrize(
    ("tag", "words"),
    [("long_hair", "long hair"), ("^_^", "^_^"), ("x_x", "x_x"), ("(o)_(o)", "(o)_(o)"), ("||_||", "||_||"),
     ("0_0", "0_0"), ("d.va_(overwatch)", "d.va (overwatch)"), ("2_girls", "2 girls")],
)  # fmt: skip
def test_underscores_are_blanks_but_in_faces(tag: str, words: str) -> None:
    assert as_words(tag) == words


def test_characters_come_first_and_ratings_are_no_caption() -> None:
    tags = [("general", "9"), ("a_b_cat", "0"), ("dog", "0"), ("Ada", "4"), ("Bob", "4")]
    assert likely_tags(tags, [1.0, 0.4, 0.9, 0.9, 0.8], Thresholds()) == ["Ada", "dog", "a b cat"]


def test_a_tagger_that_cannot_run_is_told_in_one_sentence(
    tagger_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(tagger.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"needs the package onnxruntime: pip install .*\[captions\]"):
            load_captioner(str(tagger_folder))
    files = find_tagger(str(tagger_folder))
    assert files is not None
    assert find_tagger(str(tagger_folder.parent)) is None
    assert find_tagger("no/such-model") is None
    pytest.importorskip("onnxruntime")
    (tagger_folder / "selected_tags.csv").write_text("tag_id,name,category,count\n1,cat,0,3\n")
    with pytest.raises(ConfigError, match=r"gives 5 scores, .* 1 tags"):
        load_tagger("x", files, Thresholds())([Image.new("RGB", (8, 8))])
    (tagger_folder / "selected_tags.csv").write_text("word\ncat\n")
    with pytest.raises(ConfigError, match="cannot be read as a tagger's tags"):
        load_tagger("x", files, Thresholds())
    (tagger_folder / "selected_tags.csv").write_text("name,category\ncat,0\n")
    (tagger_folder / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"the model.onnx of captioner 'x' cannot be loaded: ") as error:
        load_tagger("x", files, Thresholds())
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("runtime")
def test_a_tagger_on_the_hub_is_known_by_its_list_of_tags(
    tagger_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(tagger_folder / file)

    monkeypatch.setattr(tagger, "hf_hub_download", download)
    captioner = load_captioner("some/tagger", "TOK")
    assert asked == [("some/tagger", "selected_tags.csv"), ("some/tagger", "model.onnx")]
    assert captioner([Image.new("RGB", (8, 8), "red")]) == ["TOK, red hair, ^_^"]


@pytest.fixture(scope="module")
def florence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Florence-2 of random weights with the parts that a saved one has."""
    folder = tmp_path_factory.mktemp("florence")
    small: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    text = BartConfig(
        vocab_size=len(FLORENCE_WORDS), d_model=16, init_std=1.0, forced_eos_token_id=None, **small, **heads, **ids
    )
    widths = {"embed_dim": (8, 8, 8, 16), "num_heads": (2,) * 4, "num_groups": (2,) * 4, "depths": (1,) * 4}
    vision = {"model_type": "florence_vision", "projection_dim": 16, "window_size": 4, **widths}
    config = Florence2Config(
        text_config=text.to_dict(), vision_config=vision, image_token_id=FLORENCE_WORDS.index("<image>")
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Florence2ForConditionalGeneration(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(FLORENCE_WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    ).save_pretrained(folder)
    size = {"height": 64, "width": 64}
    CLIPImageProcessorPil(size=size, do_center_crop=False, resample=3).save_pretrained(folder)
    return folder


def test_florence_is_asked_for_a_caption_as_its_own_processor_asks(florence: Path) -> None:
    images = [Image.new("RGB", (50, 40), colour) for colour in ("red", "blue")]
    captions = load_captioner(str(florence), max_tokens=6)(images)
    model = Florence2ForConditionalGeneration.from_pretrained(florence, dtype=torch.float32).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(florence)
    pixels.image_seq_length = 5  # 2 x 2 places of a picture of 64 pixels, and their mean
    tokenizer = PreTrainedTokenizerFast.from_pretrained(florence)
    asked = Florence2Processor(pixels, tokenizer)(images, text=["<DETAILED_CAPTION>"] * 2, return_tensors="pt")
    ids = model.generate(**asked, do_sample=False, num_beams=1, max_new_tokens=6)
    assert captions == [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    assert all(captions)
    with_word = load_captioner(str(florence), "TOK", max_tokens=6)(images)
    assert with_word == [f"{text}, in the style of TOK" for text in captions]


def test_another_model_is_refused_by_its_kind(florence: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="is a bert model; give a folder or hub id of a BLIP, of a Florence-2"):
        load_captioner(str(other))
    reference = '{"model_type": "florence2", "text_config": {"model_type": "florence2_language"}, "vision_config": {}}'
    (other / "config.json").write_text(reference)
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*florence-community/Florence-2-base") as error:
        load_captioner(str(other))
    assert "\n" not in str(error.value)
    halved = tmp_path / "halved"
    shutil.copytree(florence, halved)
    config = (halved / "config.json").read_text().replace('"encoder_layers": 1', '"encoder_layers": 2')
    (halved / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=r"lacks \d+ of its weights, such as "):
        load_captioner(str(halved))


def test_the_command_captions_what_has_no_caption(
    icons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "icons"
    shutil.copytree(icons, folder)
    first, second, kept = sorted(folder.glob("*.txt"))
    before = kept.read_text()
    for path in (first, second):
        path.unlink()
    given: dict[str, Any] = {}

    def load(name: str, trigger: str, thresholds: Thresholds, device: str) -> Any:
        given.update(name=name, trigger=trigger, thresholds=thresholds)
        answers = iter(["TOK, cat", ""])
        return lambda images: [next(answers) for _ in images]

    monkeypatch.setattr("flatlora_diffusion.evaluation.caption_files.load_captioner", load)
    arguments = ["--captioner", "some/tagger", "--trigger", "TOK", "--tag_threshold", "0.5"]
    arguments += ["--character_threshold", "0.6"]
    assert main(["caption", str(folder), *arguments]) == 0
    assert given == {"name": "some/tagger", "trigger": "TOK", "thresholds": Thresholds(0.5, 0.6)}
    assert (first.read_text(), kept.read_text(), second.exists()) == ("TOK, cat\n", before, False)
    assert "1 captions written" in capsys.readouterr().out
    second.write_text("owl")
    assert main(["caption", str(folder), *arguments]) == 2
    assert "has a caption for every image" in capsys.readouterr().err
    assert main(["caption", str(tmp_path / "nothing"), *arguments]) == 2
    assert main(["caption", str(folder)]) == 2
    assert "captioner is missing: give --captioner" in capsys.readouterr().err


def test_a_caption_that_is_written_meanwhile_stays(
    icons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "icons"
    shutil.copytree(icons, folder)
    first, second, _ = sorted(folder.glob("*.txt"))
    for path in (first, second):
        path.unlink()

    def load(*_: Any) -> Any:
        def caption(images: Any) -> list[str]:
            second.write_text("an owl, by hand")
            return ["made up"]

        return caption

    monkeypatch.setattr("flatlora_diffusion.evaluation.caption_files.load_captioner", load)
    assert main(["caption", str(folder), "--captioner", "some/tagger"]) == 0
    assert (first.read_text(), second.read_text()) == ("made up\n", "an owl, by hand")
    assert "1 captions written" in capsys.readouterr().out
