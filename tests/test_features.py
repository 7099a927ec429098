"""What the trainer can train, each part against what it must be: adapters, text encoders, prior images, optimizers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from flatlora_diffusion.adapter.lora import lora_layers
from flatlora_diffusion.adapter.new_tokens import embedding_parameters, with_new_tokens
from flatlora_diffusion.adapter.update import difference, lora_updates, magnitudes, norm
from flatlora_diffusion.config import ConfigError, RunError, TrainConfig
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.data.training_set import load_heldout, load_training_set
from flatlora_diffusion.evaluation.probe import fixed_probe, probe_loss
from flatlora_diffusion.ground.run_dir import RunDir
from flatlora_diffusion.lora_files.attached import embeddings_beside
from flatlora_diffusion.lora_files.diffusers_file import LORA_FILE
from flatlora_diffusion.sdxl.objective import Objective, sample_losses
from flatlora_diffusion.sdxl.pipeline import Sdxl
from flatlora_diffusion.training import trainer
from flatlora_diffusion.training.checkpoint import load_state, save_state
from flatlora_diffusion.training.previews import Previews, ready
from flatlora_diffusion.training.state import TrainState, check_distribution, prepare
from flatlora_diffusion.training.trainer import train, train_step


@pytest.fixture
def config(base: Path, icons: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig.from_dict(
        {
            "pretrained_model_name_or_path": str(base),
            "instance_data_dir": str(icons),
            "output_dir": str(tmp_path / "run"),
            "max_train_steps": 3,
            "train_batch_size": 2,
            "learning_rate": 1e-2,
            "text_encoder_lr": 1e-2,
            "sigma_schedule": "constant",
            "report_to": "none",
            "seed": 3,
        }
    )


def samples_of(config: TrainConfig) -> list[Any]:
    return load_samples(Path(str(config.data.instance_data_dir))).samples


def trained(config: TrainConfig, steps: int = 3) -> TrainState:
    state = prepare(config, samples_of(config))
    for step in range(steps):
        train_step(state, step)
    return state


def output_with(pipeline: Any, state: TrainState, prompt: str = "an icon of thing 0") -> Tensor:
    """The UNet's answer for a prompt, on fixed noise: what a LoRA file must reproduce."""
    prompt_embeds, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    time_ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
    added = {"text_embeds": pooled, "time_ids": time_ids}
    with torch.no_grad():
        return pipeline.unet(latents, torch.tensor([500]), prompt_embeds, added_cond_kwargs=added).sample


# Adapters


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lora_target_modules": "attn"}, {"to_q", "to_k", "to_v", "to_out.0"}),
        (
            {"lora_target_modules": "attn+ff"},
            {"to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"},
        ),
        ({"lora_target_modules": "to_q,ff.net.2"}, {"to_q", "ff.net.2"}),
    ],
)
def test_target_presets(config: TrainConfig, settings: dict[str, Any], expected: set[str]) -> None:
    state = prepare(config.replace(**settings), samples_of(config))
    ends = {next(end for end in expected if name.endswith(end)) for name in lora_layers(state.sdxl.unet)}
    assert ends == expected


def test_linear_and_convolution_presets_leave_out_what_other_tools_drop(config: TrainConfig) -> None:
    linear = lora_layers(prepare(config.replace(lora_target_modules="all-linear"), samples_of(config)).sdxl.unet)
    everything = lora_layers(prepare(config.replace(lora_target_modules="conv"), samples_of(config)).sdxl.unet)
    assert set(linear) < set(everything)
    assert any(name.endswith("time_emb_proj") for name in linear)
    assert any(name.endswith("conv1") for name in set(everything) - set(linear))
    assert not [name for name in everything if not name.startswith(("down_blocks", "mid_block", "up_blocks"))]


