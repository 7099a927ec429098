"""A second family is found by its pipeline's class, and trained and measured through the interface alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from toy_family import PIPELINE, TARGETS, Toy, ToyFamily, save_toy, transformer

from flatlora_diffusion.adapter import lora as adapter
from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.config import SDXL, TINY, ConfigError, MergeConfig, ModelConfig, TrainConfig
from flatlora_diffusion.data.sources import load_training_set
from flatlora_diffusion.evaluation.probe import draw_losses, fixed_probe, with_prompts
from flatlora_diffusion.families.batch import joined, masked
from flatlora_diffusion.families.registry import FAMILIES, family_of, load_base
from flatlora_diffusion.families.sdxl.family import SdxlFamily
from flatlora_diffusion.lora_files.names import base_names
from flatlora_diffusion.lora_tools.merging import merge_loras
from flatlora_diffusion.storage.hashing import base_fingerprint
from flatlora_diffusion.training.resolve_config import check_before_loading
from flatlora_diffusion.training.state import prepare
from flatlora_diffusion.training.trainer import train_step

CPU = torch.device("cpu")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the toy family, which this test registers."""
    monkeypatch.setitem(FAMILIES, PIPELINE, "toy_family:ToyFamily")
    sets = adapter.TargetSets("transformer", TARGETS, (), ("transformer_blocks.", "single_transformer_blocks."))
    monkeypatch.setitem(adapter.TARGET_SETS, "Flux2Transformer2DModel", sets)
    return save_toy(tmp_path / "toy")


def test_a_base_has_the_family_of_its_pipeline_s_class(toy: Path, base: Path, tmp_path: Path) -> None:
    assert family_of(ModelConfig(str(toy))).name == "the toy family"
    assert isinstance(load_base(ModelConfig(str(toy)), CPU, torch.float32), Toy)
    file, broken = tmp_path / "a.safetensors", tmp_path / "broken"
    file.touch()
    broken.mkdir()
    for text in ("{", "[]", "{}", '{"_class_name": "Another"}'):
        (broken / "model_index.json").write_text(text)
        assert isinstance(family_of(ModelConfig(str(broken))), SdxlFamily)
        with pytest.raises(
            ConfigError, match=r"model_index.json is damaged|pretrained_model_name_or_path=.*neither .* nor "
        ):
            load_base(ModelConfig(str(broken)), CPU, torch.float32)
    for name in (str(base), TINY, SDXL, str(file), "someone/unknown"):
        assert isinstance(family_of(ModelConfig(name)), SdxlFamily)


def test_a_probe_of_another_family_has_the_losses_of_its_formula(toy: Path, config: TrainConfig) -> None:
    loaded = load_base(ModelConfig(str(toy)), CPU, torch.float32)
    samples = load_training_set(config.data).samples
    probe = fixed_probe(loaded, samples, 32, seed=0, draws=2)
    losses = draw_losses(loaded.denoiser, loaded.objective(), probe, batch_size=4)
    row = 3  # the second draw of the second image
    x, n, t = probe.batch.latents[row], probe.noise[row], probe.timesteps[row]
    assert 0.5 <= float(t) < 1
    grid = [[0, y, x, 0] for y in range(4) for x in range(4)]
    with torch.no_grad():
        output = loaded.denoiser(
            hidden_states=((1 - t) * x + t * n).flatten(1).T[None],
            timestep=t[None],
            encoder_hidden_states=loaded.pipeline.text_encoder([samples[1].caption]),
            txt_ids=torch.tensor([[[0, 0, 0, token] for token in range(5)]]),
            img_ids=torch.tensor([grid]),
        ).sample
    expected = F.mse_loss(output[0].T.reshape(x.shape), n - x)
    assert float(losses[1, 1]) == pytest.approx(float(expected), rel=1e-5)
    other = draw_losses(loaded.denoiser, loaded.objective(), with_prompts(probe, loaded, ["zzzzz"] * 3))
    assert not torch.equal(other, losses)


@pytest.mark.parametrize("method", ["lora", "flat-lora", "sam"])
def test_another_family_is_trained_and_its_base_stays_as_it_was(toy: Path, config: TrainConfig, method: str) -> None:
    config = config.replace(
        pretrained_model_name_or_path=str(toy), method=method, caption_dropout=0.5, cache_latents=True
    )
    state = prepare(config, load_training_set(config.data).samples)
    assert {name.split(".")[0] for name in state.trainable} == {"transformer"}
    before, start = base_fingerprint(state.base.denoiser), [value.clone() for value in state.trainable.values()]
    losses = [train_step(state, step) for step in range(3)]
    assert all(0 < loss < 10 for loss in losses)
    assert not all(torch.equal(a, b) for a, b in zip(start, state.trainable.values(), strict=True))
    state.close()
    assert base_fingerprint(state.base.denoiser) == before


def test_settings_that_a_family_lacks_are_refused_by_name(toy: Path, config: TrainConfig) -> None:
    wrong = config.replace(pretrained_model_name_or_path=str(toy), train_text_encoder=True)
    with pytest.raises(ConfigError, match=r"--train_text_encoder.*the toy family"):
        check_before_loading(wrong)


def test_a_family_without_single_files_says_so(toy: Path, lora: Path, tmp_path: Path) -> None:
    config = MergeConfig(base=str(toy), lora=(str(lora),), output=str(tmp_path / "x.safetensors"), single_file=True)
    with pytest.raises(ConfigError, match=r"--single_file.*the toy family"):
        merge_loras(config)


def test_conditions_are_joined_and_zeroed_by_image() -> None:
    parts = [{"a": torch.full((1, 2, 3), float(i)), "b": torch.full((1,), i)} for i in (1, 2)]
    whole = joined(parts)
    assert (whole["a"].shape, whole["b"].tolist()) == ((2, 2, 3), [1, 2])
    zeroed = masked(whole, torch.tensor([True, False]))
    assert zeroed["a"].sum(dim=(1, 2)).tolist() == [6, 0]
    assert zeroed["b"].tolist() == [1, 0]


def test_a_base_that_is_not_on_disk_has_the_family_of_its_hub_id(toy: Path) -> None:
    assert family_of(ModelConfig("Someone/Toy-v2")).name == "the toy family"
    assert isinstance(family_of(ModelConfig("someone/another")), SdxlFamily)
    assert base_names("Someone/Toy-v2").base == "the toy family (Someone/Toy-v2 is not on this disk)"
    assert base_names(ToyFamily.usual_base).base == "the toy family"


def test_a_lora_of_another_family_is_recognized_without_a_base(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {}
    for name, layer in transformer().named_modules():
        if name.endswith(TARGETS):
            tensors[f"transformer.{name}.lora_A.weight"] = torch.ones(1, layer.in_features)
            tensors[f"transformer.{name}.lora_B.weight"] = torch.ones(layer.out_features, 1)
    save_file(tensors, tmp_path / "lora.safetensors")
    assert main(["inspect", str(tmp_path / "lora.safetensors")]) == 0
    text = capsys.readouterr().out
    assert text.startswith("lora.safetensors: a LoRA for toy\n")
    assert "transformer.transformer_blocks.0 " in text
    assert "ComfyUI" not in text, "the tools that read its LoRAs are not known"
