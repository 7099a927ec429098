"""The memory estimate: against what a real step saves and allocates, against arithmetic, and what it advises."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from flatlora_diffusion.adapter.lora import add_lora
from flatlora_diffusion.config import ModelConfig, TrainConfig
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.families.objective import diffusion_loss
from flatlora_diffusion.families.sdxl.pipeline import Sdxl
from flatlora_diffusion.families.sdxl.shapes import on_meta, part_settings
from flatlora_diffusion.families.sdxl.vae import posterior
from flatlora_diffusion.memory.estimate import (
    GIB,
    MemoryEstimate,
    estimate_memory,
    memory_advice,
    out_of_memory_text,
    preflight_lines,
)
from flatlora_diffusion.memory.meta_step import measure_sampling, measure_vae, weight_count
from flatlora_diffusion.method.layers import find_adapted_layers
from flatlora_diffusion.method.rivals.sketch import SKETCH_RANK
from flatlora_diffusion.storage.rng import generator
from flatlora_diffusion.training.state import TrainState, prepare

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.fixture
def config(base: Path, icons: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig.from_dict(
        {
            "pretrained_model_name_or_path": str(base),
            "instance_data_dir": str(icons),
            "output_dir": str(tmp_path / "run"),
            "report_to": "none",
            "max_train_steps": 4,
            "mixed_precision": "no",
            "seed": 3,
        }
    )


@pytest.fixture
def sdxl_config() -> TrainConfig:
    return TrainConfig.from_dict(
        {
            "pretrained_model_name_or_path": SDXL,
            "rank": 16,
            "mixed_precision": "bf16",
            "gradient_checkpointing": True,
            "train_batch_size": 1,
        }
    )


def prepared(config: TrainConfig) -> TrainState:
    return prepare(config, load_samples(Path(str(config.data.instance_data_dir))).samples)


class RealStep:
    """The forward of one batch, which is there before."""

    def __init__(self, state: TrainState) -> None:
        self.state = state
        self.batch = state.batches.batch(0, 0)
        self.draws = state.objective.draw(self.batch.latents, generator("cpu", 3, "test"))

    def loss(self) -> Tensor:
        return diffusion_loss(self.state.model, self.state.objective, self.batch, *self.draws)


def saved_by(step: RealStep) -> int:
    """Bytes of the storages that autograd holds when forward has ended, without the parameters'."""
    known = {parameter.untyped_storage().data_ptr() for parameter in step.state.model.parameters()}
    seen: list[weakref.ref[torch.UntypedStorage]] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.loss()
    alive = {storage.data_ptr(): storage.nbytes() for ref in seen if (storage := ref()) is not None}
    assert loss.requires_grad
    return sum(size for address, size in alive.items() if address not in known)


