"""Trained text encoders: both are perturbed and learn, frozen ones change nothing, new tokens learn their share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import samples_of

from flatlora_diffusion.adapter.new_tokens import embedding_parameters
from flatlora_diffusion.config import ConfigError, TrainConfig
from flatlora_diffusion.families.objective import sample_losses
from flatlora_diffusion.families.sdxl.pipeline import Sdxl, load_sdxl
from flatlora_diffusion.lora_files.loading import embedding_files
from flatlora_diffusion.storage.run_dir import LORA_FILE
from flatlora_diffusion.training.state import prepare
from flatlora_diffusion.training.trainer import train, train_step


def test_text_encoders_are_trained_with_eps_and_their_weights_not_written(config: TrainConfig) -> None:
    state = prepare(config.replace(train_text_encoder=True), samples_of(config))
    encoders = [state.base.pipeline.text_encoder, state.base.pipeline.text_encoder_2]
    frozen = [{n: p.detach().clone() for n, p in e.named_parameters() if not p.requires_grad} for e in encoders]
    before = {name: value.detach().clone() for name, value in state.trainable.items()}
    assert len(state.flats) == 3
    for step in range(2):
        train_step(state, step)
    moved = [name for name, value in state.trainable.items() if not torch.equal(value, before[name])]
    assert len(moved) == len(before)
    for encoder, weights in zip(encoders, frozen, strict=True):
        assert all(torch.equal(dict(encoder.named_parameters())[name], value) for name, value in weights.items())
    assert {value.dtype for value in state.trainable.values()} == {torch.float32}


def test_clip_skip_must_leave_a_text_layer_to_train(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"clip_skip=1 .* at most 0"):
        prepare(config.replace(clip_skip=1, train_text_encoder=True), samples_of(config))


@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "empty prompt"])
def test_a_frozen_text_encoder_is_the_same_denoiser(config: TrainConfig, zeros: bool) -> None:
    """Token ids and cached embeddings give the same prediction, so training text changes nothing at step 0."""

    def load(*given: Any) -> Sdxl:
        sdxl = load_sdxl(*given)
        sdxl.pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
        return sdxl

    config = config.replace(method="lora", caption_dropout=0.5)
    plain, text = (
        prepare(config.replace(train_text_encoder=trained), samples_of(config), load=load) for trained in (False, True)
    )
    losses = []
    for state in (plain, text):
        batch = state.batches.batch(0, 0)
        noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(0))
        losses.append(sample_losses(state.model, state.objective, batch, noise, torch.tensor([10, 700])))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_pivotal_tuning_trains_embeddings_for_its_share_of_the_run(config: TrainConfig, precision: str) -> None:
    state = prepare(
        config.replace(
            train_text_encoder_ti=True, instance_prompt="a TOK", max_train_steps=4, mixed_precision=precision
        ),
        samples_of(config),
    )
    rows = {name: value for name, value in state.trainable.items() if name.endswith(".new.weight")}
    assert len(rows) == 2
    states = []
    for step in range(4):
        train_step(state, step)
        states.append({name: value.detach().clone() for name, value in state.trainable.items()})
    for name in rows:
        assert torch.equal(states[1][name], states[3][name]), "they still moved after half of the run"
    assert any(not torch.equal(states[1][name], states[3][name]) for name in state.trainable if name not in rows)
    assert {value.dtype for value in rows.values()} == {torch.float32}


def test_pivotal_tuning_pulls_the_spread_of_its_embeddings_after_each_step(config: TrainConfig) -> None:
    still = config.replace(train_text_encoder_ti=True, instance_prompt="a TOK", text_encoder_lr=0.0, max_train_steps=4)
    state = prepare(still, samples_of(config))
    for rows in embedding_parameters(state.base.pipeline).values():
        rows.data *= 5
    before = {part: rows.detach().clone() for part, rows in embedding_parameters(state.base.pipeline).items()}
    for step, times in ((0, 1), (1, 2), (2, 2)):  # the share of 0.5 is over after two steps
        train_step(state, step)
        for part, rows in embedding_parameters(state.base.pipeline).items():
            table = getattr(state.base.pipeline, part).get_input_embeddings().table.weight
            excess = float(before[part].std() / table.std())
            expected = before[part] * excess ** (0.9**times - 1)
            torch.testing.assert_close(rows.detach(), expected, rtol=1e-4, atol=0)


def test_pivotal_tuning_learns_the_placeholder_of_the_captions(
    config: TrainConfig, icons: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tok"
    shutil.copytree(icons, folder)
    for caption in folder.glob("*.txt"):
        caption.write_text("an icon in the style of TOK", encoding="utf-8")
    path = train(config.replace(train_text_encoder_ti=True, instance_data_dir=str(folder), checkpointing_steps=2))
    rows = load_file(path.with_name("pytorch_lora_weights_emb.safetensors"))
    for place in (path.parent, path.parent / "checkpoint-2"):
        beside = [place / "pytorch_lora_weights_emb.safetensors"]
        assert embedding_files(place / "run.safetensors") == embedding_files(place / LORA_FILE) == beside
    state = prepare(config.replace(train_text_encoder_ti=True, instance_data_dir=str(folder)), samples_of(config))
    for part, key in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        start = getattr(state.base.pipeline, part).get_input_embeddings().new.weight
        assert rows[key].shape == start.shape
        assert bool((rows[key] != start).any(dim=1).all()), "a new token was never trained"
