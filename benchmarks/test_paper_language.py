"""The language benchmark on a tiny encoder and made-up texts: what is trained and measured, and what its texts are."""

from __future__ import annotations

import ast
import io
import json
import tarfile
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from benchmarks import paper_language, paper_language_tasks, paper_study_surface
from benchmarks.paper_language import TextBench
from benchmarks.paper_language_tasks import LANGUAGES, Task, _even, _of_tree, _split, _split_evenly, load_task
from benchmarks.paper_study_run import run
from benchmarks.paper_study_settings import Settings
from flatlora_diffusion import LandscapeConfig

WORDS = ["sun", "rain", "warm", "cold", "day", "night", "sea", "hill"]
TASK = Task(
    "sentiment",
    train=[(f"{first} {second}", "good" if first in WORDS[:4] else "bad") for first in WORDS for second in WORDS],
    validation=[("sun day", "good"), ("night hill", "bad")],
    test=[("warm night", "good"), ("sea sun", "bad")],
    shifts={"reviews": [("cold sea", "good"), ("hill", "bad")], "names": [("rain", "good"), ("day", "bad")]},
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=12, max_position_embeddings=50, **sizes)).save_pretrained(folder)
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(["<pad>", "<unk>", *WORDS])}, "<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bench(encoder: Path) -> TextBench:
    return TextBench(TASK, encoder)


def test_every_test_is_measured(bench: TextBench) -> None:
    seen = run(bench, Settings(lr=1e-3, steps=2), seed=0)
    assert {name for name, value in seen.items() if isinstance(value, dict)} == {
        "validation", "test", "reviews", "names", "train",
    }  # fmt: skip
    only = run(bench, Settings(lr=1e-3, steps=2), seed=0, only_validation=True)
    assert set(only) == {"validation", "last_loss", "seconds", "whole_seconds"}


def test_texts_are_measured_by_length_and_each_once(bench: TextBench) -> None:
    rows = bench.tests["reviews"]
    parts = rows.parts(None)
    assert torch.cat(list(parts)).tolist() == [1, 0]
    (ids, mask), labels = rows.rows(torch.tensor([1]))
    assert ids.shape == mask.shape == (1, 1)
    assert labels.tolist() == [bench.classes.index("bad")]


def test_a_study_of_texts_is_done_from_its_command(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper_study_surface, "CONFIG", LandscapeConfig(surface_points=3, slice_directions=2))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sentiment.json").write_text(json.dumps(asdict(TASK)), encoding="utf-8")
    arguments = ["--packages", str(tmp_path), "--work", str(tmp_path), "--model", str(encoder)]
    arguments += ["--result", str(tmp_path / "result.json"), "--surfaces", str(tmp_path / "fig6")]
    arguments += ["--tasks", "sentiment", "--arms", "lora", "flat", "--sweeps"]
    paper_language.main([*arguments, "--trials", "1", "--steps", "1", "--seeds", "1"])
    table = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["tables"]["sentiment"]
    drawn = json.loads((tmp_path / "fig6" / "sentiment" / "flatness.json").read_text(encoding="utf-8"))
    assert set(drawn["losses"]) == {"LoRA", "Flat-LoRA"}
    assert set(table["lora"]["mean"]) >= {"test", "shifted", "reviews", "names", "rise"}


def test_a_thing_is_in_one_split_only() -> None:
    parts = _split([str(number) for number in range(490)])
    assert [len(part) for part in parts] == [240, 100, 150]
    assert len({thing for part in parts for thing in part}) == 490


def test_a_rare_class_has_its_share_of_each_split() -> None:
    rows = {f"text {number}": "rare" if number % 10 == 0 else "usual" for number in range(980)}
    parts = _split_evenly(_even(rows, most=196))
    for part in parts:
        assert sum(label == "rare" for _, label in part) * 2 == len(part)
        assert {label for _, label in part[:20]} == {"rare", "usual"}  # the first of them are like all
    assert [len(part) for part in parts] == [96, 40, 60]


def test_docstrings_and_errors_are_told_apart() -> None:
    tree = ast.parse(
        'class A:\n    """One."""\n'
        '    def f(self):\n        """Two.\n\n        More."""\n        raise ValueError("Three")'
    )
    assert sorted(_of_tree(tree)) == [("class", "One."), ("error", "Three"), ("function", "Two.")]


