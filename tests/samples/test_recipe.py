"""The recipe of the tiny base: what it captions, how it drops captions, its tokenizers, its loop, what it saves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from torch import Tensor, nn
from transformers import CLIPTokenizer

from flatlora_diffusion.config import SAMPLES
from flatlora_diffusion.storage.rng import generator
from flatlora_diffusion.storage.tensor_io import load_tensors
from samples.tiny_sdxl.recipe import unet
from samples.tiny_sdxl.recipe.captions import DROPPED, STYLE_WORDS, caption, train_tokenizers
from samples.tiny_sdxl.recipe.icons import FLAT_STYLES, MORE_STYLES, Concept, drawn_by_another
from samples.tiny_sdxl.recipe.loop import Schedule, train
from samples.tiny_sdxl.recipe.unet import Base, Data, Picture, load_base, save_base, train_unet
from samples.tiny_sdxl.recipe.vae import build_vae

TINY = SAMPLES / "tiny_sdxl"
NAMES = ("tokenizer", "tokenizer_2")
FOX = Concept("1F98A", "fox", ("animal", "face", "wild"), 3, "animal-mammal", 1, 3.0, {}, None)
ANT = Concept("1F41C", "ant", (), 3, "animal-bug", 2, 1.0, {}, None)


@pytest.mark.parametrize("concept", [FOX, ANT])
def test_a_tenth_of_the_captions_is_dropped_and_a_twentieth_of_the_others_has_a_rare_word(concept: Concept) -> None:
    rng = generator("cpu", 0, "captions", concept.hexcode)
    texts = [caption(concept, rng) for _ in range(40_000)]
    kept = [text for text in texts if text != DROPPED]
    known = {"a", "an", "flat", "icon", "of", concept.name, *concept.tags}
    rare = [text for text in kept if set(text.replace(",", "").split()) - known]
    assert 1 - len(kept) / len(texts) == pytest.approx(0.10, abs=0.005)  # 3.3 standard errors
    assert len(rare) / len(kept) == pytest.approx(0.05, abs=0.004)  # 3.5 standard errors


@pytest.fixture(scope="module", params=["shipped", "trained here"])
def tokenizers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[CLIPTokenizer]:
    folder = TINY
    if request.param != "shipped":
        folder = tmp_path_factory.mktemp("tokenizers")
        train_tokenizers([FOX, ANT], folder)
    return [CLIPTokenizer.from_pretrained(folder / name) for name in NAMES]


def test_any_word_is_spelled_without_an_unknown_token(tokenizers: list[CLIPTokenizer]) -> None:
    letters = [chr(code) for code in range(0x21, 0x30000, 7) if chr(code).isalnum()]
    words = [*letters, *(f"{letter}q" for letter in letters), "TOK", "🦊"]
    for tokenizer in tokenizers:
        assert tokenizer.unk_token_id == tokenizer.eos_token_id
        for word, ids in zip(words, tokenizer(words).input_ids, strict=True):
            assert ids[0] == tokenizer.bos_token_id, word
            assert ids.index(tokenizer.eos_token_id) == len(ids) - 1, word
        assert tokenizer.decode(tokenizer("zqxwvk TOK").input_ids, skip_special_tokens=True) == "zqxwvk tok"


def test_they_pad_to_77_as_sdxls_do(tokenizers: list[CLIPTokenizer]) -> None:
    for tokenizer, padding in zip(tokenizers, ("<|endoftext|>", "!"), strict=True):
        text = tokenizer("a flat icon of a fox").input_ids
        padded = tokenizer("a flat icon of a fox", padding="max_length").input_ids
        assert padded == text + [tokenizer.convert_tokens_to_ids(padding)] * (77 - len(text))
    assert tokenizers[1].pad_token_id not in (tokenizers[1].bos_token_id, tokenizers[1].eos_token_id)


@pytest.fixture(scope="module")
def untrained() -> Base:
    """The base with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Base().eval()


