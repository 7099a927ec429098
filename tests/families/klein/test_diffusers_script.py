"""The same losses and gradients as diffusers' training script for FLUX.2 klein, which runs here as it is."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from tiny_models import normal
from tiny_random_klein import RESOLUTION, TOKENS, save_tiny_random_klein
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from flatlora_diffusion.config import ModelConfig, ObjectiveConfig
from flatlora_diffusion.families.batch import Batch
from flatlora_diffusion.families.klein.loading import LAYERS
from flatlora_diffusion.families.klein.pipeline import Klein, load_klein
from flatlora_diffusion.families.objective import diffusion_loss

SCRIPT = "train_dreambooth_lora_flux2_klein.py"
FOLDER = os.environ.get("DIFFUSERS_DREAMBOOTH")
PROMPT, CLASS_PROMPT = "an icon of sks", "an icon"
IMAGES = 3

pytestmark = pytest.mark.skipif(
    FOLDER is None or not Path(FOLDER, SCRIPT).is_file(),
    reason=f"DIFFUSERS_DREAMBOOTH does not name the folder of diffusers' {SCRIPT}",
)


@dataclass
class Recorded:
    """What the script drew and computed in each of its steps."""

    batches: list[dict[str, Any]] = field(default_factory=list)
    noise: list[Tensor] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    transformer: Any = None


@contextmanager
def restored_libraries() -> Iterator[None]:
    """Undo what the script sets for the whole process: accelerate's state, and how much the libraries log."""
    verbosity = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    try:
        yield
    finally:
        for library, level in verbosity:
            library.set_verbosity(level)
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()


def run_script(
    arguments: list[str], weighting: dict[str, Any], monkeypatch: pytest.MonkeyPatch, steps: int = 3
) -> Recorded:
    """Run diffusers' script for `steps` steps, with noise of our choice and the generator of each step's levels."""
    spec = spec_from_file_location("diffusers_klein_script", Path(str(FOLDER), SCRIPT))
    assert spec is not None
    assert spec.loader is not None
    script = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "diffusers_klein_script", script)
    spec.loader.exec_module(script)
    recorded = Recorded()
    collate, density, backward = script.collate_fn, script.compute_density_for_timestep_sampling, Accelerator.backward

    def collated(*given: Any) -> Any:
        batch = collate(*given)
        recorded.batches.append(batch)
        return batch

    def drawn_density(**named: Any) -> Tensor:
        rng = torch.Generator().manual_seed(100 + len(recorded.losses))
        values: Tensor = density(**named, generator=rng)
        return values

    def drawn_noise(like: Tensor, **named: Any) -> Tensor:
        noise = normal(200 + len(recorded.losses), *like.shape)
        recorded.noise.append(noise)
        return noise

    def recorded_backward(self: Accelerator, loss: Tensor, **named: Any) -> None:
        trained = {name: weight for name, weight in recorded.transformer.named_parameters() if weight.requires_grad}
        recorded.weights.append({name: weight.detach().clone() for name, weight in trained.items()})
        backward(self, loss, **named)
        recorded.losses.append(float(loss.detach()))
        recorded.gradients.append({name: weight.grad.clone() for name, weight in trained.items()})

    class NotedTransformer(script.Flux2Transformer2DModel):  # type: ignore[name-defined]
        def add_adapter(self, *given: Any, **named: Any) -> None:
            super().add_adapter(*given, **named)
            recorded.transformer = self

    monkeypatch.setattr(script, "collate_fn", collated)
    monkeypatch.setattr(script, "compute_density_for_timestep_sampling", drawn_density)
    monkeypatch.setattr(script, "Flux2Transformer2DModel", NotedTransformer)
    monkeypatch.setattr(Accelerator, "backward", recorded_backward)
    flags = [f"--{name}={value}" for name, value in weighting.items()]
    args = script.parse_args([*arguments, *flags, f"--max_train_steps={steps}", f"--max_sequence_length={TOKENS}"])
    args.report_to, args.text_encoder_out_layers = None, LAYERS  # the script reads 10, 20 and 30, unlike the pipeline
    script.args = args  # type: ignore[attr-defined]
    with torch.random.fork_rng(), restored_libraries(), monkeypatch.context() as patched:
        patched.setattr(torch, "randn_like", drawn_noise)
        script.main(args)
    return recorded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_random_klein(tmp_path_factory.mktemp("klein"))


