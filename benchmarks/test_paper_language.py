"""The language benchmark on a tiny encoder and made-up texts: what it trains, chooses, keeps and compares."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from benchmarks import paper_language
from benchmarks.paper_language_run import Bench, Settings, run
from benchmarks.paper_language_tasks import Task, _of_tree, _split

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
def bench(encoder: Path) -> Bench:
    return Bench(TASK, encoder)


def without_seconds(seen: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in seen.items() if key != "seconds"}


def test_runs_of_one_seed_differ_by_their_settings_alone(bench: Bench) -> None:
    settings = Settings(steps=3)
    plain = without_seconds(run(bench, settings, seed=1))
    assert without_seconds(run(bench, settings, seed=1)) == plain
    assert without_seconds(run(bench, settings, seed=2)) != plain
    for change in ({"sigma": 0.5}, {"sigma": 0.5, "draw": "low_rank"}, {"dropout": 0.3}, {"variant": "dora"}):
        assert without_seconds(run(bench, replace(settings, **change), seed=1))["last_loss"] != plain["last_loss"]


def test_every_test_is_measured(bench: Bench) -> None:
    seen = run(bench, Settings(steps=2), seed=0)
    assert {name for name, value in seen.items() if isinstance(value, dict)} == {
        "validation", "test", "reviews", "names", "train",
    }  # fmt: skip
    assert set(run(bench, Settings(steps=2), seed=0, only_validation=True)) == {"validation", "last_loss", "seconds"}


def test_the_trial_with_the_best_validation_is_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quality = {rate: (0.9 if rate == paper_language.RATES[2] else 0.5) for rate in paper_language.RATES}

    def made_up(bench: Any, settings: Settings, seed: int, only_validation: bool) -> dict[str, Any]:
        return {"validation": {"accuracy": quality[settings.lr], "loss": 1.0}, "seconds": 0.0}

    monkeypatch.setattr(paper_language, "run", made_up)
    options = paper_language._options(["--packages", "x", "--work", "x"])
    runs: Any = paper_language.Runs(tmp_path / "result.json")
    assert paper_language._tuned(runs, None, "sentiment", "lora", options).lr == paper_language.RATES[2]  # type: ignore[arg-type]


def test_all_arms_have_as_many_trials() -> None:
    assert {len(grid) for _, grid in paper_language.ARMS.values()} == {6}


def test_a_benchmark_goes_on_where_it_stopped_and_pairs_seeds(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sentiment.json").write_text(json.dumps(asdict(TASK)), encoding="utf-8")
    result = tmp_path / "result.json"
    arguments = [
        "--packages",
        str(tmp_path),
        "--work",
        str(tmp_path),
        "--model",
        str(encoder),
        "--result",
        str(result),
    ]
    arguments += ["--tasks", "sentiment", "--arms", "lora", "flat", "--trials", "1", "--steps", "1", "--seeds", "2"]
    arguments += ["--sweeps", "variants"]
    paper_language.main(arguments)
    first = json.loads(result.read_text(encoding="utf-8"))
    table = first["tables"]["sentiment"]
    assert set(table) == {"lora", "flat", "dora", "pissa", "flat dora", "flat pissa"}
    assert table["flat dora"]["against"] == "dora"
    assert len(table["flat"]["difference"]["test"]["differences"]) == 2
    assert table["lora"]["difference"]["shifted"]["mean"] == 0
    monkeypatch.setattr(paper_language, "run", lambda *_: pytest.fail("a run was done twice"))
    paper_language.main(arguments)
    assert json.loads(result.read_text(encoding="utf-8"))["tables"] == first["tables"]


def test_a_thing_is_in_one_split_only() -> None:
    parts = _split([str(number) for number in range(950)])
    assert [len(part) for part in parts] == [500, 150, 300]
    assert len({thing for part in parts for thing in part}) == 950


def test_docstrings_and_errors_are_told_apart() -> None:
    import ast

    tree = ast.parse(
        'class A:\n    """One."""\n'
        '    def f(self):\n        """Two.\n\n        More."""\n        raise ValueError("Three")'
    )
    assert sorted(_of_tree(tree)) == [("class", "One."), ("error", "Three"), ("function", "Two.")]
