"""Every flag of diffusers' two SDXL DreamBooth LoRA scripts exists with its default, and every setting runs."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flatlora_diffusion.commands.command_line import train_main
from flatlora_diffusion.commands.train_flags import parse_training
from flatlora_diffusion.config import CaptionConfig, CompareConfig, GenerateConfig, TrainConfig
from flatlora_diffusion.storage.run_dir import LORA_FILE

# Name and default of each flag of examples/dreambooth/train_dreambooth_lora_sdxl.py (diffusers at 58eb52c) ...
UPSTREAM: dict[str, Any] = {
    "pretrained_model_name_or_path": "required",
    "pretrained_vae_model_name_or_path": None,
    "revision": None,
    "variant": None,
    "dataset_name": None,
    "dataset_config_name": None,
    "instance_data_dir": None,
    "cache_dir": None,
    "image_column": "image",
    "caption_column": None,
    "repeats": 1,
    "class_data_dir": None,
    "instance_prompt": "required",
    "class_prompt": None,
    "validation_prompt": None,
    "num_validation_images": 4,
    "validation_epochs": 50,
    "do_edm_style_training": False,
    "with_prior_preservation": False,
    "prior_loss_weight": 1.0,
    "num_class_images": 100,
    "output_dir": "lora-dreambooth-model",
    "output_kohya_format": False,
    "seed": None,
    "resolution": 1024,
    "center_crop": False,
    "random_flip": False,
    "train_text_encoder": False,
    "train_batch_size": 4,
    "sample_batch_size": 4,
    "num_train_epochs": 1,
    "max_train_steps": None,
    "checkpointing_steps": 500,
    "checkpoints_total_limit": None,
    "resume_from_checkpoint": None,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "learning_rate": 1e-4,
    "text_encoder_lr": 5e-6,
    "scale_lr": False,
    "lr_scheduler": "constant",
    "snr_gamma": None,
    "lr_warmup_steps": 500,
    "lr_num_cycles": 1,
    "lr_power": 1.0,
    "dataloader_num_workers": 0,
    "optimizer": "AdamW",
    "use_8bit_adam": False,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "prodigy_beta3": None,
    "prodigy_decouple": True,
    "adam_weight_decay": 1e-4,
    "adam_weight_decay_text_encoder": 1e-3,
    "adam_epsilon": 1e-8,
    "prodigy_use_bias_correction": True,
    "prodigy_safeguard_warmup": True,
    "max_grad_norm": 1.0,
    "push_to_hub": False,
    "hub_token": None,
    "hub_model_id": None,
    "logging_dir": "logs",
    "allow_tf32": False,
    "report_to": "tensorboard",
    "mixed_precision": None,
    "prior_generation_precision": None,
    "local_rank": -1,
    "enable_xformers_memory_efficient_attention": False,
    "rank": 4,
    "lora_dropout": 0.0,
    "use_dora": False,
    "image_interpolation_mode": "lanczos",
    # ... and what advanced_diffusion_training/train_dreambooth_lora_sdxl_advanced.py has beside these.
    "token_abstraction": "TOK",
    "num_new_tokens_per_abstraction": 2,
    "train_text_encoder_ti": False,
    "train_text_encoder_ti_frac": 0.5,
    "train_text_encoder_frac": 1.0,
    "clip_skip": None,
    "noise_offset": 0,
    "lora_unet_blocks": None,
    "use_blora": False,
    "cache_latents": False,
}
# docs/flags.md says why.
OTHER_DEFAULTS = {"pretrained_model_name_or_path", "instance_prompt", "resolution", "optimizer"}

# What each run adds to a run of two steps; together they use every flag but those of NOT_RUN.
RUNS: dict[str, str] = {
    "data": "--instance_prompt icon --repeats 2 --center_crop --random_flip --image_interpolation_mode bicubic "
    "--dataloader_num_workers 2 --caption_dropout 0.5 --background_color #ff0000 --alpha_mask_loss "
    "--shuffle_tags --keep_tags 1 --tag_dropout 0.5 --prediction_type v_prediction --zero_terminal_snr "
    "--debiased_estimation",
    "buckets and caches": "--use_aspect_ratio_buckets --cache_latents --cache_text_embeddings "
    "--embedding_cache_dir OUT/cache --offload",
    "hugging face": "--dataset_name HF --caption_column text --image_column image --cache_dir OUT/hf "
    "--dataset_config_name default",
    "dataset file": "--dataset_config OUT/data.toml",
    "prior": "--with_prior_preservation --class_data_dir OUT/class --class_prompt icon --num_class_images 2 "
    "--sample_batch_size 2 --prior_loss_weight 0.5 --prior_generation_precision fp32 --snr_gamma 5.0",
    "optimizer": "--scale_lr --lr_scheduler polynomial --lr_warmup_steps 1 --lr_power 2.0 --lr_num_cycles 2 "
    "--optimizer AdamW --adam_beta1 0.8 --adam_beta2 0.99 --adam_weight_decay 0 --adam_epsilon 1e-7 "
    "--max_grad_norm 0.5 --gradient_accumulation_steps 2 --use_ema --ema_decay 0.9 --deterministic --allow_tf32",
    "8-bit": "--use_8bit_adam --gradient_checkpointing --mixed_precision bf16 --base_dtype fp32 --method sam "
    "--rho_rise 0.2",
    "prodigy": "--optimizer Prodigy --learning_rate 1.0 --prodigy_beta3 0.9 --prodigy_decouple False "
    "--prodigy_use_bias_correction=True --prodigy_safeguard_warmup True",
    "text encoders": "--train_text_encoder --text_encoder_lr 1e-4 --adam_weight_decay_text_encoder 0 "
    "--train_text_encoder_frac 0.5 --image_loss_draws 2 --lora_dropout 0.1 --lora_alpha 8 --use_rslora",
    "pivotal": "--train_text_encoder_ti --token_abstraction icon --num_new_tokens_per_abstraction 1 "
    "--train_text_encoder_ti_frac 0.5 --clip_skip 1",
    "pissa": "--adapter pissa --pissa_iterations 2 --lora_plus_ratio 4 --method flat-lora",
    "adalora": "--adapter adalora --mixed_precision bf16 --offload",
    "full": "--adapter full --rank 8",
    "bar on a DoRA": "--method nbar --bar_strength 0.5 --use_dora --lora_unet_blocks mid_block --lora_block_ranks "
    "mid_block=2 --lora_target_modules attn+ff --rank 3",
    "b-lora": "--use_blora --init_lora LORA",
    "objective": "--do_edm_style_training --noise_offset 0.05 --loss_type huber --adapter lora-ga "
    "--lora_ga_steps 1 --multires_noise_iterations 2 "
    "--multires_noise_discount 0.5 --ip_noise_gamma 0.1 --min_timestep 10 --max_timestep 900",
    "method": "--method flat-lora --sigma 0.05 --sigma_schedule down --sigma_ramp_steps 1 --perturb_seed 1 "
    "--perturb_per step --perturb_noise iid --perturb_draw low_rank --perturb_norm_every 2 --lora_init_seed 3 "
    "--prior_from_base --class_prompt icon",
    "previews": "--validation_prompt icon --num_validation_images 1 --validation_epochs 1 --validation_prompts_file "
    "PROMPTS --validation_data_dir ICONS --report_to tensorboard --logging_dir log --output_name mine",
    "saving": "--holdout_images 1 --holdout_patience 1 --checkpointing_steps 1 --checkpoints_total_limit 1 "
    "--output_kohya_format --max_train_seconds 600 --local_rank 0 --selfcheck always --num_train_epochs 3 "
    "--save_dtype bf16",
    "resume": "--resume_from_checkpoint latest --checkpointing_steps 1 --method sam --rho 0.1 "
    "--pretrained_vae_model_name_or_path BASE/vae --resolution 16 --train_batch_size 1",
    "quantized": "--quantize_base torchao-int8",
}
NOT_RUN = {
    "revision": "of a hub repository, which cannot be reached here",
    "variant": "the tiny base has none; test_loading.py loads one",
    "single_file_config": "test_loading.py loads single files with it",
    "enable_xformers_memory_efficient_attention": "xformers needs a GPU",
    "push_to_hub": "test_hub.py uploads to a hub on localhost",
    "hub_token": "test_hub.py",
    "members": "test_members.py trains them",
    "average_rank": "test_members.py",
    "remove_members": "test_members.py",
    "weighting_scheme": "of flow matching; test_training.py of FLUX.2 klein runs it",
    "logit_mean": "tests/families/klein/test_objective.py",
    "logit_std": "test_training.py of FLUX.2 klein",
    "mode_scale": "tests/families/klein/test_objective.py",
    "hub_model_id": "test_hub.py",
}


def flags_of(line: str) -> set[str]:
    return {part.removeprefix("--").split("=")[0] for part in shlex.split(line) if part.startswith("--")}


def test_every_flag_of_diffusers_exists_with_its_default() -> None:
    ours = TrainConfig().to_dict()
    assert len(UPSTREAM) == 72 + 10
    assert set(UPSTREAM) <= set(ours)
    changed = {name for name, value in UPSTREAM.items() if ours[name] != value}
    assert changed == OTHER_DEFAULTS


def test_every_setting_is_run_here_or_listed_with_a_reason() -> None:
    common = {"pretrained_model_name_or_path", "instance_data_dir", "output_dir", "max_train_steps", "seed"}
    run = common.union(*map(flags_of, RUNS.values()), {"learning_rate"})
    assert run | set(NOT_RUN) == set(TrainConfig().to_dict())
    assert not run & set(NOT_RUN)


def test_differences_from_diffusers_are_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "flags.md").read_text(encoding="utf-8")
    ours = set(TrainConfig().to_dict())
    for name in (ours - set(UPSTREAM)) | OTHER_DEFAULTS:
        assert f"`--{name}" in text, name
    mentioned = set(re.findall(r"`--(\w+)", text))
    others = {one.name for verb in (GenerateConfig, CaptionConfig, CompareConfig) for one in fields(verb)}
    assert mentioned <= ours | others | {"config", "preset", "help"}, "the document names a flag that is not there"


@pytest.fixture
def places(base: Path, icons: Path, tmp_path: Path) -> dict[str, str]:
    dataset, prompts = tmp_path / "hf", tmp_path / "prompts.jsonl"
    dataset.mkdir()
    Image.new("RGB", (40, 40), "red").save(dataset / "a.png")
    (dataset / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "an icon"}\n')
    prompts.write_text(json.dumps({"prompt": "an icon", "negative_prompt": "blurry", "seed": 4}) + "\n")
    return {
        "OUT": tmp_path.as_posix(),
        "BASE": base.as_posix(),
        "ICONS": icons.as_posix(),
        "HF": dataset.as_posix(),
        "PROMPTS": prompts.as_posix(),
        "LORA": (tmp_path / "first").as_posix(),
    }


@pytest.mark.usefixtures("short_drawings")
@pytest.mark.parametrize("name", RUNS)
def test_every_flag_runs(name: str, places: dict[str, str], tmp_path: Path) -> None:
    for package, runs in {"bitsandbytes": "8-bit", "prodigyopt": "prodigy", "datasets": "hugging face"}.items():
        if name == runs:
            pytest.importorskip(package)
    if name == "quantized":
        pytest.importorskip("torchao")
    start = ["--pretrained_model_name_or_path", places["BASE"], "--max_train_steps", "2", "--seed", "0"]
    data = ["--instance_data_dir", places["ICONS"]]
    output = ["--output_dir", str(tmp_path / "run")]
    if name == "b-lora":
        assert train_main([*start, *data, "--use_blora", "--output_dir", places["LORA"]]) == 0
    if name == "resume":
        first = [word.replace("BASE", places["BASE"]) for word in shlex.split(RUNS[name])[2:]]
        assert train_main([*start, *data, *output, *first]) == 0
    if name == "dataset file":
        (tmp_path / "data.toml").write_text(f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{places['ICONS']}'\n")
    line = RUNS[name]
    for place, path in places.items():
        line = line.replace(place, path)
    arguments = [*start, *([] if name in ("hugging face", "dataset file") else data), *output, *shlex.split(line)]
    assert train_main(arguments) == 0
    assert (tmp_path / "run" / LORA_FILE).is_file()
    if name == "saving":
        assert (tmp_path / "run" / "pytorch_lora_weights_kohya.safetensors").is_file()
    if name == "previews":
        assert list((tmp_path / "run" / "log").rglob("events.out.tfevents.*"))


# The complete commands of the two upstream READMEs, paths and models as they stand there.
DOG = """--pretrained_model_name_or_path=$MODEL_NAME --instance_data_dir=$INSTANCE_DIR
    --pretrained_vae_model_name_or_path=$VAE_PATH --output_dir=$OUTPUT_DIR --mixed_precision="fp16"
    --instance_prompt="a photo of sks dog" --resolution=1024 --train_batch_size=1 --gradient_accumulation_steps=4
    --learning_rate=1e-4 --report_to="wandb" --lr_scheduler="constant" --lr_warmup_steps=0 --max_train_steps=500
    --validation_prompt="A photo of sks dog in a bucket" --validation_epochs=25 --seed="0" --push_to_hub"""
README_COMMANDS = {
    "dog": DOG,
    "dog with less than 16 GB": f"{DOG} --enable_xformers_memory_efficient_attention --gradient_checkpointing "
    '--use_8bit_adam --mixed_precision="fp16"',
    "dog, text encoders": f"{DOG} --train_text_encoder",
    "dog, EDM": f"{DOG} --do_edm_style_training",
    "playground": """--pretrained_model_name_or_path="playgroundai/playground-v2.5-1024px-aesthetic"
        --instance_data_dir="dog" --output_dir="dog-playground-lora" --mixed_precision="fp16"
        --instance_prompt="a photo of sks dog" --resolution=1024 --train_batch_size=1
        --gradient_accumulation_steps=4 --learning_rate=1e-4 --use_8bit_adam --report_to="wandb"
        --lr_scheduler="constant" --lr_warmup_steps=0 --max_train_steps=500
        --validation_prompt="A photo of sks dog in a bucket" --validation_epochs=25 --seed="0" --push_to_hub""",
    "pivotal": """--pretrained_model_name_or_path=$MODEL_NAME --pretrained_vae_model_name_or_path=$VAE_PATH
        --dataset_name=$DATASET_NAME --instance_prompt="3d icon in the style of TOK"
        --validation_prompt="a TOK icon of an astronaut riding a horse, in the style of TOK" --output_dir=$OUTPUT_DIR
        --caption_column="prompt" --mixed_precision="bf16" --resolution=1024 --train_batch_size=3 --repeats=1
        --report_to="wandb" --gradient_accumulation_steps=1 --gradient_checkpointing --learning_rate=1.0
        --text_encoder_lr=1.0 --optimizer="prodigy" --train_text_encoder_ti --train_text_encoder_ti_frac=0.5
        --snr_gamma=5.0 --lr_scheduler="constant" --lr_warmup_steps=0 --rank=8 --max_train_steps=1000
        --checkpointing_steps=2000 --seed="0" --push_to_hub""",
    "b-lora": """--pretrained_model_name_or_path=$MODEL_NAME --instance_data_dir=$INSTANCE_DIR
        --output_dir=$OUTPUT_DIR --instance_prompt="a [v18]" --resolution=1024 --rank=64 --train_batch_size=1
        --learning_rate=5e-5 --lr_scheduler="constant" --lr_warmup_steps=0 --max_train_steps=1000
        --checkpointing_steps=500 --seed=0 --gradient_checkpointing --use_8bit_adam --mixed_precision="fp16"
        --use_blora""",
}


@pytest.mark.parametrize("name", README_COMMANDS)
def test_the_commands_of_the_upstream_readmes_parse(name: str) -> None:
    config = parse_training(shlex.split(README_COMMANDS[name]))[0]
    assert config.data.resolution == 1024
    assert config.run.seed == 0


@pytest.mark.usefixtures("short_drawings")
@pytest.mark.parametrize(
    "name", ["dog", *(pytest.param(name, marks=pytest.mark.long) for name in README_COMMANDS if name != "dog")]
)
def test_the_commands_of_the_upstream_readmes_run(name: str, places: dict[str, str], tmp_path: Path) -> None:
    """With the model, data and size swapped, two steps, and without what needs a GPU, an account or the network."""
    for package in ("bitsandbytes", "prodigyopt", "datasets"):
        pytest.importorskip(package)
    swaps = {
        "$MODEL_NAME": places["BASE"],
        '"playgroundai/playground-v2.5-1024px-aesthetic"': places["BASE"],
        '="dog"': f"={places['ICONS']}",
        '"dog-playground-lora"': str(tmp_path / "run"),
        "$INSTANCE_DIR": places["ICONS"],
        "$OUTPUT_DIR": str(tmp_path / "run"),
        "$VAE_PATH": f"{places['BASE']}/vae",
        "$DATASET_NAME": places["HF"],
        '"prompt"': "text",
        '--mixed_precision="fp16"': "--mixed_precision=bf16",
        "--enable_xformers_memory_efficient_attention": "",
        "--push_to_hub": "",
        '--report_to="wandb"': "--report_to=none",
        "=1024": "=32",
        "=500": "=2",
        "=1000": "=2",
    }
    line = README_COMMANDS[name]
    for old, new in swaps.items():
        line = line.replace(old, new)
    assert train_main([*shlex.split(line), "--num_validation_images=1"]) == 0
    assert (tmp_path / "run" / LORA_FILE).is_file()
