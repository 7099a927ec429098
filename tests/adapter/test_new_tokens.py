"""Pivotal tuning: new rows beside a frozen table, saved so that a stock pipeline reads the same embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from flatlora_diffusion.adapter.new_tokens import (
    add_tokens,
    embedding_parameters,
    replace_placeholders,
    rescale_embeddings,
    save_embeddings,
)
from flatlora_diffusion.config import ConfigError, ModelConfig, TokenConfig
from flatlora_diffusion.data.prompts import TokenizedPrompts
from flatlora_diffusion.families.sdxl.denoiser import embed_tokens
from flatlora_diffusion.families.sdxl.pipeline import wrap_pipeline


@pytest.fixture
def pipeline(base: Path) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    pipeline.text_encoder.requires_grad_(False)
    pipeline.text_encoder_2.requires_grad_(False)
    return pipeline


def embed(pipeline: StableDiffusionXLPipeline, tokens: dict[str, list[str]], text: str) -> tuple[torch.Tensor, ...]:
    prompts = TokenizedPrompts(wrap_pipeline(pipeline, ModelConfig()))
    ids = prompts.conditioning([replace_placeholders(text, tokens)], None, torch.device("cpu"))["input_ids"]
    return embed_tokens([pipeline.text_encoder, pipeline.text_encoder_2], ids)


def test_placeholders_become_tokens_of_their_own() -> None:
    tokens = {"TOK": ["<s0>", "<s1>"], "BG": ["<s2>", "<s3>"]}
    assert replace_placeholders("a TOK icon on BG", tokens) == "a <s0><s1> icon on <s2><s3>"


def test_old_words_keep_their_embeddings_and_new_ones_are_trained(pipeline: StableDiffusionXLPipeline) -> None:
    before = embed(pipeline, {}, "an icon of a fox")
    tables = [
        encoder.get_input_embeddings().weight.clone() for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)
    ]
    tokens = add_tokens(pipeline, TokenConfig(token_abstraction="TOK, BG", num_new_tokens_per_abstraction=2), seed=0)
    assert tokens == {"TOK": ["<s0>", "<s1>"], "BG": ["<s2>", "<s3>"]}
    assert all(torch.equal(a, b) for a, b in zip(before, embed(pipeline, tokens, "an icon of a fox"), strict=True))
    parameters = embedding_parameters(pipeline)
    optimizer = torch.optim.SGD(parameters.values(), lr=100.0)
    start = {name: value.detach().clone() for name, value in parameters.items()}
    torch.cat([value.flatten() for value in embed(pipeline, tokens, "a TOK icon")]).square().sum().backward()
    optimizer.step()
    for name, value in parameters.items():
        moved = (value.detach() - start[name]).abs().sum(dim=1) > 0
        assert moved.tolist() == [True, True, False, False], f"{name}: only the tokens of TOK were used"
    for table, encoder in zip(tables, (pipeline.text_encoder, pipeline.text_encoder_2), strict=True):
        assert torch.equal(table, encoder.get_input_embeddings().table.weight)


def test_a_stock_pipeline_loads_the_saved_embeddings(
    base: Path, pipeline: StableDiffusionXLPipeline, tmp_path: Path
) -> None:
    tokens = add_tokens(pipeline, TokenConfig(), seed=0)
    path = save_embeddings(pipeline, tmp_path)
    assert path is not None
    state = load_file(path)
    assert sorted(state) == ["clip_g", "clip_l"]
    stock = StableDiffusionXLPipeline.from_pretrained(base)
    stock.load_textual_inversion(state["clip_l"], ["<s0>", "<s1>"], stock.tokenizer, stock.text_encoder)
    stock.load_textual_inversion(state["clip_g"], ["<s0>", "<s1>"], stock.tokenizer_2, stock.text_encoder_2)
    prompt_embeds, _, pooled, _ = stock.encode_prompt("a <s0><s1> icon", do_classifier_free_guidance=False)
    ours = embed(pipeline, tokens, "a TOK icon")
    torch.testing.assert_close(ours[0], prompt_embeds)
    torch.testing.assert_close(ours[1], pooled)


def test_the_start_is_a_function_of_the_seed(base: Path) -> None:
    def rows(seed: int) -> torch.Tensor:
        pipeline = StableDiffusionXLPipeline.from_pretrained(base)
        add_tokens(pipeline, TokenConfig(), seed)
        return embedding_parameters(pipeline)["text_encoder"]

    assert torch.equal(rows(0), rows(0))
    assert not torch.equal(rows(0), rows(1))


def test_the_pull_brings_the_spread_of_new_rows_a_tenth_nearer_to_that_of_all_words(
    pipeline: StableDiffusionXLPipeline,
) -> None:
    add_tokens(pipeline, TokenConfig(train_text_encoder_ti=True), seed=0)
    for part, rows in embedding_parameters(pipeline).items():
        usual = getattr(pipeline, part).get_input_embeddings().table.weight.float().std()
        rows.data *= 5 * usual / rows.data.std()
        before = rows.detach().clone()
        rescale_embeddings(pipeline)
        torch.testing.assert_close(rows.detach(), before * 5**-0.1, rtol=1e-4, atol=0)


def test_tokens_that_exist_already_are_refused(pipeline: StableDiffusionXLPipeline) -> None:
    add_tokens(pipeline, TokenConfig(), seed=0)
    with pytest.raises(ConfigError, match="tokenizer has the token <s0> already"):
        add_tokens(pipeline, TokenConfig(), seed=0)