def test_blocks_and_their_ranks(config: TrainConfig) -> None:
    chosen = config.replace(lora_unet_blocks="unet.up_blocks.0.attentions.0,mid_block", lora_block_ranks="mid_block=7")
    layers = lora_layers(trained(chosen).sdxl.unet)
    assert {name.split(".attentions")[0] for name in layers} == {"up_blocks.0", "mid_block"}
    assert not any("attentions.1." in name for name in layers)
    assert {layer.r["default"] for name, layer in layers.items() if name.startswith("mid")} == {7}
    assert {layer.r["default"] for name, layer in layers.items() if name.startswith("up")} == {4}
    blora = lora_layers(prepare(config.replace(use_blora=True), samples_of(config)).sdxl.unet)
    assert {".".join(name.split(".")[:4]) for name in blora} == {
        "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_target_modules": "to_x"}, "lora_target_modules='to_x' names no layer"),
        ({"lora_unet_blocks": "up_blocks.9"}, "lora_unet_blocks: 'up_blocks.9' holds no layer"),
        ({"lora_block_ranks": "mid_block"}, "lora_block_ranks: 'mid_block' must be BLOCK=RANK"),
        ({"lora_block_ranks": "head=3"}, "lora_block_ranks: 'head' holds no layer"),
    ],
)
def test_targets_that_do_not_exist(config: TrainConfig, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(config.replace(**settings), samples_of(config))


ADAPTERS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 9},
    "rank stabilized": {"use_rslora": True, "lora_alpha": 8},
    "dora": {"use_dora": True, "lora_alpha": 8},
    "mixed ranks": {"lora_block_ranks": "mid_block=7,up_blocks.0=2"},
    "mixed ranks with alpha": {"lora_block_ranks": "mid_block=7", "lora_alpha": 8},
    "convolutions": {"lora_target_modules": "conv", "lora_block_ranks": "mid_block=2"},
    "text encoders": {"train_text_encoder": True, "lora_alpha": 9},
    "text encoders, rank stabilized": {"train_text_encoder": True, "use_rslora": True},
    "dora and text encoders": {"use_dora": True, "train_text_encoder": True},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_stock_pipeline_computes_what_was_trained(
    config: TrainConfig, base: Path, name: str, tmp_path: Path
) -> None:
    from flatlora_diffusion.lora_files.diffusers_file import save_lora

    state = trained(config.replace(**ADAPTERS[name], learning_rate=0.1, text_encoder_lr=0.1))
    path = save_lora(state.sdxl.pipeline, tmp_path / "out")
    stock = StableDiffusionXLPipeline.from_pretrained(base)
    plain = output_with(stock, state)
    stock.load_lora_weights(path)
    expected = output_with(state.sdxl.pipeline, state)
    effect = float((expected - plain).abs().max())
    assert effect > 1e-3
    assert float((output_with(stock, state) - expected).abs().max()) < 1e-3 * effect


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
            output_with(state.sdxl.pipeline, state), output_with(expected, state), rtol=1e-4, atol=1e-5
        )
    with pytest.raises(ConfigError, match=r"rank=8, but init_lora has rank 4.*use --rank 4"):
        prepare(config.replace(init_lora=str(kept), train_text_encoder=True, rank=8), samples_of(config))
    with pytest.raises(ConfigError, match=r"adapts 4 layer.s. of the text_encoder that this run does not train"):
        prepare(config.replace(init_lora=str(kept)), samples_of(config))
    (tmp_path / "no.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match=r"no\.safetensors is no sound \.safetensors file"):
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
        lora_updates(prepare(plain.replace(init_lora=str(path)), samples_of(config)).sdxl.pipeline)["unet"]
        for path in (tmp_path / "run" / "run.safetensors", tmp_path / "mixed.safetensors")
    ]
    assert min(norm(update) for update in started[0].values()) > 1e-3
    for name, update in started[0].items():
        assert difference(update, started[1][name]) < 1e-3 * norm(update), name


def test_a_start_from_a_dora_has_its_magnitudes(config: TrainConfig, tmp_path: Path) -> None:
    dora = config.replace(use_dora=True, learning_rate=0.1, save_dtype="fp32")
    path = train(dora)
    before = magnitudes(prepare(dora, samples_of(config)).sdxl.pipeline)["unet"]
    saved = load_file(path)
    again = magnitudes(prepare(dora.replace(init_lora=str(path)), samples_of(config)).sdxl.pipeline)["unet"]
    for name, value in again.items():
        assert torch.equal(value, saved[f"unet.{name}.lora_magnitude_vector"])
        assert not torch.equal(value, before[name])
    with pytest.raises(ConfigError, match=r"init_lora is a DoRA, whose magnitudes .* set --use_dora"):
        prepare(config.replace(init_lora=str(path)), samples_of(config))
    kohya = load_file(tmp_path / "run" / "run.safetensors")
    name = next(name for name in kohya if name.endswith(".lora_up.weight"))
    kohya[name.replace(".lora_up.weight", ".dora_scale")] = torch.ones(len(kohya[name]), 1)
    save_file(kohya, tmp_path / "foreign.safetensors")
    with pytest.raises(ConfigError, match=r"foreign\.safetensors holds DoRA"):
        prepare(dora.replace(init_lora=str(tmp_path / "foreign.safetensors")), samples_of(config))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_dora_that_starts_from_a_plain_lora_starts_at_its_merged_weights(
    config: TrainConfig, tmp_path: Path, precision: str
) -> None:
    plain = config.replace(learning_rate=0.1, save_dtype="fp32", mixed_precision=precision)
    path = train(plain)
    trained = lora_updates(prepare(plain.replace(init_lora=str(path)), samples_of(config)).sdxl.pipeline)["unet"]
    dora = prepare(plain.replace(init_lora=str(path), use_dora=True), samples_of(config)).sdxl.pipeline
    for name, layer in lora_layers(dora.unet).items():
        down, up, scale = trained[name]
        merged = layer.get_base_layer().weight.float() + scale * (up @ down)
        magnitude = layer.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(magnitude, merged.norm(dim=1), rtol=1e-6, atol=0)


