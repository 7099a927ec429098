"""Prompt embeddings: kept on disk for each caption, and captions that are too long are told of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import samples_of

from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.training.state import prepare


def test_prompt_embeddings_are_kept_on_disk_and_made_anew_when_the_caption_changes(
    config: TrainConfig, icons: Path, tmp_path: Path
) -> None:
    cached = config.replace(cache_text_embeddings=True, embedding_cache_dir=str(tmp_path / "cache"))
    plain = prepare(config, samples_of(config)).batches.batch(0, 0)
    for _ in range(2):
        batch = prepare(cached, samples_of(config)).batches.batch(0, 0)
        assert batch.prompt_embeds is not None
        assert plain.prompt_embeds is not None
        assert torch.equal(batch.prompt_embeds, plain.prompt_embeds)
        assert len(list((tmp_path / "cache").iterdir())) == 3
    prepare(cached.replace(clip_skip=1), samples_of(config))
    assert len(list((tmp_path / "cache").iterdir())) == 6


def test_captions_that_are_cut_are_told_of(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    samples = samples_of(config)
    with caplog.at_level("WARNING"):
        prepare(config, [replace(samples[0], caption="cat " * 75), *samples[1:]])
    assert "tokens" not in caplog.text
    long = [samples[0], *(replace(sample, caption="cat " * 76) for sample in samples[1:])]
    with caplog.at_level("WARNING"):
        prepare(config, long)
    assert "2 images have captions of more than 77 tokens (icon-1.png the first)" in caplog.text
