"""Loading of a base from a folder or an original checkpoint, quantized or not; invalid bases are refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flatlora_diffusion.config import ConfigError, ModelConfig, ObjectiveConfig, TrainConfig
from flatlora_diffusion.families.paths import base_path
from flatlora_diffusion.families.sdxl.detect import Header, Variant, variant_of
from flatlora_diffusion.families.sdxl.loading import load_pipeline
from flatlora_diffusion.families.sdxl.objective import objective_of
from flatlora_diffusion.families.sdxl.pipeline import Sdxl, load_sdxl
from flatlora_diffusion.families.sdxl.single_file import save_single_file, unet_tensors
from flatlora_diffusion.families.sdxl.vae import decode_latents, posterior
from flatlora_diffusion.training.trainer import train

CPU = torch.device("cpu")

# Names that any SDXL checkpoint has, written down from the original, so that the writer cannot agree with itself only.
TRUE_NAMES = """
conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight
conditioner.embedders.0.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight
conditioner.embedders.0.transformer.text_model.final_layer_norm.bias
conditioner.embedders.1.model.ln_final.weight
conditioner.embedders.1.model.positional_embedding
conditioner.embedders.1.model.text_projection
conditioner.embedders.1.model.token_embedding.weight
conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight
conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias
conditioner.embedders.1.model.transformer.resblocks.1.attn.out_proj.weight
conditioner.embedders.1.model.transformer.resblocks.1.ln_2.weight
conditioner.embedders.1.model.transformer.resblocks.1.mlp.c_fc.weight
conditioner.embedders.1.model.transformer.resblocks.1.mlp.c_proj.bias
first_stage_model.decoder.conv_in.weight
first_stage_model.decoder.mid.attn_1.norm.weight
first_stage_model.decoder.mid.attn_1.q.weight
first_stage_model.decoder.mid.block_2.conv1.weight
first_stage_model.decoder.norm_out.weight
first_stage_model.decoder.up.0.block.0.nin_shortcut.weight
first_stage_model.decoder.up.3.upsample.conv.weight
first_stage_model.encoder.down.0.downsample.conv.weight
first_stage_model.encoder.down.1.block.0.nin_shortcut.weight
first_stage_model.encoder.mid.attn_1.proj_out.bias
first_stage_model.quant_conv.weight
model.diffusion_model.input_blocks.0.0.weight
model.diffusion_model.input_blocks.3.0.op.weight
model.diffusion_model.input_blocks.4.0.skip_connection.weight
model.diffusion_model.input_blocks.8.1.transformer_blocks.1.attn2.to_k.weight
model.diffusion_model.label_emb.0.2.weight
model.diffusion_model.middle_block.1.proj_in.weight
model.diffusion_model.middle_block.2.out_layers.3.weight
model.diffusion_model.out.2.weight
model.diffusion_model.output_blocks.2.2.conv.weight
model.diffusion_model.output_blocks.5.1.norm.weight
model.diffusion_model.output_blocks.8.0.in_layers.2.weight
model.diffusion_model.time_embed.2.bias
"""


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Move every weight off its initial value, so that swapped norms or biases show."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with SDXL's own layout of blocks and layers, at tiny widths, saved by diffusers."""
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(base)
    pipeline.unet = UNet2DConditionModel(
        sample_size=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16, 32),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 2, 4),
        cross_attention_dim=16 + 24,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=24 + 6 * 4,
        use_linear_projection=True,
    )
    pipeline.vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 8, 8, 8),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    for seed, part in enumerate((pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)):
        randomize(part, seed)
    path = tmp_path_factory.mktemp("sdxl") / "folder"
    pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    """The same pipeline as one file, with the three tensors that originals have and diffusers has no use for."""
    path = save_single_file(StableDiffusionXLPipeline.from_pretrained(folder), folder.parent / "sdxl.safetensors")
    extra = {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6),
        "denoiser.sigmas": torch.ones(1000),
    }
    save_file(load_file(path) | extra, path)
    return path


