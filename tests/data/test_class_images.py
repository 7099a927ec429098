"""Prior preservation: class images are generated, cached and added to the loss."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_runs import samples_of

from flatlora_diffusion.config import ConfigError, ModelConfig, RunError, TrainConfig
from flatlora_diffusion.data import class_images
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.families.objective import sample_losses
from flatlora_diffusion.families.sdxl.pipeline import Sdxl
from flatlora_diffusion.training.state import prepare
from flatlora_diffusion.training.trainer import train


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_prior_preservation_adds_the_class_images_loss(config: TrainConfig, tmp_path: Path, gamma: float) -> None:
    folder = tmp_path / "class"
    prior = config.replace(
        with_prior_preservation=True,
        class_data_dir=str(folder),
        class_prompt="an icon",
        num_class_images=3,
        prior_loss_weight=0.3,
        snr_gamma=gamma,
        max_train_steps=1,
    )
    folder.mkdir()
    Image.new("RGB", (50, 70), "red").save(folder / "mine.png")
    mine = (folder / "mine.png").read_bytes()
    train(prior)
    assert (folder / "mine.png").read_bytes() == mine
    assert len(list(folder.iterdir())) == 3
    train(prior)
    assert len(list(folder.iterdir())) == 3, "enough images were there already"
    state = prepare(prior, samples_of(config), load_samples(folder, "an icon").samples)
    batch = state.batches.batch(0, 0)
    assert len(batch.latents) == 4
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([1, 300, 600, 999])
    losses = sample_losses(state.model, state.objective, batch, noise, steps)
    from flatlora_diffusion.families.objective import diffusion_loss

    whole = diffusion_loss(state.model, state.objective, batch, noise, steps)
    torch.testing.assert_close(whole, losses[:2].mean() + 0.3 * losses[2:].mean())
    instance = state.batches.samples_at(0, 0)[0]
    assert batch.geometry["add_time_ids"][0, :2].tolist() == [instance.height, instance.width]
    sizes = {tuple(row[:2].tolist()) for row in batch.geometry["add_time_ids"][2:]}
    assert sizes <= {(70.0, 50.0), (32.0, 32.0)}, "a class image has the size conditioning of its own"


@pytest.mark.parametrize(
    ("settings", "place", "is_moved"),
    [
        ({"offload": True}, "cpu", True),
        ({}, "cuda", False),
        ({"offload": True, "quantize_base": "nf4"}, "cuda", False),
    ],
)
def test_with_offload_each_model_is_on_the_gpu_only_while_class_images_are_generated(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], place: str, is_moved: bool
) -> None:
    loaded, moved, gpu = [], [], torch.device("cuda", 1)

    def load(_: ModelConfig, device: torch.device, __: torch.dtype) -> Any:
        loaded.append(device.type)
        return SimpleNamespace(pipeline=SimpleNamespace(enable_model_cpu_offload=lambda device: moved.append(device)))

    monkeypatch.setattr(class_images, "load_base", load)
    class_images._load_on(ModelConfig(**settings), gpu, torch.float16)
    assert (loaded, moved) == ([place], [gpu] if is_moved else [])


def test_the_processes_of_a_run_share_the_class_images(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "class"
    folder.mkdir()
    Image.new("RGB", (50, 70), "red").save(folder / "mine.png")
    asked = config.replace(
        with_prior_preservation=True, class_data_dir=str(folder), class_prompt="an icon", num_class_images=6
    )
    drawn: dict[int, list[int]] = {}
    for rank in range(2):
        process = SimpleNamespace(
            process_index=rank,
            num_processes=2,
            is_main_process=rank == 0,
            device=torch.device("cpu"),
            wait_for_everyone=lambda: None,
        )
        monkeypatch.setattr(class_images, "this_process", lambda process=process: process)
        monkeypatch.setattr(class_images, "broadcast_object_list", lambda _: [1])  # what the first one has found
        monkeypatch.setattr(
            class_images, "_generate", lambda _, __, expected, ___, rank=rank: drawn.update({rank: list(expected)})
        )
        class_images.load_class_samples(asked)
    assert drawn == {0: [1, 3, 5], 1: [2, 4]}


def test_an_invalid_resolution_is_an_error_before_class_images_are_generated(
    config: TrainConfig, tmp_path: Path
) -> None:
    wrong = config.replace(
        with_prior_preservation=True, class_data_dir=str(tmp_path), class_prompt="an icon", resolution=36
    )
    with pytest.raises(ConfigError, match="resolution=36 must be a multiple of 16"):
        class_images.load_class_samples(wrong)


def test_no_black_class_image_is_saved(
    config: TrainConfig, sdxl: Sdxl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "class"
    prior = config.replace(
        with_prior_preservation=True, class_data_dir=str(folder), class_prompt="an icon", num_class_images=1
    )
    sdxl.denoiser.conv_out.register_forward_hook(lambda _module, _inputs, output: output * float("nan"))
    monkeypatch.setattr(class_images, "load_base", lambda *_: sdxl)
    with pytest.raises(RunError, match="'an icon'"):
        class_images.load_class_samples(prior)
    assert not list(folder.glob("*.png"))