def peak_of(work: Callable[[], Any]) -> int:
    """The most bytes that PyTorch's allocator held between two ops of `work` beyond those before it.

    What an op takes and gives back before it returns is not counted: a processor's kernels choose it, as oneDNN's do
    that fill channels up to 16 where there is AVX-512.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events: list[Any] = profile.profiler.kineto_results.events()
    held = peak = op_ends = 0
    for event in sorted(events, key=lambda event: (event.start_ns(), -event.duration_ns())):
        if event.start_ns() > op_ends:
            peak = max(peak, held)
        if event.name() == "[memory]":
            held += event.nbytes()
        elif event.name().startswith("aten::"):
            op_ends = max(op_ends, event.end_ns())
    return max(peak, held)


@pytest.mark.parametrize(
    ("checkpointing", "train_text_encoder"),
    [
        (False, False),
        (True, True),
        pytest.param(False, True, marks=pytest.mark.long),
        pytest.param(True, False, marks=pytest.mark.long),
    ],
)
def test_the_activations_are_those_that_a_real_step_saves(
    config: TrainConfig, checkpointing: bool, train_text_encoder: bool
) -> None:
    config = config.replace(gradient_checkpointing=checkpointing, train_text_encoder=train_text_encoder, method="lora")
    estimate = estimate_memory(config)
    step = RealStep(prepared(config))
    # Checkpoints of the text encoders' layers keep a causal mask that autograd does not know of.
    masks = 2 * 4 * 77 * 77 if train_text_encoder and checkpointing else 0
    assert estimate.activations == pytest.approx(saved_by(step) + masks, rel=0.05)
    step.loss().backward()  # so that the gradients are there before
    peak = peak_of(lambda: step.loss().backward())
    assert estimate.activations + estimate.temporary == pytest.approx(peak, rel=0.1)


def test_the_estimate_counts_the_recomputation_of_gradient_checkpointing(config: TrainConfig) -> None:
    plain, recomputed = (estimate_memory(config.replace(gradient_checkpointing=on)) for on in (False, True))
    assert recomputed.activations < plain.activations / 2
    assert recomputed.temporary > plain.temporary


def test_weights_gradients_and_optimizer_state_are_the_real_ones(config: TrainConfig) -> None:
    config = config.replace(train_text_encoder=True, use_ema=True, lora_block_ranks="mid_block=3")
    estimate = estimate_memory(config)
    state = prepared(config)
    RealStep(state).loss().backward()
    state.optimizer.step()
    trained = state.trainable.values()
    states = [value for tensors in state.optimizer.state.values() for value in tensors.values() if value.numel() > 1]
    pipeline = state.base.pipeline
    frozen = [parameter for parameter in state.base.denoiser.parameters() if not parameter.requires_grad]
    encoders = [*pipeline.text_encoder.parameters(), *pipeline.text_encoder_2.parameters()]
    assert estimate.denoiser == _bytes(frozen)
    assert estimate.text_encoders == _bytes([parameter for parameter in encoders if not parameter.requires_grad])
    assert estimate.vae == _bytes(state.base.vae.parameters())
    assert estimate.lora == estimate.ema == _bytes(trained)
    assert estimate.gradients == _bytes([parameter.grad for parameter in trained])
    assert estimate.optimizer == _bytes(states)
    assert state.ema is not None
    assert estimate.ema == _bytes(state.ema.shadow_params)


def test_new_tokens_are_trained_through_the_text_encoders(config: TrainConfig) -> None:
    config = config.replace(train_text_encoder_ti=True, instance_prompt="an icon of TOK", token_abstraction="TOK,an")
    estimate, without = estimate_memory(config), estimate_memory(config.replace(train_text_encoder_ti=False))
    assert estimate.lora == _bytes(prepared(config).trainable.values())
    assert estimate.lora - without.lora == 2 * 2 * (16 + 24) * 4
    assert estimate.activations > 1.5 * without.activations


@pytest.mark.parametrize(
    ("optimizer", "use_8bit", "tolerance"),
    [("adafactor", False, 0.01), ("adamw", True, 0.01), ("prodigy", False, 0.15)],  # prodigy keeps no zeros
)
def test_other_optimizers_have_their_own_state(
    config: TrainConfig, optimizer: str, use_8bit: bool, tolerance: float
) -> None:
    pytest.importorskip({"prodigy": "prodigyopt", "adamw": "bitsandbytes"}.get(optimizer, "transformers"))
    config = config.replace(optimizer=optimizer, use_8bit_adam=use_8bit, learning_rate=1.0, rank=300)
    state = prepared(config)
    RealStep(state).loss().backward()
    try:
        state.optimizer.step()
    except (NotImplementedError, RuntimeError, ValueError) as error:  # bitsandbytes is for GPUs
        if not use_8bit:
            raise
        pytest.skip(f"{optimizer} does not run here: {error}")
    tensors = [
        value for values in state.optimizer.state.values() for value in values.values() if torch.is_tensor(value)
    ]
    quantile_maps = {id(value) for value in tensors if value.numel() == 256 and use_8bit}
    held = _bytes([value for value in tensors if value.numel() > 1 and id(value) not in quantile_maps])
    assert estimate_memory(config).optimizer == pytest.approx(held, rel=tolerance)


def test_flat_lora_takes_memory_for_its_norms_and_one_eps(config: TrainConfig) -> None:
    config = config.replace(perturb_draw="full")
    flat, plain = (estimate_memory(config.replace(method=method)) for method in ("flat-lora", "lora"))
    state = prepared(config)
    shapes = [layer.get_base_layer().weight.shape for layer in state.flats[0].layers.values()]
    assert flat.perturbation == 2 * state.flats[0].state_bytes + 4 * max(shape.numel() for shape in shapes)
    assert flat.total - plain.total == flat.perturbation


def test_lora_ga_takes_memory_for_the_gradient_of_all_adapted_weights(config: TrainConfig) -> None:
    shapes = [layer.get_base_layer().weight.shape for layer in prepared(config).flats[0].layers.values()]
    assert estimate_memory(config.replace(method="lora", adapter="pissa")).perturbation == 0
    estimate = estimate_memory(config.replace(method="lora", adapter="lora-ga", lora_ga_steps=1)).perturbation
    assert estimate == 4 * sum(shape.numel() for shape in shapes)


@pytest.mark.long
def test_sam_takes_memory_for_sketches_only() -> None:
    """44 MiB of fp32 factors at SDXL's attention, in place of 3.56 GiB."""
    config = TrainConfig().replace(**COMMAND)
    unet = on_meta(config.model, "unet")
    add_lora(unet, config.adapter, 0)
    shapes = [layer.shape for layer in find_adapted_layers(unet)]
    factors = sum(4 * SKETCH_RANK * (shape[0] + shape[1]) for shape in shapes)
    assert factors / 2**20 == pytest.approx(44, abs=1)
    assert factors < estimate_memory(config.of_method("sam")).perturbation < 1.1 * factors
    assert 4 * sum(rows * inputs for rows, inputs in shapes) / GIB == pytest.approx(3.56, abs=0.01)