def test_a_resumed_dora_on_a_half_precision_base_stands_where_it_stood(config: TrainConfig, tmp_path: Path) -> None:
    dora = config.replace(use_dora=True, learning_rate=0.0, mixed_precision="bf16")
    save_state(trained(dora, 1), tmp_path, 1)
    again = prepare(dora, samples_of(config))
    for layer in lora_layers(again.sdxl.unet).values():
        layer.lora_magnitude_vector["default"].weight.data.zero_()
    assert load_state(again, tmp_path) == 1
    for name, layer in lora_layers(again.sdxl.unet).items():
        norms = layer.get_base_layer().weight.float().norm(dim=1)
        magnitude = layer.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(magnitude, norms, rtol=1e-6, atol=0, msg=name)


# Text encoders


def test_text_encoders_are_trained_perturbed_and_left_alone_underneath(config: TrainConfig) -> None:
    state = prepare(config.replace(train_text_encoder=True), samples_of(config))
    encoders = [state.sdxl.pipeline.text_encoder, state.sdxl.pipeline.text_encoder_2]
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
    with pytest.raises(ConfigError, match=r"clip_skip=1 leaves no layer .* it can be at most 0 with it"):
        prepare(config.replace(clip_skip=1, train_text_encoder=True), samples_of(config))


def test_a_frozen_text_encoder_is_the_same_denoiser(config: TrainConfig) -> None:
    """Tokens through the Denoiser give what cached embeddings give, so training text changes nothing at step 0."""
    plain = prepare(config.replace(method="lora", caption_dropout=0.5), samples_of(config))
    text = prepare(config.replace(method="lora", caption_dropout=0.5, train_text_encoder=True), samples_of(config))
    losses = []
    for state in (plain, text):
        batch = state.feed.batch(0, 0)
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
    for rows in embedding_parameters(state.sdxl.pipeline).values():
        rows.data *= 5
    before = {part: rows.detach().clone() for part, rows in embedding_parameters(state.sdxl.pipeline).items()}
    for step, times in ((0, 1), (1, 2), (2, 2)):  # the share of 0.5 is over after two steps
        train_step(state, step)
        for part, rows in embedding_parameters(state.sdxl.pipeline).items():
            table = getattr(state.sdxl.pipeline, part).get_input_embeddings().table.weight
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
        assert embeddings_beside(place / "run.safetensors") == embeddings_beside(place / LORA_FILE) == beside
    state = prepare(config.replace(train_text_encoder_ti=True, instance_data_dir=str(folder)), samples_of(config))
    for part, key in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        start = getattr(state.sdxl.pipeline, part).get_input_embeddings().new.weight
        assert rows[key].shape == start.shape
        assert bool((rows[key] != start).any(dim=1).all()), "a new token was never trained"


# Prior preservation


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
    batch = state.feed.batch(0, 0)
    assert len(batch.latents) == 4
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([1, 300, 600, 999])
    losses = sample_losses(state.model, state.objective, batch, noise, steps)
    from flatlora_diffusion.sdxl.objective import diffusion_loss

    whole = diffusion_loss(state.model, state.objective, batch, noise, steps)
    torch.testing.assert_close(whole, losses[:2].mean() + 0.3 * losses[2:].mean())
    instance = state.feed.samples_at(0, 0)[0]
    assert batch.add_time_ids[0, :2].tolist() == [instance.height, instance.width]
    sizes = {tuple(row[:2].tolist()) for row in batch.add_time_ids[2:]}
    assert sizes <= {(70.0, 50.0), (32.0, 32.0)}, "a class image has the size conditioning of its own"


