"""Settings that exclude each other, in one table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatlora_diffusion.config.methods import NOISY
from flatlora_diffusion.config.section import ConfigError

if TYPE_CHECKING:
    from flatlora_diffusion.config.training import TrainConfig


def check_combinations(config: TrainConfig) -> None:
    """Raises ConfigError, in a sentence that names both, for the first settings that exclude each other."""
    for is_refused, why in (*_of_material(config), *_of_rivals(config)):
        if is_refused:
            raise ConfigError(why)


def _of_rivals(config: TrainConfig) -> tuple[tuple[object, str], ...]:
    """What methods, adapters and optimizers do not go together, and why."""
    adapter, perturb, optim = config.adapter, config.perturb, config.optim
    name = adapter.adapter
    starts_away = name in ("pissa", "lora-ga")
    return (
        (
            starts_away and adapter.use_dora,
            f"--adapter {name} starts away from W, which --use_dora would rescale; leave one out",
        ),
        (
            starts_away and adapter.init_lora is not None,
            f"--adapter {name} has a start of its own, and --init_lora another one; leave one out",
        ),
        (
            starts_away and adapter.lora_target_modules == "conv",
            f"--adapter {name} adapts linear layers only; give --lora_target_modules all-linear, or another adapter",
        ),
        (
            name != "pissa" and adapter.pissa_iterations is not None,
            f"--pissa_iterations means nothing for --adapter {name}; leave it out, or use --adapter pissa",
        ),
        (
            name != "lora-ga" and adapter.lora_ga_steps is not None,
            f"--lora_ga_steps means nothing for --adapter {name}; leave it out, or use --adapter lora-ga",
        ),
        (
            adapter.is_dora and adapter.lora_dropout > 0 and perturb.method in (*NOISY, "sam", "bi-lora"),
            f"--lora_dropout with DoRA lets what --method {perturb.method} adds to W escape the rescaling; set "
            "--lora_dropout 0",
        ),
        (
            optim.lora_plus_ratio is not None and optim.optimizer == "prodigy",
            "--lora_plus_ratio needs learning rates of its own, and --optimizer prodigy finds one for all; leave one "
            "out",
        ),
    )


def _of_material(config: TrainConfig) -> tuple[tuple[object, str], ...]:
    """What images, objective, base and text encoders exclude."""
    data, objective = config.data, config.objective
    return (
        (
            sum(map(bool, (data.instance_data_dir, data.dataset_name, data.dataset_config))) > 1,
            "--instance_data_dir, --dataset_name and --dataset_config: give one of them",
        ),
        (
            data.cache_text_embeddings and data.draws_captions,
            "--cache_text_embeddings cannot cache captions that are drawn anew; leave it, or --shuffle_tags and "
            "--tag_dropout, out",
        ),
        (
            data.keep_tags and not data.draws_captions,
            "--keep_tags keeps tags from --shuffle_tags and --tag_dropout; give one of these, or leave it out",
        ),
        (
            objective.snr_gamma is not None and objective.do_edm_style_training,
            "--snr_gamma weights another objective than --do_edm_style_training; leave one out",
        ),
        (
            config.adapter.train_text_encoder and config.tokens.train_text_encoder_ti,
            "--train_text_encoder and --train_text_encoder_ti train the same encoders; leave one out",
        ),
        (
            data.with_prior_preservation and not (data.class_data_dir and data.class_prompt),
            "--with_prior_preservation needs --class_data_dir and --class_prompt",
        ),
        (
            config.model.zero_terminal_snr and config.model.prediction_type == "epsilon",
            "--zero_terminal_snr needs a v-prediction base: pure noise has no signal to predict the noise against",
        ),
        (
            config.model.zero_terminal_snr and objective.do_edm_style_training,
            "--zero_terminal_snr ends in pure noise, which has no sigma for --do_edm_style_training; drop one",
        ),
        (
            config.optim.base_dtype is not None and config.model.quantize_base is not None,
            "--base_dtype keeps the whole base in fp32, which --quantize_base does not; leave one out",
        ),
        (
            data.holdout_patience and not data.holdout_images,
            "--holdout_patience waits for a lower loss of --holdout_images; give how many, such as 3",
        ),
        (
            data.cache_text_embeddings and config.trains_text,
            "--cache_text_embeddings cannot cache what is trained; leave it or the text encoders' training out",
        ),
    )
