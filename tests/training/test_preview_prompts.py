"""Previews and validation losses use the trained weights and do not change the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import samples_of

from flatlora_diffusion.adapter.new_tokens import replace_placeholders
from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.evaluation.probe import fixed_probe, probe_loss
from flatlora_diffusion.families.sampling import eval_on_denoiser_device
from flatlora_diffusion.families.sdxl.objective import SdxlObjective
from flatlora_diffusion.families.sdxl.pipeline import Sdxl
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.training.previews import Previews
from flatlora_diffusion.training.state import prepare
from flatlora_diffusion.training.trainer import train, train_step


def test_heldout_loss_is_logged_with_the_previews(config: TrainConfig, icons: Path) -> None:
    path = train(config.replace(validation_data_dir=str(icons)))
    events = [event for event in RunDir(path.parent).events() if event["event"] == "validation"]
    assert [event["step"] for event in events] == [0, 2, 3]
    state = prepare(config, samples_of(config))
    probe = fixed_probe(state.base, samples_of(config), 32, seed=0)
    assert events[0]["loss"] == pytest.approx(probe_loss(state.base.denoiser, state.base.objective(), probe))
    assert events[-1]["loss"] != events[0]["loss"]


@pytest.mark.parametrize(
    "settings", [{"clip_skip": 1}, {"do_edm_style_training": True, "prediction_type": "v_prediction"}]
)
def test_heldout_loss_is_that_of_what_is_trained(config: TrainConfig, icons: Path, settings: dict[str, Any]) -> None:
    path = train(config.replace(validation_data_dir=str(icons), max_train_steps=1, **settings))
    (event, *_) = [event for event in RunDir(path.parent).events() if event["event"] == "validation"]
    predicted = settings.get("prediction_type")
    plain = prepare(config.replace(prediction_type=predicted), samples_of(config)).base
    probe = fixed_probe(plain, samples_of(config), 32, seed=0)
    asked = plain.pipeline.encode_prompt(
        [sample.caption for sample in samples_of(config)],
        do_classifier_free_guidance=False,
        clip_skip=settings.get("clip_skip"),
    )
    prompts, pooled = (asked[index].repeat_interleave(probe.draws, dim=0) for index in (0, 2))
    embeds = {"prompt_embeds": prompts, "pooled_prompt_embeds": pooled}
    other = replace(probe, batch=replace(probe.batch, prompts=embeds))
    assert isinstance(plain, Sdxl)
    objective = SdxlObjective(plain.scheduler, edm="do_edm_style_training" in settings)
    assert event["loss"] == pytest.approx(probe_loss(plain.denoiser, objective, other))
    assert event["loss"] != pytest.approx(probe_loss(plain.denoiser, SdxlObjective(plain.scheduler), probe), rel=1e-4)


@pytest.mark.parametrize("trained_text", ["train_text_encoder", "train_text_encoder_ti"])
def test_heldout_loss_is_that_of_the_trained_text_encoders(config: TrainConfig, trained_text: str) -> None:
    config = config.replace(**{trained_text: True}, token_abstraction="icon", text_encoder_lr=1.0)
    state = prepare(config.replace(validation_data_dir=config.data.instance_data_dir), samples_of(config))
    samples = [
        replace(sample, caption=replace_placeholders(sample.caption, state.tokens)) for sample in samples_of(config)
    ]
    assert any("<s0><s1>" in sample.caption for sample in samples) is (trained_text == "train_text_encoder_ti")
    state.run.folder.mkdir()
    previews = Previews(state)
    for step in range(2):
        with eval_on_denoiser_device(state.base):
            probe = fixed_probe(state.base, samples, 32, seed=0)
        expected = probe_loss(state.base.denoiser, state.base.objective(), probe)
        previews.make("now", step)
        assert state.run.events()[-1]["loss"] == pytest.approx(expected, rel=1e-6)
        train_step(state, step)


def test_previews_leave_modes_and_random_numbers_as_they_were(config: TrainConfig, tmp_path: Path) -> None:
    plain = train(config.replace(train_text_encoder=True, lora_dropout=0.2, output_dir=str(tmp_path / "plain")))
    watched = train(
        config.replace(
            train_text_encoder=True,
            lora_dropout=0.2,
            validation_prompt="an icon",
            num_validation_images=1,
            validation_epochs=1,
            output_dir=str(tmp_path / "watched"),
        )
    )
    first, second = load_file(plain), load_file(watched)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    names = {path.name for path in (watched.parent / "images").iterdir()}
    assert names == {"base-0.png", "step-2-0.png", "step-3-0.png"}


def test_each_preview_prompt_is_drawn_before_the_first_step_and_after(config: TrainConfig) -> None:
    prompts = {"validation_prompt": "an icon\na fox", "num_validation_images": 2, "validation_epochs": 50}
    run = RunDir(train(config.replace(**prompts, max_train_steps=1)).parent)
    previews = [event for event in run.events() if event["event"] == "preview"]
    assert [event["step"] for event in previews] == [0, 1]
    for event in previews:
        assert event["prompts"] == ["an icon", "an icon", "a fox", "a fox"]
        assert event["seeds"] == [0, 1, 0, 1]
    assert previews[0]["images"] == [f"base-{place}.png" for place in range(4)]
    pictures = [(run.images / name).read_bytes() for event in previews for name in event["images"]]
    assert len(set(pictures)) == 8, "another prompt, seed or step makes another picture"
    card = (run.folder / "README.md").read_text(encoding="utf-8")
    assert "a fox" in card
