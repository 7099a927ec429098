"""The loss of each training image along a run: what is measured, when, and that the training does not notice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import samples_of

from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.training import image_losses
from flatlora_diffusion.training.image_losses import ImageLosses, image_noise, stratified_shares
from flatlora_diffusion.training.state import prepare
from flatlora_diffusion.training.trainer import train


@pytest.fixture
def measured(config: TrainConfig) -> TrainConfig:
    return config.replace(image_loss_draws=3, checkpointing_steps=2, sigma=0.5)


def losses_of(run: RunDir) -> dict[int, dict[str, list[float]]]:
    return {event["step"]: event["losses"] for event in run.image_losses()}


def test_a_measured_run_gives_the_same_lora_and_draws_bit_for_bit(measured: TrainConfig) -> None:
    measured = measured.replace(lora_dropout=0.3, random_flip=True, caption_dropout=0.3, use_ema=True)
    results = []
    for name, draws in (("plain", 0), ("measured", 3)):
        folder = f"{measured.run.output_dir}-{name}"
        path = train(measured.replace(image_loss_draws=draws, output_dir=folder))
        results.append((load_file(path), [event["draws"] for event in RunDir(path.parent).steps()]))
    (plain, plain_draws), (other, other_draws) = results
    assert plain_draws == other_draws
    assert plain.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in plain.items())


def test_start_checkpoints_and_end_are_measured_and_the_losses_fall(measured: TrainConfig) -> None:
    run = RunDir(train(measured.replace(max_train_steps=5, learning_rate=0.03)).parent)
    losses = losses_of(run)
    assert list(losses) == [0, 2, 4, 5]
    names = [sample.id for sample in samples_of(measured)]
    assert all(list(of_step) == names for of_step in losses.values())
    before, after = (sum(sum(draws) for draws in losses[step].values()) for step in (0, 5))
    assert after < before
    assert [event["step"] for event in run.image_losses() if "without_caption" in event] == [0]


def test_a_loss_is_the_squared_error_of_the_predicted_noise(measured: TrainConfig, tmp_path: Path) -> None:
    """Computed anew with diffusers' pipeline and scheduler."""
    (tmp_path / "square").mkdir()
    picture = Image.effect_noise((32, 32), 60).convert("RGB")
    picture.save(tmp_path / "square" / "a.png")
    measured = measured.replace(instance_data_dir=str(tmp_path / "square"), instance_prompt="an icon of thing 0")
    run = RunDir(train(measured.replace(max_train_steps=1)).parent)
    (sample,) = load_samples(tmp_path / "square", "an icon of thing 0").samples
    state = prepare(measured, [sample])
    pipeline, scheduler = state.base.pipeline, DDPMScheduler.from_config(state.base.pipeline.scheduler.config)
    pixels = pipeline.image_processor.preprocess(picture)
    timesteps = (stratified_shares(3) * 1000).long()
    assert (timesteps // 334).tolist() == [0, 1, 2], "one in each third"
    with torch.no_grad():
        vae = pipeline.vae.config
        mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (vae.latents_mean, vae.latents_std))
        latents = (pipeline.vae.encode(pixels).latent_dist.mean - mean) * vae.scaling_factor / std
        noise = image_noise(sample, 3, latents.shape[1:])
        noisy = scheduler.add_noise(latents.expand(3, -1, -1, -1), noise, timesteps)
        ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 3)
        for event, prompt in (("losses", sample.caption), ("without_caption", "")):
            embeds, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
            if event == "without_caption" and pipeline.config.force_zeros_for_empty_prompt:
                embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
            added = {"text_embeds": pooled.expand(3, -1), "time_ids": ids}
            predicted = pipeline.unet(noisy, timesteps, embeds.expand(3, -1, -1), added_cond_kwargs=added).sample
            expected = F.mse_loss(predicted, noise, reduction="none").mean(dim=(1, 2, 3))
            assert run.image_losses()[0][event][sample.id] == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_resumed_run_has_the_losses_of_the_unbroken_run(measured: TrainConfig) -> None:
    measured = measured.replace(max_train_steps=4, sigma_ramp_steps=4)
    whole = losses_of(RunDir(train(measured.replace(output_dir=f"{measured.run.output_dir}-whole")).parent))
    run = RunDir(train(measured.replace(max_train_steps=3)).parent)
    assert list(losses_of(run)) == [0, 2, 3]
    train(measured.replace(resume_from_checkpoint="checkpoint-2"))
    assert losses_of(run) == whole, "that of step 3 is undone"


def test_an_unmeasured_run_can_be_measured_from_a_checkpoint_on(measured: TrainConfig) -> None:
    run = RunDir(train(measured.replace(image_loss_draws=0)).parent)
    assert run.image_losses() == []
    train(measured.replace(resume_from_checkpoint="checkpoint-2"))
    assert list(losses_of(run)) == [2, 3]


def test_class_images_are_left_out_and_many_images_limited(
    measured: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(image_losses, "MAX_IMAGES", 2)
    samples = samples_of(measured)
    state = prepare(measured, samples, [replace(sample, id=f"class-{sample.id}") for sample in samples])
    state.run.folder.mkdir()
    with caplog.at_level("INFO"):
        ImageLosses(state, 0)
    by_hash = sorted(samples, key=lambda sample: sample.sha256)[:2]
    assert losses_of(state.run)[0].keys() == {sample.id for sample in by_hash}
    assert any("image_loss_draws=3" in line and "2 of the 3 images" in line for line in caplog.messages)


def test_the_average_of_members_is_measured_instead_of_the_members(measured: TrainConfig) -> None:
    measured = measured.replace(max_train_steps=2, checkpointing_steps=1)
    run = RunDir(train(measured.replace(members=2)).parent)
    assert list(losses_of(run)) == [0, 2]
    assert run.member(1).image_losses() == []