def test_low_rank_draws_take_memory_for_norms_and_factors(config: TrainConfig) -> None:
    low, plain = (estimate_memory(config.replace(method=method)) for method in ("flat-lora", "lora"))
    state = prepared(config)
    factors = [state.flats[0].layers[name].get_base_layer().weight.flatten(1).shape for name in state.flats[0].layers]
    in_bf16_and_fp32 = 6 * 4 * sum(map(sum, factors))
    assert low.perturbation == 2 * state.flats[0].state_bytes + in_bf16_and_fp32
    assert low.total - plain.total == low.perturbation


def test_more_images_and_more_pixels_need_more(config: TrainConfig) -> None:
    for name, values in {"train_batch_size": (2, 4), "resolution": (32, 64)}.items():
        estimates = [estimate_memory(config.replace(**{name: value})) for value in values]
        for part in ("activations", "encoding"):
            counts = [getattr(estimate, part) for estimate in estimates]
            assert counts[0] < counts[1], (name, part)
    prior = {"with_prior_preservation": True, "class_data_dir": "x", "class_prompt": "an icon"}
    both = estimate_memory(config.replace(train_batch_size=2, **prior))
    assert replace(both, class_images=0) == estimate_memory(config.replace(train_batch_size=4))


def test_prior_from_base_counts_twice_the_images(config: TrainConfig) -> None:
    single, held_out, two = (
        estimate_memory(config.replace(**changes))
        for changes in ({}, {"prior_from_base": True, "class_prompt": "x"}, {"train_batch_size": 8})
    )
    assert replace(held_out, encoding=0) == replace(two, encoding=0)
    assert held_out.encoding == single.encoding, "no more images are encoded"


def test_cached_latents_are_encoded_one_by_one_and_the_vae_is_freed(config: TrainConfig) -> None:
    config = config.replace(train_batch_size=4)
    drawn = estimate_memory(config)
    cached = estimate_memory(config.replace(cache_latents=True))
    away = estimate_memory(config.replace(cache_latents=True, offload=True))
    assert cached.encoding < drawn.encoding
    assert (away.vae, away.text_encoders) == (0, 0)
    assert sum(away.parts.values()) == sum(cached.parts.values()) - cached.vae - cached.text_encoders
    assert away.encoding == cached.encoding - cached.denoiser - cached.lora, "the UNet comes after the encoding"
    assert estimate_memory(config.replace(cache_latents=True)).encoding == cached.encoding
    assert estimate_memory(config.replace(offload=True, train_text_encoder=True)).text_encoders > 0