def load(path: Path | str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    return load_pipeline(ModelConfig(pretrained_model_name_or_path=str(path), **settings), CPU, dtype)


def weights(pipeline: Any) -> dict[str, Tensor]:
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    return {f"{part}.{name}": value for part in parts for name, value in getattr(pipeline, part).state_dict().items()}


def image(pipeline: Any) -> np.ndarray[Any, Any]:
    """An image of two steps, (32, 32, 3); the pipeline itself would decode in half precision."""
    rng = torch.Generator().manual_seed(0)
    latents = pipeline(
        "an icon", num_inference_steps=2, output_type="latent", generator=rng, height=32, width=32
    ).images
    with torch.no_grad():
        pixels = pipeline.vae.decode(latents.float() / pipeline.vae.config.scaling_factor).sample
    return pixels[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_single_file_gives_the_weights_and_the_image_of_the_folder(
    folder: Path, checkpoint: Path, dtype: torch.dtype
) -> None:
    one, other = load(folder, dtype), load(checkpoint, dtype, single_file_config=str(folder))
    expected, result = weights(one), weights(other)
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert result[name].dtype == value.dtype == (torch.float32 if name.startswith("vae.") else dtype), name
        assert torch.equal(result[name], value), name
    assert other.scheduler.config == one.scheduler.config
    drawn = image(one)
    assert drawn.std() > 0.1
    # Where weights lie in memory decides how sums are ordered, so the images are not equal to the last bit.
    np.testing.assert_allclose(image(other), drawn, atol=1e-5 if dtype == torch.float32 else 0.02)


def test_the_single_file_has_the_original_names(checkpoint: Path) -> None:
    names = load_file(checkpoint).keys()
    assert [name for name in TRUE_NAMES.split() if name not in names] == []


def test_a_unet_of_sdxl_size_has_1680_original_names() -> None:
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        )
    tensors = unet_tensors(unet.state_dict())
    assert len(tensors) == 1680
    assert tensors["input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight"].shape == (1280, 2048)
    assert tensors["label_emb.0.0.weight"].shape == (1280, 2816)


def test_a_weight_that_the_original_has_not_keeps_its_name() -> None:
    weight = torch.zeros(1)
    assert unet_tensors({"time_embedding.cond_proj.weight": weight}) == {"time_embedding.cond_proj.weight": weight}


def test_the_parts_are_frozen_and_in_eval_mode(folder: Path) -> None:
    pipeline = load(folder)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        assert not any(parameter.requires_grad for parameter in part.parameters())
        assert not any(module.training for module in part.modules())
    assert pipeline.watermark is None


def test_tiny_is_the_base_that_ships_with_us() -> None:
    assert (Path(base_path("tiny")) / "model_index.json").is_file()
    assert base_path("someone/a-base") == "someone/a-base"


def test_another_vae_takes_the_place_of_the_base_s_own(base: Path, folder: Path, checkpoint: Path) -> None:
    expected = load_file(base / "vae" / "diffusion_pytorch_model.safetensors")
    for path, settings in ((folder, {}), (checkpoint, {"single_file_config": str(folder)})):
        vae = load(path, torch.bfloat16, pretrained_vae_model_name_or_path=str(base / "vae"), **settings).vae
        assert vae.dtype == torch.float32
        assert all(torch.equal(value, expected[name]) for name, value in vae.state_dict().items())


def edited(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of the pipeline with another model_index.json; None removes a component."""
    shutil.copytree(folder, target)
    index = json.loads((target / "model_index.json").read_text(encoding="utf-8"))
    index = {name: value for name, value in (index | changes).items() if value is not None}
    (target / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return target


def test_a_folder_without_second_text_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    path = edited(folder, tmp_path / "one-encoder", text_encoder_2=None, tokenizer_2=None)
    with pytest.raises(ConfigError, match="is not SDXL: it has no second text encoder"):
        load(path)


def test_a_refiner_is_refused(folder: Path, tmp_path: Path) -> None:
    path = edited(folder, tmp_path / "refiner", text_encoder=[None, None], tokenizer=[None, None])
    with pytest.raises(ConfigError, match=r"pretrained_model_name_or_path=.*refiner"):
        load(path)


def test_an_inpainting_model_is_refused(folder: Path, tmp_path: Path) -> None:
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.unet = UNet2DConditionModel.from_config({**pipeline.unet.config, "in_channels": 9})
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"pretrained_model_name_or_path=.* 9 input channels"):
        load(tmp_path)


def test_clip_skip_ends_at_the_first_layer(folder: Path) -> None:
    assert load(folder, clip_skip=1) is not None
    with pytest.raises(ConfigError, match=r"clip_skip=2 .* 2 layers: .* at most 1"):
        load(folder, clip_skip=2)


def test_a_folder_with_a_damaged_weight_file_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        path = edited(folder, tmp_path / name.split("/")[0])
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ConfigError, match="pretrained_model_name_or_path="):
            load(path)


def test_a_folder_with_pickled_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    path = edited(folder, tmp_path / "pickled")
    weights_file = path / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights_file), weights_file.with_suffix(".bin"))
    weights_file.unlink()
    with pytest.raises(ConfigError, match=r"diffusion_pytorch_model\.bin"):
        load(path)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("/no/such/folder", "does not exist: there is no such folder"),
        ("/no/such/file.safetensors", "does not exist: there is no such file"),
        ("./no-such-folder", "does not exist: there is no such folder"),
        ("no-such-folder", "OWNER/NAME"),
        (
            "someone/no-such-base",
            "hf download someone/no-such-base",
        ),
        ("model.ckpt", "only .safetensors files are read"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(name: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"pretrained_model_name_or_path='{name}'.*{sentence}"):
        load(name)


def test_a_folder_without_model_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder without model_index.json"):
        load(tmp_path)


def test_a_pickle_is_refused_whatever_it_is_called(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "model.safetensors.old")
    with pytest.raises(ConfigError, match=r"only .safetensors files are read"):
        load(tmp_path / "model.safetensors.old")


@pytest.mark.parametrize("kept", [0, 5, 1_000, 0.9])
def test_a_truncated_file_is_refused(folder: Path, checkpoint: Path, tmp_path: Path, kept: float) -> None:
    content = checkpoint.read_bytes()
    size = int(kept * len(content)) if kept < 1 else int(kept)
    (tmp_path / "part.safetensors").write_bytes(content[:size])
    with pytest.raises(ConfigError, match="is damaged"):
        load(tmp_path / "part.safetensors", single_file_config=str(folder))


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (
            ["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.x", "first_stage_model.x"],
            "no UNet of SDXL, no first text encoder of SDXL, no second text encoder of SDXL",
        ),
        (["lora_unet_input_blocks_4_1_proj_in.lora_up.weight"], "no UNet of SDXL"),
    ],
    ids=["SD 1.5", "a LoRA"],
)
def test_a_file_that_is_not_sdxl_is_refused(tmp_path: Path, names: list[str], sentence: str) -> None:
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=f"pretrained_model_name_or_path=.*{sentence}"):
        load(tmp_path / "other.safetensors")


def test_a_file_without_vae_needs_another_one(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "pruned.safetensors"
    save_file({name: v for name, v in load_file(checkpoint).items() if "first_stage" not in name}, path)
    with pytest.raises(ConfigError, match="has no VAE; give one with --pretrained_vae_model_name_or_path"):
        load(path, single_file_config=str(folder))
    vae = str(folder / "vae")
    assert load(path, single_file_config=str(folder), pretrained_vae_model_name_or_path=vae).vae is not None


def test_a_file_that_lacks_a_weight_is_refused(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    name = "model.diffusion_model.input_blocks.4.1.proj_in.weight"
    save_file({key: v for key, v in load_file(checkpoint).items() if key != name}, tmp_path / "part.safetensors")
    with pytest.raises(ConfigError, match="lacks weights"):
        load(tmp_path / "part.safetensors", single_file_config=str(folder))


def test_a_folder_that_lacks_a_weight_is_refused(folder: Path, tmp_path: Path) -> None:
    path = edited(folder, tmp_path / "part")
    file = path / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if name != "conv_in.weight"}, file)
    with pytest.raises(ConfigError, match=r"lacks 1 weights, such as conv_in\.weight"):
        load(path)


def test_a_config_of_other_widths_is_refused(base: Path, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"pretrained_model_name_or_path=.*the configs in "):
        load(checkpoint, single_file_config=str(base))


def test_a_file_without_configs_asks_for_them_when_there_is_no_hub(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="to work without the hub, give --single_file_config FOLDER"):
        load(checkpoint)


def test_settings_that_do_not_go_with_the_base_are_refused(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--revision and --variant are for hub ids and folders"):
        load(checkpoint, variant="fp16", single_file_config=str(folder))
    with pytest.raises(ConfigError, match="--quantize_base works on folders and hub ids"):
        load(checkpoint, quantize_base="nf4", single_file_config=str(folder))
    with pytest.raises(ConfigError, match=r"--single_file_config is for a single .safetensors file"):
        load(folder, single_file_config=str(folder))
    with pytest.raises(ConfigError, match=r"single_file_config=.* must be a folder saved by diffusers"):
        load(checkpoint, single_file_config=str(tmp_path))


def test_the_prediction_type_holds_for_training_and_sampling(folder: Path) -> None:
    plain, changed = load(folder), load(folder, prediction_type="v_prediction")
    assert plain.scheduler.config.prediction_type == "epsilon"
    assert changed.scheduler.config.prediction_type == "v_prediction"
    assert type(changed.scheduler) is type(plain.scheduler)
    assert DDPMScheduler.from_config(changed.scheduler.config).config.prediction_type == "v_prediction"
    assert not np.array_equal(image(changed), image(plain))


def test_zero_terminal_snr_makes_the_last_timestep_pure_noise(folder: Path) -> None:
    scheduler = load(folder, prediction_type="v_prediction", zero_terminal_snr=True).scheduler
    training = DDPMScheduler.from_config(scheduler.config)
    assert training.alphas_cumprod[-1] == 0
    assert DDPMScheduler.from_config(load(folder).scheduler.config).alphas_cumprod[-1] > 0
    scheduler.set_timesteps(4)
    assert scheduler.timesteps[0] == 999


def test_zero_terminal_snr_with_an_epsilon_base_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"zero_terminal_snr needs a v-prediction base, but .* predicts epsilon"):
        load(folder, zero_terminal_snr=True)


def test_a_scheduler_without_zero_terminal_snr_is_refused(folder: Path, tmp_path: Path) -> None:
    path = edited(folder, tmp_path / "heun", scheduler=["diffusers", "HeunDiscreteScheduler"])
    with pytest.raises(ConfigError, match="HeunDiscreteScheduler, has no rescale_betas_zero_snr"):
        load(path, prediction_type="v_prediction", zero_terminal_snr=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchao_holds_the_linear_layers_of_the_unet_in_8_bits(folder: Path, dtype: torch.dtype) -> None:
    pytest.importorskip("torchao")
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    pipeline = load(folder, dtype, quantize_base="torchao-int8")
    weight, exact = pipeline.unet.get_parameter(name), weights(load(folder))[f"unet.{name}"]
    assert type(weight).__module__.startswith("torchao.")
    assert weight.dtype == dtype
    assert not weight.requires_grad
    assert 0 < (weight.dequantize().float() - exact).norm() / exact.norm() < 0.02
    assert type(pipeline.text_encoder.encoder.layers[0].mlp.fc1.weight) is torch.nn.Parameter
    assert np.isfinite(image(pipeline)).all()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bitsandbytes_without_gpu_is_refused(folder: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ConfigError, match=f"quantize_base={kind} cannot be used on cpu: .* use torchao-int8"):
        load(folder, quantize_base=kind)


@pytest.mark.parametrize(
    ("settings", "package"),
    [
        ({"quantize_base": "nf4"}, "bitsandbytes"),
        ({"quantize_base": "int8"}, "bitsandbytes"),
        ({"quantize_base": "torchao-int8"}, "torchao"),
        ({"enable_xformers_memory_efficient_attention": True}, "xformers"),
    ],
)
def test_an_absent_package_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], package: str
) -> None:
    result = importlib.util.find_spec
    monkeypatch.setattr(
        "flatlora_diffusion.families.quantization.find_spec", lambda name: None if name == package else result(name)
    )
    with pytest.raises(ConfigError, match=f"{next(iter(settings))}.* needs the package {package}"):
        load(folder, **settings)


def marked(checkpoint: Path, path: Path, *marks: str, **metadata: str) -> Path:
    """The checkpoint with empty tensors of these names, as those who train on velocity leave them in theirs."""
    save_file({**load_file(checkpoint), **{name: torch.zeros(1) for name in marks}}, path, metadata)
    return path


@pytest.mark.parametrize(
    ("marks", "metadata", "expected"),
    [
        (("v_pred",), {}, ("v_prediction", False, "SDXL: v-prediction (by the marks v_pred in its file)")),
        (
            ("v_pred", "ztsnr"),
            {"modelspec.title": "NoobAI-XL v-pred 1.0"},
            (
                "v_prediction",
                True,
                "NoobAI: v-prediction with zero terminal SNR (by the marks v_pred and ztsnr in its file)",
            ),
        ),
        (
            (),
            {"modelspec.prediction_type": "v"},
            ("v_prediction", False, "v-prediction (by the metadata of its file)"),
        ),
        ((), {"modelspec.prediction_type": "epsilon"}, ("epsilon", False, "SDXL: epsilon (by its scheduler)")),
    ],
)
def test_a_file_that_says_v_prediction_is_trained_and_drawn_so(
    folder: Path,
    checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    marks: tuple[str, ...],
    metadata: dict[str, str],
    expected: tuple[str, bool, str],
) -> None:
    path = marked(checkpoint, tmp_path / "x.safetensors", *marks, **metadata)
    settings = ModelConfig(pretrained_model_name_or_path=str(path), single_file_config=str(folder))
    with caplog.at_level("INFO"):
        sdxl = load_sdxl(settings, CPU, torch.float32)
    for scheduler in (sdxl.pipeline.scheduler, sdxl.scheduler):
        result = scheduler.config
        assert (result.prediction_type, bool(result.rescale_betas_zero_snr)) == expected[:2]
    assert (sdxl.scheduler.alphas_cumprod[-1] == 0) == expected[1]
    assert expected[2] in caplog.text


def test_a_prediction_type_that_is_given_wins_over_the_marks_with_a_word(
    folder: Path, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = marked(checkpoint, tmp_path / "x.safetensors", "v_pred", "ztsnr")
    with caplog.at_level("INFO"):
        scheduler = load(path, single_file_config=str(folder), prediction_type="epsilon").scheduler
    assert (scheduler.config.prediction_type, bool(scheduler.config.rescale_betas_zero_snr)) == ("epsilon", False)
    assert "epsilon (by --prediction_type over the marks v_pred and ztsnr in its file)" in caplog.text


def test_a_marked_base_is_named_so_in_the_files_of_its_loras(
    folder: Path, checkpoint: Path, icons: Path, tmp_path: Path
) -> None:
    settings = {
        "pretrained_model_name_or_path": str(marked(checkpoint, tmp_path / "noob.safetensors", "v_pred", "ztsnr")),
        "single_file_config": str(folder),
        "instance_data_dir": str(icons),
        "instance_prompt": "an icon",
        "output_dir": str(tmp_path / "fox"),
        "max_train_steps": 1,
        "learning_rate": 0.01,
        "train_batch_size": 1,
        "resolution": 32,
        "seed": 0,
        "report_to": "none",
    }
    run = train(TrainConfig.from_dict(settings)).parent
    with safe_open(run / "fox.safetensors", "pt") as file:
        said = file.metadata()
    assert said["modelspec.prediction_type"] == "v"
    assert (said["ss_v_parameterization"], said["ss_zero_terminal_snr"]) == ("True", "True")
    assert "'rescale_betas_zero_snr': True" in (run / "README.md").read_text(encoding="utf-8")


def test_edm_style_training_of_a_base_that_ends_in_pure_noise_is_refused(
    folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    path = marked(checkpoint, tmp_path / "x.safetensors", "v_pred", "ztsnr")
    settings = ModelConfig(pretrained_model_name_or_path=str(path), single_file_config=str(folder))
    scheduler = load_sdxl(settings, CPU, torch.float32).scheduler
    with pytest.raises(ConfigError, match=r"--do_edm_style_training does not fit this base, .*zero terminal SNR"):
        objective_of(ObjectiveConfig(do_edm_style_training=True), scheduler)


@pytest.mark.parametrize(
    ("changes", "marks", "message"),
    [
        ({}, ("edm_vpred.sigma_max",), "is CosXL, which predicts velocity at EDM's noise levels"),
        ({}, ("edm_mean", "edm_std"), "is Playground v2.5, but the scheduler in single_file_config=.* is not EDM's"),
        ({"0.transformer.": "0.model."}, (), "is SDXL's refiner, which has the second text encoder only"),
        ({"channels": "9"}, (), "9 input channels"),
    ],
)
def test_what_is_no_base_to_train_on_is_refused_by_its_name(
    folder: Path, checkpoint: Path, tmp_path: Path, changes: dict[str, str], marks: tuple[str, ...], message: str
) -> None:
    tensors = {**load_file(checkpoint), **{name: torch.ones(4) for name in marks}}
    if "channels" in changes:
        tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(8, 9, 3, 3)
    for old, new in changes.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "x.safetensors", single_file_config=str(folder))


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", Variant("SDXL")),
        ("C:\\models\\noobaiXL_vPred10.safetensors", Variant("NoobAI", name_says_v=True)),
        ("OnomaAIResearch/Illustrious-xl-early-release-v0", Variant("Illustrious")),
        ("/pony/sdxl.safetensors", Variant("SDXL")),
        ("ponyDiffusionV6XL.safetensors", Variant("Pony")),
        ("stabilityai/sdxl-turbo", Variant("SDXL", few_steps="Turbo")),
        ("ByteDance/SDXL-Lightning", Variant("SDXL", few_steps="Lightning")),
        ("latent-consistency/lcm-sdxl", Variant("SDXL", few_steps="LCM")),
        ("calcmodel.safetensors", Variant("SDXL")),
    ],
)
def test_a_variant_is_known_by_its_own_name(name: str, result: Variant) -> None:
    assert variant_of(name, Header()) == result


def test_what_a_name_alone_says_is_a_warning(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(folder, tmp_path / "noob-vpred-lightning")
    load(tmp_path / "noob-vpred-lightning")
    assert "(Lightning, by its name)" in caplog.text
    assert "its name says v-prediction; " in caplog.text
    caplog.clear()
    load(tmp_path / "noob-vpred-lightning", prediction_type="v_prediction")
    assert "its name says v-prediction" not in caplog.text


def other_vae(base: Path, path: Path, is_mended: bool) -> str:
    vae = AutoencoderKL.from_pretrained(base / "vae")
    vae.register_to_config(force_upcast=not is_mended)
    vae.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    ("is_mended", "dtype", "expected"),
    [
        (True, torch.bfloat16, torch.float16),
        (True, torch.float32, torch.float32),
        (False, torch.float16, torch.float32),
    ],
)
def test_a_given_vae_is_in_fp16_where_it_was_mended_for_it(
    folder: Path, tmp_path: Path, is_mended: bool, dtype: torch.dtype, expected: torch.dtype
) -> None:
    path = other_vae(folder, tmp_path / "vae", is_mended)
    settings = ModelConfig(pretrained_model_name_or_path=str(folder), pretrained_vae_model_name_or_path=path)
    sdxl = load_sdxl(settings, CPU, dtype)
    assert {parameter.dtype for parameter in sdxl.vae.parameters()} == {expected}
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = posterior(sdxl.vae, pixels)[0]
    drawn = decode_latents(sdxl.vae, latents)
    assert latents.dtype == drawn.dtype == torch.float32
    exact = load(folder).vae
    torch.testing.assert_close(drawn, decode_latents(exact, posterior(exact, pixels)[0]), rtol=0.02, atol=0.1)


def test_the_vae_takes_images_one_by_one_and_none_depends_on_the_others(sdxl: Sdxl) -> None:
    seen: list[int] = []
    hooks = [part.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0]))) for part in vae_parts(sdxl)]
    pixels = torch.rand(3, 3, 32, 32) * 2 - 1
    latents = posterior(sdxl.vae, pixels)[0]
    drawn = decode_latents(sdxl.vae, latents)
    for hook in hooks:
        hook.remove()
    assert seen == [1] * 6
    for index in range(3):
        alone = posterior(sdxl.vae, pixels[index : index + 1])[0]
        assert torch.equal(alone, latents[index : index + 1])
        assert torch.equal(decode_latents(sdxl.vae, alone), drawn[index : index + 1])


@pytest.mark.parametrize(("side", "largest"), [(1024, 1024), (1088, 1024)])
def test_images_above_1024_pixels_are_decoded_in_tiles_and_encoded_whole(sdxl: Sdxl, side: int, largest: int) -> None:
    encoder, decoder = vae_parts(sdxl)
    seen: list[int] = []
    encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1] * 4))
    sdxl.vae.to("meta")  # sizes are all that is asked for
    drawn = decode_latents(sdxl.vae, posterior(sdxl.vae, torch.empty(1, 3, side, side, device="meta"))[0])
    assert seen[0] == side
    assert max(seen[1:]) == largest
    assert drawn.shape == (1, 3, side, side)


def vae_parts(sdxl: Sdxl) -> tuple[torch.nn.Module, torch.nn.Module]:
    return sdxl.vae.encoder, sdxl.vae.decoder
