"""Training from an existing LoRA: every layout, each layer's alpha, DoRA's magnitudes, error messages."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from tiny_runs import output_with, samples_of

from flatlora_diffusion.adapter.delta import difference, lora_updates, magnitudes, norm
from flatlora_diffusion.adapter.layers import lora_layers
from flatlora_diffusion.config import ConfigError, TrainConfig
from flatlora_diffusion.training.state import prepare
from flatlora_diffusion.training.trainer import train


def test_training_can_start_from_a_lora_in_another_layout(config: TrainConfig, base: Path, tmp_path: Path) -> None:
    path = train(config.replace(train_text_encoder=True, lora_alpha=8))
    expected = StableDiffusionXLPipeline.from_pretrained(base)
    expected.load_lora_weights(path)
    kept = tmp_path / "first.safetensors"
    shutil.copy(path, kept)
    for source in (kept, path.parent):
        again = config.replace(init_lora=str(source), train_text_encoder=True, output_dir=str(tmp_path / "next"))
        state = prepare(again, samples_of(config))
        torch.testing.assert_close(
            output_with(state.base.pipeline, state), output_with(expected, state), rtol=1e-4, atol=1e-5
        )
    with pytest.raises(ConfigError, match=r"rank=8, but init_lora has rank 4.*use --rank 4"):
        prepare(config.replace(init_lora=str(kept), train_text_encoder=True, rank=8), samples_of(config))
    with pytest.raises(ConfigError, match=r"init_lora has 4 layer.s. of the text_encoder"):
        prepare(config.replace(init_lora=str(kept)), samples_of(config))
    (tmp_path / "no.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match=r"no\.safetensors"):
        prepare(config.replace(init_lora=str(tmp_path / "no.safetensors")), samples_of(config))


def test_a_start_from_a_kohya_file_has_the_alpha_of_each_layer(config: TrainConfig, tmp_path: Path) -> None:
    """diffusers would give the commonest alpha to all."""
    plain = config.replace(method="lora", learning_rate=0.1)
    train(plain)
    whole = load_file(tmp_path / "run" / "run.safetensors")
    names = [name.removesuffix(".alpha") for name in whole if name.endswith(".alpha")]
    for index, name in enumerate(names):
        factor = 8.0 if index % 3 == 0 else 2.0
        whole[f"{name}.alpha"] *= factor
        whole[f"{name}.lora_up.weight"] = whole[f"{name}.lora_up.weight"].float() / factor
    save_file(whole, tmp_path / "mixed.safetensors")
    started = [
        lora_updates(prepare(plain.replace(init_lora=str(path)), samples_of(config)).base.pipeline)["unet"]
        for path in (tmp_path / "run" / "run.safetensors", tmp_path / "mixed.safetensors")
    ]
    assert min(norm(update) for update in started[0].values()) > 1e-3
    for name, update in started[0].items():
        assert difference(update, started[1][name]) < 1e-3 * norm(update), name


def test_a_start_from_a_dora_has_its_magnitudes(config: TrainConfig, tmp_path: Path) -> None:
    dora = config.replace(use_dora=True, learning_rate=0.1, save_dtype="fp32")
    path = train(dora)
    before = magnitudes(prepare(dora, samples_of(config)).base.pipeline)["unet"]
    saved = load_file(path)
    again = magnitudes(prepare(dora.replace(init_lora=str(path)), samples_of(config)).base.pipeline)["unet"]
    for name, value in again.items():
        assert torch.equal(value, saved[f"unet.{name}.lora_magnitude_vector"])
        assert not torch.equal(value, before[name])
    with pytest.raises(ConfigError, match=r"init_lora is a DoRA, whose magnitudes .* set --use_dora"):
        prepare(config.replace(init_lora=str(path)), samples_of(config))
    kohya = load_file(tmp_path / "run" / "run.safetensors")
    name = next(name for name in kohya if name.endswith(".lora_up.weight"))
    kohya[name.replace(".lora_up.weight", ".dora_scale")] = torch.ones(len(kohya[name]), 1)
    save_file(kohya, tmp_path / "foreign.safetensors")
    with pytest.raises(ConfigError, match=r"foreign\.safetensors.*DoRA"):
        prepare(dora.replace(init_lora=str(tmp_path / "foreign.safetensors")), samples_of(config))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_dora_initialized_from_a_plain_lora_starts_at_its_merged_weights(
    config: TrainConfig, tmp_path: Path, precision: str
) -> None:
    plain = config.replace(learning_rate=0.1, save_dtype="fp32", mixed_precision=precision)
    path = train(plain)
    trained = lora_updates(prepare(plain.replace(init_lora=str(path)), samples_of(config)).base.pipeline)["unet"]
    dora = prepare(plain.replace(init_lora=str(path), use_dora=True), samples_of(config)).base.pipeline
    for name, layer in lora_layers(dora.unet).items():
        down, up, scale = trained[name]
        merged = layer.get_base_layer().weight.float() + scale * (up @ down)
        magnitude = layer.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(magnitude, merged.norm(dim=1), rtol=1e-6, atol=0)