def test_class_images_of_many_sizes_keep_the_vae_on_the_device(config: TrainConfig) -> None:
    prior = {"with_prior_preservation": True, "class_data_dir": "x", "class_prompt": "an icon"}
    config = config.replace(cache_latents=True, offload=True, train_batch_size=8, **prior)
    square, buckets = (estimate_memory(config.replace(use_aspect_ratio_buckets=on)) for on in (False, True))
    assert (square.vae, square.vae < buckets.vae) == (0, True)
    assert square.encoding < buckets.encoding
    assert buckets.vae == estimate_memory(config.replace(cache_latents=False)).vae


def test_previews_count_only_if_requested(config: TrainConfig) -> None:
    assert estimate_memory(config).previews == 0
    assert estimate_memory(config.replace(validation_prompt="an icon")).previews > drawn_weights(config)
    for looked_at in ({"holdout_images": 1}, {"validation_data_dir": "icons"}, {"image_loss_draws": 1}):
        assert estimate_memory(config.replace(**looked_at)).previews > drawn_weights(config)


def test_class_images_count_when_generated_and_smaller_batches_are_advised(
    config: TrainConfig, icons: Path, tmp_path: Path
) -> None:
    prior = {"with_prior_preservation": True, "class_prompt": "an icon", "class_data_dir": str(tmp_path / "none")}
    config = config.replace(**prior, sample_batch_size=256, num_class_images=3)
    assert estimate_memory(config.replace(with_prior_preservation=False)).class_images == 0
    assert estimate_memory(config.replace(class_data_dir=str(icons))).class_images == 0, "there are enough"
    estimate = estimate_memory(config)
    fewer = estimate_memory(config.replace(sample_batch_size=1))
    assert estimate.total == estimate.class_images > fewer.class_images > 0
    assert estimate_memory(config.replace(offload=True)).class_images < estimate.class_images, "one model at a time"
    lean = config.replace(train_batch_size=1, gradient_checkpointing=True, mixed_precision="bf16")
    estimate = estimate_memory(lean)
    advice = memory_advice(lean, estimate, estimate.total - 1)
    assert any(line.startswith("--sample_batch_size 1 saves ") for line in advice)


def test_the_peak_of_drawing_is_that_of_the_real_unet(config: TrainConfig, sdxl: Sdxl) -> None:
    images, resolution = 4, 64
    added = {"text_embeds": torch.zeros(2 * images, 24), "time_ids": torch.zeros(2 * images, 6)}
    sample, prompts = torch.zeros(2 * images, 4, 16, 16), torch.zeros(2 * images, 77, 40)
    with torch.no_grad():
        peak = peak_of(lambda: sdxl.denoiser(sample, torch.tensor(3), prompts, added_cond_kwargs=added))
    measured = measure_sampling(config.model, torch.float32, images, resolution)
    given = sum(tensor.nbytes for tensor in (sample, prompts, *added.values()))
    assert measured == pytest.approx(peak + given, rel=0.01)


def drawn_weights(config: TrainConfig) -> int:
    estimate = estimate_memory(config)
    return estimate.denoiser + estimate.text_encoders + estimate.vae


def test_the_peak_of_encoding_is_that_of_the_real_vae(config: TrainConfig) -> None:
    vae = prepared(config).base.vae
    pixels = torch.rand(3, 3, 64, 64)
    peak = peak_of(lambda: posterior(vae, pixels))
    measured = measure_vae(config.model, torch.float32, 3, 64).encode_peak
    assert measured == pytest.approx(peak + pixels.nbytes, rel=0.01)


@pytest.mark.long
def test_the_vae_needs_no_more_for_batches_and_large_images_than_for_one_of_1024_pixels() -> None:
    model = ModelConfig(pretrained_model_name_or_path=SDXL)
    single, four = (measure_vae(model, torch.float32, images, 1024) for images in (1, 4))
    assert four.encode_peak < 1.05 * single.encode_peak
    large = measure_vae(model, torch.float32, 1, 2048)
    assert large.decode_peak < 1.2 * single.decode_peak
    half = measure_vae(model, torch.float16, 1, 1024)
    assert half.decode_peak < 0.6 * single.decode_peak