@torch.no_grad()
def test_captions_condition_the_unet_as_the_pipeline_does_and_dropped_ones_as_its_unconditional_half(
    untrained: Base,
) -> None:
    tokenizer, tokenizer_2 = (CLIPTokenizer.from_pretrained(TINY / name) for name in NAMES)
    pipeline = StableDiffusionXLPipeline(
        vae=build_vae(),
        text_encoder=untrained.text_encoder,
        text_encoder_2=untrained.text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=untrained.unet,
        scheduler=EulerDiscreteScheduler(),
    )
    text, dropped, pooled, dropped_pooled = pipeline.encode_prompt("a flat icon of a fox")
    assert torch.count_nonzero(dropped) == torch.count_nonzero(dropped_pooled) == 0

    given: list[Any] = []
    hook = untrained.unet.register_forward_pre_hook(
        lambda _, args, kwargs: given.extend((args, kwargs)), with_kwargs=True
    )
    texts = ["a flat icon of a fox", DROPPED]
    ids, ids_2 = (one(texts, padding="max_length", return_tensors="pt").input_ids for one in (tokenizer, tokenizer_2))
    untrained(
        ids, ids_2, torch.tensor([1.0, 0.0]), torch.zeros(2, 4, 16, 16), torch.tensor([500, 500]), torch.zeros(2, 6)
    )
    hook.remove()
    (_, _, prompt_embeds), added = given[0], given[1]["added_cond_kwargs"]
    torch.testing.assert_close(prompt_embeds[:1], text)
    torch.testing.assert_close(added["text_embeds"][:1], pooled)
    assert torch.equal(prompt_embeds[1:], dropped)
    assert torch.equal(added["text_embeds"][1:], dropped_pooled)