# Data


def test_cached_latents_are_those_of_the_same_view(config: TrainConfig, tmp_path: Path) -> None:
    cached = config.replace(cache_latents=True, random_flip=True, embedding_cache_dir=str(tmp_path / "cache"))
    first = prepare(cached, samples_of(config)).feed
    files = set((tmp_path / "cache").iterdir())
    assert len(files) == 2 * 3
    again = prepare(cached, samples_of(config)).feed
    assert set((tmp_path / "cache").iterdir()) == files
    flips = set()
    for step in range(6):
        rows = first._rows(step, 0)
        flips |= {row.view.is_mirrored for row in rows}
        pixels = torch.stack([first._pixels(row.sample, row.view) for row in rows])
        from flatlora_diffusion.sdxl.pipeline import posterior

        mean, std = posterior(first.sdxl.vae, pixels)
        found = first._posteriors(rows, [], step, 0)
        torch.testing.assert_close(found, (mean, std))
        assert torch.equal(again.batch(step, 0).latents, first.batch(step, 0).latents)
    assert flips == {True, False}
    prepare(cached.replace(background_color="red"), samples_of(config))
    assert len(set((tmp_path / "cache").iterdir())) == 2 * len(files), "the background changes the pixels"


def test_prompt_embeddings_are_kept_on_disk_and_made_anew_when_the_caption_changes(
    config: TrainConfig, icons: Path, tmp_path: Path
) -> None:
    cached = config.replace(cache_text_embeddings=True, embedding_cache_dir=str(tmp_path / "cache"))
    plain = prepare(config, samples_of(config)).feed.batch(0, 0)
    for _ in range(2):
        batch = prepare(cached, samples_of(config)).feed.batch(0, 0)
        assert batch.prompt_embeds is not None
        assert plain.prompt_embeds is not None
        assert torch.equal(batch.prompt_embeds, plain.prompt_embeds)
        assert len(list((tmp_path / "cache").iterdir())) == 3
    prepare(cached.replace(clip_skip=1), samples_of(config))
    assert len(list((tmp_path / "cache").iterdir())) == 6


def test_loader_threads_change_nothing(config: TrainConfig) -> None:
    plain = prepare(config.replace(gradient_accumulation_steps=2), samples_of(config)).feed
    threads = prepare(config.replace(gradient_accumulation_steps=2, dataloader_num_workers=2), samples_of(config)).feed
    for step in range(4):
        for slot in range(2):
            assert torch.equal(plain.batch(step, slot).latents, threads.batch(step, slot).latents)