def emoji_rows(count: int, suffix: str = "") -> list[dict[str, Any]]:
    """Two groups of things; one thing in ten is of a kind that is too rare."""
    return [
        {
            "hexcode": f"{number:04X}",
            "label": f"thing {number}{suffix}",
            "tags": [f"tag {number}"],
            "group": 9 if number % 100 == 99 else number % 2,
        }
        for number in range(count)
    ]


def test_shifted_names_and_tags_are_those_of_the_things_that_are_tested(tmp_path: Path) -> None:
    for language in ("en", *LANGUAGES):
        folder = tmp_path / "node_modules" / "emojibase-data" / language
        folder.mkdir(parents=True)
        rows = emoji_rows(600, "" if language == "en" else f" {language}")
        (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    task = load_task("emoji_group", tmp_path, tmp_path / "cache")
    assert set(task.classes) == {"0", "1"}, "the rare class is left out"

    def numbers(pairs: list[tuple[str, str]]) -> list[int]:
        return [int(text.split()[1]) for text, _ in pairs]

    tested = numbers(task.test)
    assert set(task.shifts) == {"tags", *LANGUAGES}
    for name, pairs in task.shifts.items():
        assert numbers(pairs) == tested
        assert [label for _, label in pairs] == [label for _, label in task.test]
        assert pairs[0][0].endswith(name) or name == "tags"
    assert not set(tested) & {*numbers(task.train), *numbers(task.validation)}
    assert all(int(label) == number % 2 for (_, label), number in zip(task.test, tested, strict=True))
    (tmp_path / "node_modules" / "emojibase-data" / "en" / "data.json").unlink()
    assert load_task("emoji_group", tmp_path, tmp_path / "cache") == task, "it was kept"


def test_tweets_are_trained_on_and_reviews_tested_by_the_ratings_of_people(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for kind in ("tweets", "amazonReviewSnippets", "movieReviewSnippets", "nytEditorial"):
            lines = [f"{number}\t{rating}\t{kind} {number}" for number, rating in enumerate([2.0, -1.0, 0.3] * 40)]
            content = "\n".join(lines).encode()
            member = tarfile.TarInfo(f"set/{kind}_GroundTruth.txt")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with zipfile.ZipFile(tmp_path / "vaderSentiment-0.5.zip", "w") as outer:
        outer.writestr("vader/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    task = load_task("sentiment", tmp_path, tmp_path / "cache")
    trained = [*task.train, *task.validation, *task.test]
    assert len(trained) == 80, "neutral ones are left out"
    assert {text.split()[0] for text, _ in trained} == {"tweets"}
    assert {name: {text.split()[0] for text, _ in pairs} for name, pairs in task.shifts.items()} == {
        "product reviews": {"amazonReviewSnippets"},
        "film reviews": {"movieReviewSnippets"},
        "editorials": {"nytEditorial"},
    }
    for text, label in [*trained, *task.shifts["editorials"]]:
        assert label == ("good" if int(text.split()[1]) % 3 == 0 else "bad")


def test_a_sentence_of_two_libraries_and_one_that_names_a_library_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / "site-packages"  # the path before it has the word test, which files of tests have behind it
    for name in ("ones", "twos"):
        (packages / name).mkdir(parents=True)
        (packages / name / "__init__.py").write_text("", encoding="utf-8")
        said = [f"This is what {name[:-1]} function {number} does" for number in range(4)]
        said += ["This is said by both of them", f"This sentence speaks of {name} itself"]
        code = "".join(f'def f{place}():\n    """{text}"""\n' for place, text in enumerate(said))
        code += f'class A:\n    """What a class of {name[:-1]} is"""\n'
        code += f"def g():\n    raise ValueError('what {name[:-1]} says is wrong')\n"
        (packages / name / "code.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setattr(paper_language_tasks, "LIBRARIES", ("ones", "twos"))
    task = load_task("library", tmp_path, tmp_path / "cache")
    sentences = [*task.train, *task.validation, *task.test]
    assert len(sentences) == 8
    assert all(f"what {label[:-1]} function" in text for text, label in sentences)
    assert sorted(task.shifts["classes"]) == [("What a class of one is", "ones"), ("What a class of two is", "twos")]
    assert sorted(task.shifts["errors"]) == [("what one says is wrong", "ones"), ("what two says is wrong", "twos")]