class Watched(nn.Module):
    """In place of the base: remembers which captions it was given and which of them were kept."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = nn.Conv2d(4, 4, 1)
        self.rows: list[tuple[bool, float]] = []

    def forward(self, ids: Tensor, ids_2: Tensor, kept: Tensor, latents: Tensor, *_: Tensor) -> Tensor:
        is_empty = [row[1] == 1 for row in ids.tolist()]  # the end right after the start
        self.rows += zip(is_empty, kept.tolist(), strict=True)
        return self.unet(latents)


def test_exactly_the_empty_captions_are_dropped_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unet, "Base", Watched)
    data = Data(torch.zeros(2, unet.VARIANTS, 4, 16, 16), [Picture(FOX, "noto", 1.0), Picture(ANT, "fxemoji", 2.0)])
    watched: Any = train_unet(data, TINY, Schedule(steps=4, learning_rate=1e-3), tmp_path / "unet.safetensors")
    assert set(watched.rows) == {(True, 0.0), (False, 1.0)}


def test_every_set_has_a_style_word_of_its_own_and_the_judged_sets_have_captions_without_it() -> None:
    assert set(STYLE_WORDS) == {*FLAT_STYLES, *MORE_STYLES}
    assert len(set(STYLE_WORDS.values())) == len(STYLE_WORDS)
    for style, word in STYLE_WORDS.items():
        rng = generator("cpu", 0, "style words", style)
        texts = [Picture(FOX, style, 1.0).caption(rng) for _ in range(4000)]
        kept = [text for text in texts if text != DROPPED]
        styled = sum(word in text.replace(",", "").split() for text in kept) / len(kept)
        expected = unet.STYLED_RATE if style in FLAT_STYLES else 1.0
        assert styled == pytest.approx(expected, abs=0.03)  # 3.7 standard errors
        others = {*STYLE_WORDS.values()} - {word}
        assert not any(others & set(text.replace(",", "").split()) for text in kept)


def test_pictures_are_drawn_as_often_as_their_weight_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unet, "Base", Watched)
    monkeypatch.setattr(unet, "STYLED_RATE", 0.0)
    latents = torch.stack([torch.full((unet.VARIANTS, 4, 16, 16), value) for value in (0.0, 1000.0)])
    data = Data(latents, [Picture(FOX, "noto", 3.0), Picture(ANT, "noto", 1.0)])
    seen: list[float] = []

    def forward(self: Watched, *inputs: Tensor) -> Tensor:
        seen.extend(inputs[3].mean(dim=(1, 2, 3)).tolist())
        return self.unet(inputs[3])

    monkeypatch.setattr(Watched, "forward", forward)
    monkeypatch.setattr(unet.DDPMScheduler, "add_noise", lambda _self, latents, *_: latents)
    train_unet(data, TINY, Schedule(steps=8, learning_rate=0.0), tmp_path / "unet.safetensors")
    assert sum(value < 1 for value in seen) / len(seen) == pytest.approx(0.75, abs=0.05)  # 3.2 standard errors


def test_a_saved_base_is_trained_on_from_its_own_weights() -> None:
    base, saved = load_base(TINY), StableDiffusionXLPipeline.from_pretrained(TINY, dtype=torch.float32)
    for name, part in base.named_children():
        for key, value in getattr(saved, name).state_dict().items():
            assert torch.equal(part.state_dict()[key], value), f"{name}.{key}"
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in base.parameters())


def test_the_learning_rate_stays_up_on_the_plateau_and_then_falls() -> None:
    schedule = Schedule(steps=1000, learning_rate=1.0, warmup=10, plateau=0.75)
    assert [schedule.lr_at(step) for step in (10, 400, 750)] == [1.0, 1.0, 1.0]
    falling = [schedule.lr_at(step) for step in range(750, 1000)]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] == pytest.approx(0.02, abs=1e-3)


def noisy_regression(model: nn.Module, killed_at: int | None = None) -> Callable[[int], Tensor]:
    def loss_at(step: int) -> Tensor:
        if step == killed_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=generator("cpu", 0, "x", step))
        return (model(x) - x.sum(dim=1, keepdim=True)).square().mean()

    return loss_at


def linear(seed: int) -> nn.Linear:
    model = nn.Linear(3, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator("cpu", seed, "linear")))
    return model


def test_a_killed_run_goes_on_and_ends_bit_equal_to_an_unbroken_one(tmp_path: Path) -> None:
    schedule = Schedule(steps=12, learning_rate=0.1, warmup=4, save_seconds=0)
    unbroken, killed, resumed = linear(0), linear(0), linear(1)
    train(unbroken, noisy_regression(unbroken), schedule, tmp_path / "unbroken.safetensors")
    with pytest.raises(KeyboardInterrupt):
        train(killed, noisy_regression(killed, killed_at=7), schedule, tmp_path / "killed.safetensors")
    assert load_tensors(tmp_path / "killed.safetensors")[1]["step"] == 7
    train(resumed, noisy_regression(resumed), schedule, tmp_path / "killed.safetensors")
    for one, two in zip(resumed.parameters(), unbroken.parameters(), strict=True):
        assert torch.equal(one, two)


def test_it_ends_with_the_averaged_weights(tmp_path: Path) -> None:
    model, after = linear(0), []
    loss = noisy_regression(model)

    def loss_at(step: int) -> Tensor:
        after.append(model.weight.detach().clone())
        return loss(step)

    train(model, loss_at, Schedule(steps=30, learning_rate=0.1, warmup=4, ema=0.7), tmp_path / "state.safetensors")
    after.append(load_tensors(tmp_path / "state.safetensors")[0]["model.weight"])
    average = after[0]
    for step, weight in enumerate(after[1:]):
        decay = min(0.7, (step + 1) / (step + 10))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(model.weight.detach(), average)
    assert not torch.allclose(average, after[-1], atol=1e-3)


def test_the_learning_rate_warms_up_and_decays(tmp_path: Path) -> None:
    model, weights = linear(0), []

    def loss_at(_: int) -> Tensor:
        weights.append(model.weight.detach().clone())
        return model.weight.sum()  # of a constant gradient, AdamW's steps are as long as the learning rate

    schedule = Schedule(steps=60, learning_rate=0.1, warmup=10, weight_decay=0.0)
    train(model, loss_at, schedule, tmp_path / "state.safetensors")
    rates = [float((a - b).mean()) for a, b in pairwise(weights)]
    assert rates == pytest.approx([schedule.lr_at(step) for step in range(59)], rel=1e-3)
    assert rates[0] == pytest.approx(0.01, rel=0.01)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.09 < max(rates) <= 0.1
    assert rates[-1] < 0.003


def test_the_saved_base_keeps_its_vae_and_does_not_name_the_folder_it_was_built_in(tmp_path: Path) -> None:
    for name in NAMES:
        shutil.copytree(TINY / name, tmp_path / name)
    build_vae().half().save_pretrained(tmp_path / "vae")
    (weights,) = (tmp_path / "vae").glob("*.safetensors")
    before = weights.read_bytes()
    save_base(Base(), tmp_path)
    assert weights.read_bytes() == before
    assert (tmp_path / "unet" / "config.json").is_file()
    for file in tmp_path.rglob("*.json"):
        assert str(tmp_path) not in file.read_text(encoding="utf-8"), file


def test_another_set_without_code_points_is_matched_by_the_names_of_one_that_has_them(tmp_path: Path) -> None:
    packages: dict[str, dict[str, Any]] = {
        "noto": {"chars": {"1f98a": "fox", "2615": "hot-beverage", "1f41c": "ant"}},
        "another": {
            "icons": {"icons": {"fox": {"body": "<g/>"}, "hotbeverage": {"body": "<b/>"}, "own": {"body": ""}}}
        },
    }
    for name, files in packages.items():
        folder = tmp_path / "npm" / name / "package"
        folder.mkdir(parents=True)
        for stem, content in ({"package": {}} | files).items():
            (folder / f"{stem}.json").write_text(json.dumps(content), encoding="utf-8")
    svgs = drawn_by_another(tmp_path, "another", "@icons/another@1")
    assert svgs.keys() == {"1F98A", "2615"}
    assert "<g/>" in svgs["1F98A"]