def test_buckets_keep_the_shape_of_each_image(config: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "shapes"
    folder.mkdir()
    for index, size in enumerate([(64, 64), (128, 64), (64, 128), (130, 64)]):
        Image.new("RGB", size, "blue").save(folder / f"{index}.png")
    buckets = config.replace(
        instance_data_dir=str(folder), instance_prompt="x", use_aspect_ratio_buckets=True, resolution=64
    )
    feed = prepare(buckets, load_samples(folder, "x").samples).feed
    shapes = set()
    for step in range(8):
        batch = feed.batch(step, 0)
        height, width = batch.latents.shape[2:]
        assert batch.add_time_ids[0, 4:].tolist() == [4 * height, 4 * width]
        shapes.add((height, width))
        for sample, row in zip(feed.samples_at(step, 0), batch.add_time_ids, strict=True):
            assert row[:2].tolist() == [sample.height, sample.width]
            assert (sample.width > sample.height) == (width > height)
    assert len(shapes) == 3
    train(buckets.replace(max_train_steps=2))


def test_only_what_alpha_shows_counts(config: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "transparent"
    folder.mkdir()
    icon = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    icon.paste((200, 0, 0, 255), (0, 0, 16, 32))
    icon.save(folder / "half.png")
    masked = config.replace(instance_data_dir=str(folder), instance_prompt="x", alpha_mask_loss=True)
    batch = prepare(masked, load_samples(folder, "x").samples).feed.batch(0, 0)
    assert batch.mask is not None
    assert batch.mask.shape == (2, 1, 8, 8)
    assert batch.mask[0, 0, :, :4].eq(1).all()
    assert batch.mask[0, 0, :, 4:].eq(0).all()
    train(masked.replace(max_train_steps=1))


def test_a_hugging_face_dataset_is_trained_on(config: TrainConfig, icons: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "imagefolder"
    shutil.copytree(icons, folder)
    lines = [f'{{"file_name": "icon-{i}.png", "text": "caption {i}"}}\n' for i in range(3)]
    (folder / "metadata.jsonl").write_text("".join(lines))
    for extra in folder.glob("*.txt"):
        extra.unlink()
    named = config.replace(
        instance_data_dir=None, dataset_name=str(folder), caption_column="text", cache_dir=str(tmp_path / "hf")
    )
    train(named)
    manifest = RunDir(Path(named.run.output_dir)).manifest()
    by_file = {sample.sha256 for sample in load_samples(icons).samples}
    assert {entry["sha256"] for entry in manifest} == by_file
    for changes, message in (
        ({"caption_column": "words"}, "caption_column='words' is not a column"),
        ({"image_column": "picture"}, "image_column='picture' is not a column"),
        ({"caption_column": None}, "give --caption_column or an --instance_prompt"),
        ({"dataset_name": str(tmp_path / "nothing")}, "cannot be loaded"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(named.replace(**changes))


def test_rows_of_a_dataset_without_caption_or_image_count_as_that(
    config: TrainConfig, icons: Path, tmp_path: Path
) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "imagefolder"
    folder.mkdir()
    captions = ["first", " ", None, "never", "never"]
    for index in range(3):
        shutil.copy(icons / f"icon-{index}.png", folder)
    for index in (3, 4):
        (folder / f"icon-{index}.png").write_bytes(b"no image")
    rows = [{"file_name": f"icon-{index}.png", "text": caption} for index, caption in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = config.replace(
        instance_data_dir=None,
        dataset_name=str(folder),
        caption_column="text",
        instance_prompt="a prompt",
        cache_dir=str(tmp_path / "hf"),
    ).data
    found = load_training_set(data)
    assert [sample.caption for sample in found.samples] == ["first", "a prompt", "a prompt"]
    assert found.summary.startswith("3 images, captions 1/3, ")
    for prompt in (None, " "):
        with pytest.raises(ConfigError, match="2 of 3 images have no caption; give"):
            load_training_set(replace(data, instance_prompt=prompt))
    numbers = [{"file_name": f"icon-{index}.png", "text": index} for index in range(5)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in numbers), encoding="utf-8")
    with pytest.raises(ConfigError, match="caption_column='text' must hold texts, but a row has 0"):
        load_training_set(data)


# Optimizers


@pytest.mark.parametrize("name", ["adafactor", "prodigy", "8bit"])
def test_optimizers_lower_the_loss_and_resume_exactly(config: TrainConfig, name: str, tmp_path: Path) -> None:
    package = {"prodigy": "prodigyopt", "8bit": "bitsandbytes"}.get(name)
    if package:
        pytest.importorskip(package)
    settings: dict[str, Any] = {"use_8bit_adam": True} if name == "8bit" else {"optimizer": name}
    if name == "prodigy":
        settings["learning_rate"] = 1.0
    chosen = config.replace(**settings, max_train_steps=4, checkpointing_steps=2, train_text_encoder=True)
    first = prepare(chosen.replace(max_train_steps=12), samples_of(config))
    losses = [train_step(first, 0) for _ in range(12)]
    assert losses[-1] < losses[0]
    train(chosen.replace(output_dir=str(tmp_path / "whole")))
    broken = chosen.replace(output_dir=str(tmp_path / "broken"))
    train(broken)
    train(broken.replace(resume_from_checkpoint="checkpoint-2"))
    whole, resumed = (load_file(tmp_path / run / LORA_FILE) for run in ("whole", "broken"))
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_scale_lr_multiplies_by_the_images_of_a_step(config: TrainConfig) -> None:
    state = prepare(config.replace(scale_lr=True, gradient_accumulation_steps=3), samples_of(config))
    assert state.lr_schedule.get_last_lr() == [pytest.approx(1e-2 * 3 * 2)]


def test_text_encoders_have_their_own_learning_rate_and_decay(config: TrainConfig) -> None:
    state = prepare(config.replace(train_text_encoder=True, text_encoder_lr=2e-3), samples_of(config))
    unet, text = state.optimizer.param_groups
    assert (unet["lr"], unet["weight_decay"]) == (1e-2, 1e-4)
    assert (text["lr"], text["weight_decay"]) == (2e-3, 1e-3)


def test_a_warm_up_that_outlasts_the_run_is_told_of(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    warming = config.replace(lr_scheduler="cosine", max_train_steps=11)
    for settings in ({"lr_warmup_steps": 10}, {"lr_scheduler": "constant", "lr_warmup_steps": 500}):
        prepare(warming.replace(**settings), samples_of(config))
    assert "lr_warmup_steps" not in caplog.text
    prepare(warming.replace(lr_warmup_steps=20), samples_of(config))
    assert "lr_warmup_steps=20 is no shorter than the run of 11 steps" in caplog.text
    assert "never gets beyond 50 % of its value" in caplog.text


def test_the_average_of_the_weights_is_what_is_saved(config: TrainConfig, tmp_path: Path) -> None:
    settings = config.replace(use_ema=True, ema_decay=0.5, max_train_steps=4, checkpointing_steps=2)
    plain = train(config.replace(max_train_steps=4, output_dir=str(tmp_path / "plain")))
    averaged = train(settings.replace(output_dir=str(tmp_path / "averaged")))
    one, two = load_file(plain), load_file(averaged)
    assert any(not torch.equal(one[key], two[key]) for key in one)
    norms = [sum(float(v.square().sum()) for k, v in state.items() if "lora_B" in k) for state in (one, two)]
    assert 0 < norms[1] < norms[0]
    train(settings.replace(output_dir=str(tmp_path / "averaged"), resume_from_checkpoint="checkpoint-2"))
    assert all(torch.equal(value, two[key]) for key, value in load_file(averaged).items())


# Objectives of the base


def test_a_run_on_every_kind_of_objective(config: TrainConfig, tmp_path: Path) -> None:
    objectives: tuple[dict[str, Any], ...] = (
        {"do_edm_style_training": True},
        {"prediction_type": "v_prediction", "snr_gamma": 5.0},
        {"prediction_type": "v_prediction", "zero_terminal_snr": True, "snr_gamma": 5.0},
        {"loss_type": "huber", "noise_offset": 0.1, "clip_skip": 1},
    )
    for index, settings in enumerate(objectives):
        train(config.replace(**settings, max_train_steps=2, output_dir=str(tmp_path / str(index))))


def test_a_base_with_an_edm_scheduler_is_trained_with_its_own_objective(
    config: TrainConfig, base: Path, tmp_path: Path
) -> None:
    from diffusers import EDMEulerScheduler

    folder = tmp_path / "edm"
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    pipeline.scheduler = EDMEulerScheduler(sigma_data=0.5)
    pipeline.save_pretrained(folder)
    edm = config.replace(pretrained_model_name_or_path=str(folder), validation_prompt="x", num_validation_images=1)
    state = prepare(edm, samples_of(config))
    assert state.objective.edm
    path = train(edm.replace(validation_data_dir=config.data.instance_data_dir))
    losses = [event["loss"] for event in RunDir(path.parent).events() if event["event"] == "validation"]
    probe = fixed_probe(state.sdxl, samples_of(config), 32, seed=0)
    assert losses[0] == pytest.approx(probe_loss(state.sdxl.unet, state.objective, probe))
    with pytest.raises(ConfigError, match="--snr_gamma does not fit this base"):
        train(edm.replace(snr_gamma=5.0))


def test_heldout_loss_is_logged_with_the_previews(config: TrainConfig, icons: Path) -> None:
    path = train(config.replace(validation_data_dir=str(icons)))
    events = [event for event in RunDir(path.parent).events() if event["event"] == "validation"]
    assert [event["step"] for event in events] == [0, 2, 3]
    state = prepare(config, samples_of(config))
    probe = fixed_probe(state.sdxl, samples_of(config), 32, seed=0)
    assert events[0]["loss"] == pytest.approx(probe_loss(state.sdxl.unet, Objective(state.sdxl.scheduler), probe))
    assert events[-1]["loss"] != events[0]["loss"]


@pytest.mark.parametrize(
    "settings", [{"clip_skip": 1}, {"do_edm_style_training": True, "prediction_type": "v_prediction"}]
)
def test_heldout_loss_is_that_of_what_is_trained(config: TrainConfig, icons: Path, settings: dict[str, Any]) -> None:
    path = train(config.replace(validation_data_dir=str(icons), max_train_steps=1, **settings))
    (event, *_) = [event for event in RunDir(path.parent).events() if event["event"] == "validation"]
    predicted = settings.get("prediction_type")
    plain = prepare(config.replace(prediction_type=predicted), samples_of(config)).sdxl
    probe = fixed_probe(plain, samples_of(config), 32, seed=0)
    asked = plain.pipeline.encode_prompt(
        [sample.caption for sample in samples_of(config)],
        do_classifier_free_guidance=False,
        clip_skip=settings.get("clip_skip"),
    )
    prompts, pooled = (asked[index].repeat_interleave(probe.draws, dim=0) for index in (0, 2))
    other = replace(probe, batch=replace(probe.batch, prompt_embeds=prompts, pooled_prompt_embeds=pooled))
    objective = Objective(plain.scheduler, edm="do_edm_style_training" in settings)
    assert event["loss"] == pytest.approx(probe_loss(plain.unet, objective, other))
    assert event["loss"] != pytest.approx(probe_loss(plain.unet, Objective(plain.scheduler), probe), rel=1e-4)


def test_heldout_captions_stand_where_those_of_the_training_images_do(
    config: TrainConfig, icons: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("training", "heldout", "sidecars")]
    for folder in folders:
        shutil.copytree(icons, folder)
    for folder in folders[:2]:
        rows = [{"file_name": f"icon-{index}.png", "text": "x", "mine": f"my {index}"} for index in range(3)]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    chosen = config.replace(instance_data_dir=str(folders[0]), caption_column="mine")
    for folder, caption in ((folders[1], "my 0"), (folders[2], "an icon of thing 0")):
        found = load_heldout(folder, chosen.data)
        assert found.samples[0].caption == caption


def test_captions_that_are_cut_are_told_of(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    samples = samples_of(config)
    with caplog.at_level("WARNING"):
        prepare(config, [replace(samples[0], caption="cat " * 75), *samples[1:]])
    assert "tokens" not in caplog.text
    long = [samples[0], *(replace(sample, caption="cat " * 76) for sample in samples[1:])]
    with caplog.at_level("WARNING"):
        prepare(config, long)
    assert "2 images have captions of more than 77 tokens (icon-1.png the first)" in caplog.text


@pytest.mark.parametrize("trained_text", ["train_text_encoder", "train_text_encoder_ti"])
def test_heldout_loss_is_that_of_the_trained_text_encoders(config: TrainConfig, trained_text: str) -> None:
    config = config.replace(**{trained_text: True}, token_abstraction="icon", text_encoder_lr=1.0)
    state = prepare(config.replace(validation_data_dir=config.data.instance_data_dir), samples_of(config))
    samples = [replace(one, caption=with_new_tokens(one.caption, state.tokens)) for one in samples_of(config)]
    assert any("<s0><s1>" in one.caption for one in samples) is (trained_text == "train_text_encoder_ti")
    state.run.folder.mkdir()
    previews = Previews(state)
    for step in range(2):
        with ready(state.sdxl):
            probe = fixed_probe(state.sdxl, samples, 32, seed=0)
        expected = probe_loss(state.sdxl.unet, Objective(state.sdxl.scheduler), probe)
        previews.make("now", step)
        assert state.run.events()[-1]["loss"] == pytest.approx(expected, rel=1e-6)
        train_step(state, step)


def test_sdxl_is_a_frozen_base(config: TrainConfig) -> None:
    state = prepare(config, samples_of(config))
    assert isinstance(state.sdxl, Sdxl)
    assert not any(p.requires_grad for p in state.sdxl.vae.parameters())


@pytest.mark.parametrize("buckets", [False, True])
def test_offload_leaves_the_vae_where_class_images_are_still_to_be_encoded(
    config: TrainConfig, icons: Path, monkeypatch: pytest.MonkeyPatch, buckets: bool
) -> None:
    moves: Any = []
    plain = AutoencoderKL.to
    monkeypatch.setattr(AutoencoderKL, "to", lambda vae, *to, **rest: (moves.append(to), plain(vae, *to, **rest))[1])
    prior = {"with_prior_preservation": True, "class_data_dir": str(icons), "class_prompt": "an icon"}
    settings = {"cache_latents": True, "offload": True, "use_aspect_ratio_buckets": buckets, **prior}
    prepare(config.replace(**settings), samples_of(config), samples_of(config))
    assert (("cpu",) in moves) is not buckets


# What stops a run, in the user's words


def test_out_of_memory_ends_with_what_lowers_it(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("flatlora_diffusion.training.trainer.train_step", full)
    with pytest.raises(RunError, match=r"out of memory; these settings need about[\s\S]*--mixed_precision bf16 saves"):
        train(config)


@pytest.mark.parametrize(("is_main", "fails"), [(True, False), (True, True), (False, False)])
def test_the_first_process_tells_the_memory_of_its_own_gpu_and_goes_on_if_it_cannot(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: Any, is_main: bool, fails: bool
) -> None:
    gpu, asked = torch.device("cuda", 3), []

    def free_and_all(device: Any) -> tuple[int, int]:
        asked.append(device)
        if fails:
            raise RuntimeError("no driver")
        return 7 * 2**30, 8 * 2**30

    monkeypatch.setattr(trainer, "this_process", lambda: SimpleNamespace(device=gpu, is_main_process=is_main))
    monkeypatch.setattr(torch.cuda, "mem_get_info", free_and_all)
    with caplog.at_level("INFO"):
        assert train(config.replace(max_train_steps=1)).is_file()
    assert asked == ([gpu] if is_main else [])
    assert ("7.0 GiB free" in caplog.text) is (is_main and not fails)
    assert ("could not be estimated: no driver" in caplog.text) is fails


@pytest.mark.parametrize("stage", ["prepare", "load_class_samples"])
def test_out_of_memory_before_the_first_step_ends_alike(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(f"flatlora_diffusion.training.trainer.{stage}", full)
    with pytest.raises(RunError, match="out of memory; these settings need about"):
        train(config)


@pytest.fixture
def restored_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The choice of kernels is the whole process's."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("restored_kernels")
def test_deterministic_refuses_an_operation_that_is_not(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: Any) -> None:
        torch.empty(1).put_(torch.tensor([0]), torch.ones(1))  # without an order of its own on any device

    monkeypatch.setattr("flatlora_diffusion.training.trainer.train_step", step)
    with pytest.raises(
        RunError, match=r"^put_ has no deterministic kernel on this device; leave --deterministic out$"
    ):
        train(config.replace(deterministic=True))


@pytest.mark.usefixtures("restored_kernels")
def test_class_images_are_drawn_with_deterministic_kernels_too(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[bool, str | None]] = []

    def load(_: TrainConfig) -> list[Any]:
        found.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        return []

    monkeypatch.setattr("flatlora_diffusion.training.trainer.load_class_samples", load)
    train(config.replace(deterministic=True))
    assert found == [(True, ":4096:8")]
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.parametrize(
    ("report_to", "message"),
    [
        ("comet_ml", "report_to='comet_ml' needs the package comet_ml"),
        ("paper", "report_to='paper' is not one of tensorboard, wandb, comet_ml, all, none"),
    ],
)
def test_a_tracker_that_is_not_there(config: TrainConfig, report_to: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(config.replace(report_to=report_to), samples_of(config))


def test_launchers_that_shard_the_base_are_refused() -> None:
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        with pytest.raises(ConfigError, match=f"configured for {kind.value}, which shards the base; use MULTI_GPU"):
            check_distribution(kind)
    check_distribution(DistributedType.MULTI_GPU)
    check_distribution(DistributedType.NO)


def test_several_processes_send_no_weights_of_a_quantized_base(config: TrainConfig) -> None:
    pytest.importorskip("torchao")
    state = prepare(config.replace(quantize_base="torchao-int8"), samples_of(config))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        state.model = DistributedDataParallel(state.model)
        train_step(state, step=0)
    finally:
        distributed.destroy_process_group()
    assert all(parameter.any() for name, parameter in state.trainable.items() if "lora_B" in name), "nothing learned"


def test_optional_optimizers_name_their_package(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatlora_diffusion.training.optimizer.importlib.util.find_spec", lambda name: None)
    for settings, package in (({"optimizer": "prodigy"}, "prodigyopt"), ({"use_8bit_adam": True}, "bitsandbytes")):
        with pytest.raises(ConfigError, match=f"needs the package {package}: pip install {package}"):
            prepare(config.replace(**settings), samples_of(config))


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
    one, two = load_file(plain), load_file(watched)
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    names = {path.name for path in (watched.parent / "images").iterdir()}
    assert names == {"base-0.png", "step-2-0.png", "step-3-0.png"}
