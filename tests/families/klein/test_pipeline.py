"""A loaded klein against Flux2KleinPipeline."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import Flux2KleinPipeline
from tiny_random_klein import RESOLUTION, TOKENS, WIDTH, save_tiny_random_klein

from flatlora_diffusion.config import ConfigError, ModelConfig, TrainConfig
from flatlora_diffusion.families.drawing import ImageSettings
from flatlora_diffusion.families.klein.pipeline import Klein, load_klein
from flatlora_diffusion.families.registry import base_title, family_of, load_base
from flatlora_diffusion.families.sampling import generate_images
from flatlora_diffusion.training.resolve_config import check_before_loading

CPU = torch.device("cpu")
PROMPTS = ["an icon of a cup", "x" * 80, ""]


@pytest.fixture(scope="module")
def base(klein: Path) -> Klein:
    return load_klein(ModelConfig(str(klein)), CPU, torch.float32)


@pytest.fixture(scope="module")
def stock(klein: Path) -> Flux2KleinPipeline:
    pipeline = Flux2KleinPipeline.from_pretrained(klein)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_klein_folder_is_recognized_and_loaded_frozen_in_eval_mode(klein: Path) -> None:
    config = ModelConfig(str(klein))
    assert family_of(config).name == "FLUX.2 klein"
    assert base_title(config) == f"{klein}, {RESOLUTION} pixels"
    base = load_base(config, CPU, torch.bfloat16)
    assert isinstance(base, Klein)
    assert base.denoiser.dtype == base.text_encoders["text_encoder"].dtype == torch.bfloat16
    assert base.vae.dtype == torch.float32
    for part in base.family.parts:
        model = getattr(base.pipeline, part)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (base.resolution, base.size_step, base.latent_step) == (RESOLUTION, 8, 8)
    assert base.family.sizes(config) == (RESOLUTION, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_are_encoded_as_in_the_pipeline_bit_for_bit(
    dtype: torch.dtype, klein: Path, stock: Flux2KleinPipeline
) -> None:
    base = load_klein(ModelConfig(str(klein)), CPU, dtype)
    copy = Flux2KleinPipeline.from_pretrained(klein, dtype=dtype) if dtype != torch.float32 else stock
    with torch.no_grad():
        expected, _ = copy.encode_prompt(PROMPTS, max_sequence_length=TOKENS)
    embeds = base.encode_prompts(PROMPTS)["prompt_embeds"]
    assert embeds.dtype == dtype
    assert embeds.shape == (3, TOKENS, 3 * WIDTH)
    assert torch.equal(embeds, expected)
    assert not torch.equal(embeds[0], embeds[2])


def test_embeddings_are_hidden_states_9_18_and_27_of_the_chat_template_without_thinking(base: Klein) -> None:
    tokenizer, model = base.pipeline.tokenizer, base.text_encoders["text_encoder"]
    text = "<|im_start|>user\nan icon<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    inputs = tokenizer(text, padding="max_length", max_length=TOKENS, return_tensors="pt")
    with torch.no_grad():
        states = model.model(**inputs, output_hidden_states=True).hidden_states
    expected = torch.cat([states[layer] for layer in (9, 18, 27)], dim=-1)
    torch.testing.assert_close(base.encode_prompts(["an icon"])["prompt_embeds"], expected)
    assert base.count_tokens("an icon") == int(inputs["attention_mask"].sum())
    assert base.count_tokens("x" * 80) > base.max_tokens == TOKENS


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_images_are_those_of_the_pipeline(guidance: float, base: Klein, stock: Flux2KleinPipeline) -> None:
    prompts, seeds = PROMPTS[:2], [5, 6]
    found = generate_images(base, prompts, seeds, ImageSettings(RESOLUTION, 3, guidance))
    for prompt, seed, image in zip(prompts, seeds, found, strict=True):
        expected = stock(
            prompt=prompt,
            height=RESOLUTION,
            width=RESOLUTION,
            num_inference_steps=3,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed),
            max_sequence_length=TOKENS,
        ).images[0]
        levels = torch.tensor([list(image.tobytes()), list(expected.tobytes())])
        assert int((levels[0] - levels[1]).abs().max()) <= 1
        assert levels[1].float().std() > 0


def test_a_negative_prompt_replaces_the_empty_one(base: Klein, stock: Flux2KleinPipeline) -> None:
    settings = ImageSettings(RESOLUTION, steps=2, negative_prompt="blur")
    latents = base.sample_latents(["a cup"], [1], settings)
    with torch.no_grad():
        negative, _ = stock.encode_prompt("blur", max_sequence_length=TOKENS)
    image = stock(
        prompt="a cup",
        negative_prompt_embeds=negative,
        height=RESOLUTION,
        width=RESOLUTION,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(1),
        max_sequence_length=TOKENS,
        output_type="pt",
    ).images
    torch.testing.assert_close(stock.image_processor.postprocess(base.decode(latents), output_type="pt"), image)
    assert not torch.equal(latents, base.sample_latents(["a cup"], [1], ImageSettings(RESOLUTION, steps=2)))


def test_a_distilled_klein_draws_in_four_steps_without_guidance_and_training_it_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, settings = ModelConfig(str(save_tiny_random_klein(tmp_path, is_distilled=True))), ImageSettings(RESOLUTION)
    with caplog.at_level(logging.WARNING):
        base = load_klein(config, CPU, torch.float32)
        assert (base.steps_of(settings), base.guidance_of(settings)) == (4, 1.0)
        base.sample_latents(["a cup"], [1], settings)
        assert "FLUX.2-klein-base-4B" not in caplog.text
        base.trained_model(trains_text=False)
        assert "FLUX.2-klein-base-4B" in caplog.text


@pytest.mark.parametrize(
    ("setting", "value"),
    [("clip_skip", 1), ("prediction_type", "v_prediction"), ("zero_terminal_snr", True), ("single_file_config", ".")],
)
def test_settings_of_sdxl_are_refused_by_name(setting: str, value: object, klein: Path) -> None:
    config = ModelConfig(str(klein), **{setting: value})  # type: ignore[arg-type]
    for check in (family_of(config).check_source, lambda config: load_base(config, CPU, torch.float32)):
        with pytest.raises(ConfigError, match=f"--{setting}"):
            check(config)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("snr_gamma", 5.0),
        ("debiased_estimation", True),
        ("do_edm_style_training", True),
        ("noise_offset", 0.1),
        ("multires_noise_iterations", 2),
        ("ip_noise_gamma", 0.1),
    ],
)
def test_objectives_of_noise_prediction_are_refused_by_name(setting: str, value: object, base: Klein) -> None:
    with pytest.raises(ConfigError, match=f"{setting}=.*klein.*--{setting}"):
        base.objective(TrainConfig.from_dict({setting: value}).objective)


def test_a_damaged_file_is_found_before_loading(tmp_path: Path) -> None:
    config = ModelConfig(str(save_tiny_random_klein(tmp_path)))
    family_of(config).check_source(config)
    for name in ("vae/config.json", "tokenizer/tokenizer_config.json"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-2])
        with pytest.raises(ConfigError, match=f"{name} is damaged"):
            family_of(config).check_source(config)
        (tmp_path / name).unlink()
        with pytest.raises(ConfigError, match=f"pretrained_model_name_or_path=.* has no {name}"):
            family_of(config).check_source(config)
        (tmp_path / name).write_bytes(content)
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ConfigError, match="transformer"):
        family_of(config).check_source(config)
    with pytest.raises(ConfigError, match="pretrained_model_name_or_path"):
        load_base(config, CPU, torch.float32)


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("vae/config.json", "sample_size", "large"),
        ("text_encoder/config.json", "num_hidden_layers", 12),
    ],
)
def test_a_wrong_value_in_a_config_file_is_the_users_error(
    file: str, name: str, value: object, klein: Path, tmp_path: Path
) -> None:
    shutil.copytree(klein, tmp_path / "klein")
    path = tmp_path / "klein" / file
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {name: value}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"pretrained_model_name_or_path=.*klein"):
        load_base(ModelConfig(str(tmp_path / "klein")), CPU, torch.float32)


def test_a_tokenizer_without_chat_template_is_refused(klein: Path, tmp_path: Path) -> None:
    shutil.copytree(klein, tmp_path / "klein")
    (tmp_path / "klein" / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        load_base(ModelConfig(str(tmp_path / "klein")), CPU, torch.float32)


def test_every_setting_without_a_meaning_is_refused_by_name(klein: Path) -> None:
    family, defaults = family_of(ModelConfig(str(klein))), {**TrainConfig().to_dict(), "guidance_rescale": None}
    for name, off in family.unsupported.items():
        assert defaults[name] == off
        with pytest.raises(ConfigError, match=f"--{name}"):
            family.check_sections(SimpleNamespace(**{name: "another value"}))


def test_a_run_checks_its_settings_before_the_base_is_loaded(klein: Path) -> None:
    for setting in ("train_text_encoder", "train_text_encoder_ti"):
        config = TrainConfig.from_dict({"pretrained_model_name_or_path": str(klein), setting: True})
        with pytest.raises(ConfigError, match=f"--{setting} "):
            check_before_loading(config)
    with pytest.raises(ConfigError, match="--weighting_scheme"):
        family_of(ModelConfig()).check_settings(TrainConfig.from_dict({"weighting_scheme": "mode"}))
