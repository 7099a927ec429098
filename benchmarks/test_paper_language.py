"""The language benchmark on a tiny encoder and made-up texts: what is trained and measured, and what its texts are."""

from __future__ import annotations

import ast
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from benchmarks import paper_language, paper_study_surface
from benchmarks.paper_language import TextBench
from benchmarks.paper_language_tasks import Task, _even, _of_tree, _split, _split_evenly
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