@pytest.mark.long
def test_a_vae_fixed_for_fp16_counts_half(config: TrainConfig, tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(Path(config.model.pretrained_model_name_or_path) / "vae")
    plain = config.replace(mixed_precision="bf16", validation_prompt="an icon")
    estimate = estimate_memory(plain)
    for is_mended, share in ((True, 0.5), (False, 1)):
        vae.register_to_config(force_upcast=not is_mended)
        vae.save_pretrained(tmp_path / f"{is_mended}")
        other = estimate_memory(plain.replace(pretrained_vae_model_name_or_path=str(tmp_path / f"{is_mended}")))
        assert other.vae == share * estimate.vae
        assert (other.previews < estimate.previews) == is_mended


@pytest.fixture
def large(config: TrainConfig) -> TrainConfig:
    """A run that many settings would make smaller, in common to the tests of the advice: it is measured once."""
    return config.replace(train_batch_size=8, train_text_encoder=True, rank=64)


def test_each_advice_lowers_the_estimate_by_what_it_says_the_largest_first(large: TrainConfig) -> None:
    estimate = estimate_memory(large)
    advice = memory_advice(large, estimate, available_bytes=estimate.total - 1)
    switches = [line.split(" saves ")[0] for line in advice]
    assert {"--gradient_checkpointing", "--mixed_precision bf16", "no --train_text_encoder"} <= set(switches)
    assert "--train_batch_size 1 --gradient_accumulation_steps 8" in switches
    savings = [estimate.total - estimate_memory(large.replace(**_settings(switch))).total for switch in switches]
    assert min(savings) > 0
    assert savings == sorted(savings, reverse=True)
    for line, saving in zip(advice, savings, strict=True):
        assert f" saves {saving / 2**20:.1f} MiB" in line


def test_advice_says_whether_it_is_enough(large: TrainConfig) -> None:
    estimate = estimate_memory(large)
    assert memory_advice(large, estimate, estimate.total) == []
    half = estimate_memory(large.replace(mixed_precision="bf16")).total
    advice = {line.split(" saves ")[0]: line.split(", ")[-1] for line in memory_advice(large, estimate, half)}
    assert advice["--mixed_precision bf16"] == advice["--gradient_checkpointing"] == "and the run fits"
    assert list(advice.values())[-1] != "and the run fits"


def test_a_run_logs_before_it_starts_whether_it_fits(large: TrainConfig) -> None:
    (fits,) = preflight_lines(large, 100 * GIB)
    assert "100.0 GiB free" in fits
    need, *advice = preflight_lines(large, GIB // 2)
    assert "0.5 GiB free" in need
    assert any("--mixed_precision bf16 saves" in line for line in advice)


def test_an_out_of_memory_error_ends_with_the_same_list(large: TrainConfig) -> None:
    estimate = estimate_memory(large)
    text = out_of_memory_text(large)
    assert f"about {estimate.total / GIB:.1f} GiB" in text
    advice = memory_advice(large, estimate, available_bytes=0)
    assert text.endswith("\n".join(f"- {line.split(',')[0]}" for line in advice))


def test_shapes_come_from_the_base_or_from_sdxl(base: Path, tmp_path: Path) -> None:
    widths = {
        name: part_settings(model, "unet")["cross_attention_dim"]
        for name, model in {
            "folder": ModelConfig(pretrained_model_name_or_path=str(base)),
            "tiny": ModelConfig(),
            "hub": ModelConfig(pretrained_model_name_or_path=SDXL),
            "file": ModelConfig(pretrained_model_name_or_path=str(tmp_path / "base.safetensors")),
            "config": ModelConfig(
                pretrained_model_name_or_path=str(tmp_path / "base.safetensors"), single_file_config=str(base)
            ),
        }.items()
    }
    assert widths == {"folder": 40, "tiny": 224, "hub": 2048, "file": 2048, "config": 40}


def test_a_base_in_the_hub_cache_is_read(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "config.json"
    shutil.copy(base / "unet" / "config.json", cached)
    monkeypatch.setattr("flatlora_diffusion.families.paths.try_to_load_from_cache", lambda *_, **__: str(cached))
    assert part_settings(ModelConfig(pretrained_model_name_or_path=SDXL), "unet")["cross_attention_dim"] == 40


def test_an_estimate_does_not_use_the_global_generator(config: TrainConfig) -> None:
    before = torch.random.get_rng_state()
    estimate_memory(config.replace(rank=5, lora_dropout=0.2, gradient_checkpointing=True, train_text_encoder=True))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_true_sdxl_has_its_sizes_and_fits_where_it_is_known_to_fit(sdxl_config: TrainConfig) -> None:
    model = ModelConfig(pretrained_model_name_or_path=SDXL)
    counts = {part: weight_count(model, part) for part in ("unet", "text_encoder", "text_encoder_2", "vae")}
    assert counts == {
        "unet": 2_567_463_684,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "vae": 83_653_863,
    }
    estimate = estimate_memory(sdxl_config)
    assert estimate.denoiser == 2 * counts["unet"]
    assert 8 * GIB < estimate.total < 12 * GIB
    assert sum(estimate.parts.values()) < 9 * GIB


def test_the_lora_of_sdxl_has_the_parameters_of_its_layers(sdxl_config: TrainConfig) -> None:
    """(inputs + outputs) * rank for q, k, v and out, of self- and of cross-attention to 2048 wide prompts."""
    per_rank = 0
    for width, blocks in ((640, 2 * 2 + 3 * 2), (1280, 2 * 10 + 10 + 3 * 10)):
        square, cross = width + width, 2048 + width
        per_rank += blocks * (6 * square + 2 * cross)
    assert per_rank * 16 == 23_224_320
    assert estimate_memory(sdxl_config).lora == 4 * 16 * per_rank


def test_a_base_in_fp32_needs_twice_the_memory_and_leaving_it_out_is_advised(config: TrainConfig) -> None:
    config = config.replace(mixed_precision="bf16", gradient_checkpointing=True, train_batch_size=1)
    whole = config.replace(base_dtype="fp32")
    half, full = estimate_memory(config), estimate_memory(whole)
    assert (full.denoiser, full.text_encoders) == (2 * half.denoiser, 2 * half.text_encoders)
    assert full.lora == half.lora
    assert full.activations > half.activations, "the weights as they are rounded for each product"
    assert any(line.startswith("no --base_dtype saves ") for line in memory_advice(whole, full, half.total))


def test_a_quantized_base_is_smaller(sdxl_config: TrainConfig) -> None:
    whole, int8, nf4 = (estimate_memory(sdxl_config.replace(quantize_base=kind)) for kind in (None, "int8", "nf4"))
    assert whole.denoiser > int8.denoiser > nf4.denoiser > whole.denoiser / 4
    assert whole.temporary < int8.temporary == nf4.temporary
    assert isinstance(nf4, MemoryEstimate)
    assert nf4.total < whole.total


def _settings(switch: str) -> dict[str, Any]:
    """A switch as the settings that it stands for."""
    if switch.startswith("no --"):
        return {switch.removeprefix("no --"): False}
    words = [part.split() for part in switch.split("--")[1:]]
    values = {name: rest[0] if rest else True for name, *rest in words}
    return {
        name: int(value) if str(value).isdigit() and value is not True else value for name, value in values.items()
    }


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


COMMAND = {
    "pretrained_model_name_or_path": SDXL,
    "method": "lora",
    "rank": 16,
    "train_batch_size": 1,
    "max_train_steps": 500,
    "use_aspect_ratio_buckets": True,
    "cache_latents": True,
    "mixed_precision": "bf16",
    "gradient_checkpointing": True,
}


@pytest.mark.parametrize(
    ("flags", "gib"),
    [
        ({"offload": True}, 6.4),
        ({"validation_prompt": "a fox"}, 10.5),
        ({"validation_prompt": "a fox", "members": 3}, 10.5),
    ],
)
def test_the_readme_s_figures_are_those_of_the_estimate(flags: dict[str, Any], gib: float) -> None:
    config = TrainConfig().replace(**COMMAND, **flags)
    assert estimate_memory(config).total / GIB == pytest.approx(gib, abs=0.05)
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"| {gib} GiB |" in readme
