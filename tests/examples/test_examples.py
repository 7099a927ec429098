"""Each example runs to its end on a tiny model of its class and made-up data, as Flat-LoRA and as plain LoRA."""

from __future__ import annotations

import inspect
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import clip_case, llama_case, seeded, t5_case
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPImageProcessorPil, CLIPProcessor, PreTrainedTokenizerFast, Trainer, TrainingArguments

WORDS = ["good", "bad", "red", "blue", "cola", "sentence", "acceptable", "unacceptable", "a", "photo", "of"]


@pytest.fixture(autouse=True)
def global_randomness() -> Iterator[None]:
    """The examples seed the whole process, as scripts may."""
    state = random.getstate()
    with seeded(0):
        yield
    random.setstate(state)


def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])  # as CLIP's and T5's
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=9
    )
    fast.save_pretrained(folder)
    return fast


def saved(case: Any, folder: Path) -> str:
    """The bare model of a case and a tokenizer, as a folder that `from_pretrained` reads."""
    case.model.unload().save_pretrained(folder)
    tokenizer(folder)
    return str(folder)


def rows(folder: Path, split: str, lines: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.json").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


class Made(NamedTuple):
    """What an example gave to its trainer."""

    model: Any
    arguments: TrainingArguments


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Made]:
    """What the examples give to `Trainer`, in order."""
    seen: list[Made] = []
    start = Trainer.__init__

    def noted(self: Trainer, *given: Any, **named: Any) -> None:
        found = inspect.signature(start).bind(self, *given, **named).arguments
        seen.append(Made(found["model"], found["args"]))
        start(self, *given, **named)

    monkeypatch.setattr(Trainer, "__init__", noted)
    return seen


def defaults(main: Callable[..., float]) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(main).parameters.items()}


def settings_of_the_paper(made: Made, **expected: Any) -> bool:
    """Whether the trainer has these, and what all three tables share: 5e-4 with a cosine, alpha 16, LoRA in fp32."""
    config = next(module for module in made.model.modules() if hasattr(module, "lora_alpha"))
    assert set(config.lora_alpha.values()) == {16}
    trained = {name: value for name, value in made.model.named_parameters() if value.requires_grad}
    assert trained
    assert all("lora_" in name and value.dtype == torch.float32 for name, value in trained.items())
    expected |= {"learning_rate": 5e-4, "lr_scheduler_type": "cosine"}
    return {name: getattr(made.arguments, name) for name in expected} == expected


def both(main: Callable[..., float], out: Path, weights: str, **settings: Any) -> list[float]:
    """Run with and without eps; what each returns. The two LoRAs differ."""
    results = [
        main(**settings, output_dir=str(out / str(sigma)), sigma=sigma, rank=2, max_steps=2) for sigma in (0.8, 0.0)
    ]
    flat, plain = (load_file(out / str(sigma) / weights) for sigma in (0.8, 0.0))
    assert flat.keys() == plain.keys()
    assert not all(torch.equal(flat[name], plain[name]) for name in plain), "eps changed nothing"
    return results


def is_share(value: float, of: int) -> bool:
    """Whether so many answers can have this accuracy."""
    return value in [right / of for right in range(of + 1)]


def test_t5_on_glue(tmp_path: Path, made: list[Made]) -> None:
    from examples.t5_glue import main

    case = t5_case()
    case.model.config.decoder_start_token_id = 0
    case.model.generation_config.decoder_start_token_id = 0
    lines = [{"sentence": f"{word} red", "label": number % 2} for number, word in enumerate(WORDS)]
    for split in ("train", "validation"):
        rows(tmp_path / "data", split, lines)
    accuracies = both(
        main, tmp_path, "adapter_model.safetensors", data=str(tmp_path / "data"), model=saved(case, tmp_path / "t5")
    )
    assert all(is_share(value, len(lines)) for value in accuracies)
    assert settings_of_the_paper(made[0], num_train_epochs=10)
    assert (defaults(main)["sigma"], defaults(main)["rank"]) == (0.05, 8)


def test_clip_on_images(tmp_path: Path, made: list[Made]) -> None:
    from examples.clip_images import main

    model = saved(clip_case(), tmp_path / "clip")
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(pictures, tokenizer(tmp_path / "clip")).save_pretrained(model)
    for split in ("train", "test"):
        for name in ("red", "blue"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (16, 16), name).save(tmp_path / "data" / split / name / f"{number}.png")
    settings = {"data": str(tmp_path / "data"), "image": "image", "label": "label", "model": model}
    accuracies = both(main, tmp_path, "lora.safetensors", **settings)
    assert all(is_share(value, 4) for value in accuracies)
    assert settings_of_the_paper(made[0], num_train_epochs=10, weight_decay=0.1)
    assert (defaults(main)["sigma"], defaults(main)["rank"]) == (0.15, 8)
    assert not made[0].model.head.requires_grad


def test_llama_on_instructions(tmp_path: Path, made: list[Made]) -> None:
    from examples.llama_instructions import main

    rows(tmp_path / "data", "train", [{"instruction": word, "output": "good red"} for word in WORDS[:4]])
    case = llama_case()
    settings = {"data": str(tmp_path / "data"), "model": saved(case, tmp_path / "llama"), "micro_batch": 2}
    losses = both(main, tmp_path, "adapter_model.safetensors", **settings)
    # That of a model which knows nothing yet: each token of the vocabulary is as likely as another.
    assert losses == pytest.approx([math.log(case.model.config.vocab_size)] * 2, rel=0.2)
    assert settings_of_the_paper(made[0], num_train_epochs=2, warmup_steps=0.03, gradient_accumulation_steps=16)
    assert (defaults(main)["sigma"], defaults(main)["rank"]) == (0.05, 8)
    frozen = {value.dtype for value in made[0].model.parameters() if not value.requires_grad}
    assert frozen == {torch.bfloat16}