def save_pictures(folder: Path, seed: int) -> Path:
    """Pictures of the training size, which no script needs to resize or crop."""
    folder.mkdir()
    for index in range(IMAGES):
        levels = (normal(seed + index, RESOLUTION, RESOLUTION, 3).sigmoid() * 255).byte()
        Image.fromarray(levels.numpy()).save(folder / f"{index}.png")
    return folder


def with_lora(base: Klein, weights: dict[str, Tensor]) -> nn.Module:
    """The base with the script's LoRA and these weights."""
    from peft import LoraConfig

    targets = sorted({name.rsplit(".lora_", 1)[0] for name in weights})
    transformer = base.denoiser
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets), "default")
    model: nn.Module = transformer.train()
    return model


@pytest.mark.parametrize(
    "weighting",
    [
        {},
        {"weighting_scheme": "logit_normal", "logit_mean": 0.3, "logit_std": 1.5},
        {"weighting_scheme": "mode", "mode_scale": 0.9},
        {"weighting_scheme": "sigma_sqrt"},
        {"weighting_scheme": "cosmap", "with_prior_preservation": True},
    ],
    ids=lambda weighting: str(weighting.get("weighting_scheme", "uniform")),
)
def test_losses_and_gradients_of_each_step_are_those_of_the_script(
    weighting: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weighting = dict(weighting)
    has_prior = weighting.pop("with_prior_preservation", False)
    arguments = [
        f"--pretrained_model_name_or_path={folder}",
        f"--instance_data_dir={save_pictures(tmp_path / 'images', 10)}",
        f"--instance_prompt={PROMPT}",
        f"--output_dir={tmp_path / 'out'}",
        f"--resolution={RESOLUTION}",
        f"--train_batch_size={IMAGES}",
        "--learning_rate=0.01",
        "--seed=0",
        "--mixed_precision=no",
        "--lr_scheduler=constant",
        "--lr_warmup_steps=0",
    ]
    if has_prior:
        arguments += [
            "--with_prior_preservation",
            f"--class_data_dir={save_pictures(tmp_path / 'class', 50)}",
            f"--class_prompt={CLASS_PROMPT}",
            "--num_class_images=3",
            "--prior_loss_weight=0.7",
        ]
    recorded = run_script(arguments, weighting, monkeypatch)
    assert len(recorded.losses) == 3

    base = load_klein(ModelConfig(str(folder)), torch.device("cpu"), torch.float32)
    objective = base.objective(ObjectiveConfig(**weighting))
    model = with_lora(base, recorded.weights[0])
    parameters = dict(model.named_parameters())
    prompts = [PROMPT] * IMAGES + [CLASS_PROMPT] * (IMAGES if has_prior else 0)
    weights = torch.tensor([2.0] * IMAGES + [2 * 0.7] * IMAGES) if has_prior else None
    for step in range(3):
        for name, value in recorded.weights[step].items():
            parameters[name].data.copy_(value)
        latents, _ = base.posterior(recorded.batches[step]["pixel_values"])
        noise = recorded.noise[step]
        # `draw` takes the noise first; the levels come from the generator that the script used for them.
        with monkeypatch.context() as patched:
            patched.setattr(torch, "randn", lambda *given, noise=noise, **named: noise)
            _, levels = objective.draw(latents, torch.Generator().manual_seed(100 + step))
        batch = Batch(latents, base.encode_prompts(prompts), {}, weights=weights)
        model.zero_grad()
        loss = diffusion_loss(model, objective, batch, noise, levels)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(recorded.losses[step], rel=2e-6)
        for name, gradient in recorded.gradients[step].items():
            found = parameters[name].grad
            assert found is not None
            assert float((found - gradient).norm()) <= 1e-5 * float(gradient.norm()), name
        if step:
            assert all(gradient.any() for gradient in recorded.gradients[step].values())
