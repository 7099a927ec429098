"""Settings that exclude each other, each pair with the sentence that names both."""

from __future__ import annotations

from collections.abc import Iterable

from flatlora_diffusion.config.adapters import ADAPTERS, adapters_with
from flatlora_diffusion.config.methods import METHODS
from flatlora_diffusion.config.sections import Sections
from flatlora_diffusion.config.setting import ConfigError


def check_combinations(config: Sections) -> None:
    """Raises ConfigError, in a sentence that names both, for the first settings that exclude each other."""
    for is_refused, why in (*_of_data_and_objective(config), *_of_rivals(config)):
        if is_refused:
            raise ConfigError(why)


def _of_rivals(config: Sections) -> tuple[tuple[object, str], ...]:
    """What methods, adapters and optimizers do not go together, and why."""
    adapter, perturb, optim = config.adapter, config.perturb, config.optim
    name, row, method = adapter.adapter, ADAPTERS[adapter.adapter], METHODS[perturb.method]
    return (
        *_of_unet_alone(config),
        *_of_lora_pro(config),
        (
            name in method.excludes,
            f"--method {perturb.method} is made for A and B of a LoRA, which --adapter {name} does not have; use "
            "another of the two",
        ),
        (
            optim.use_8bit_adam and optim.optimizer != "adamw",
            f"--use_8bit_adam is for --optimizer adamw, not {optim.optimizer}; leave one out",
        ),
        (
            row.starts_away and adapter.use_dora,
            f"--adapter {name} starts away from W, which --use_dora would rescale; leave one out",
        ),
        (
            row.starts_away and adapter.init_lora is not None,
            f"--adapter {name} has a start of its own, and --init_lora another one; leave one out",
        ),
        (
            row.is_linear_only and adapter.lora_target_modules == "conv",
            f"--adapter {name} adapts linear layers only; give --lora_target_modules all-linear, or another adapter",
        ),
        *(
            (
                getattr(adapter, setting) is not None and name not in adapters_with(setting),
                f"--{setting} means nothing for --adapter {name}; leave it out, or use --adapter "
                f"{' or '.join(adapters_with(setting))}",
            )
            for setting in ("pissa_iterations", "lora_ga_steps")
        ),
        (
            adapter.use_dora and adapter.lora_dropout > 0 and method.adds_to_weights,
            f"--lora_dropout with DoRA lets what --method {perturb.method} adds to W escape the rescaling; set "
            "--lora_dropout 0",
        ),
        (
            config.objective.prior_from_base and (row.starts_away or not method.allows_prior_from_base),
            "--prior_from_base is for --method lora and flat-lora with an --adapter that starts at the base, not for "
            f"{perturb.method} with {name}; leave it out",
        ),
        (
            optim.lora_plus_ratio is not None and optim.optimizer == "prodigy",
            "--lora_plus_ratio needs learning rates of its own, and --optimizer prodigy finds one for all; leave one "
            "out",
        ),
    )


def _of_unet_alone(config: Sections) -> tuple[tuple[object, str], ...]:
    """What does not go with adapters that are no LoRA of two trained factors, and why."""
    adapter, name = config.adapter, config.adapter.adapter
    if ADAPTERS[name].is_lora:
        return ()
    is_full, out = name == "full", "leave one out"
    return (
        (adapter.use_dora or adapter.use_rslora, f"--adapter {name} is itself, not --use_dora or --use_rslora; {out}"),
        (adapter.init_lora is not None, f"--adapter {name} cannot start from the two factors of --init_lora; {out}"),
        (
            adapter.lora_block_ranks is not None,
            f"--adapter {name} has one --rank for all layers, and --lora_block_ranks one for each; {out}",
        ),
        (adapter.train_text_encoder, f"--adapter {name} is for the UNet alone; leave --train_text_encoder out"),
        (
            config.model.quantize_base is not None,
            f"--adapter {name} is put around plain linear layers, not those of --quantize_base; {out}",
        ),
        (
            not is_full and config.optim.use_ema,
            f"--use_ema would average ranks that --adapter {name} has taken with those that it has left; {out}",
        ),
        (
            config.optim.optimizer == "lora-pro",
            f"--optimizer lora-pro is made for A and B of a LoRA, which --adapter {name} does not have; {out}",
        ),
        (
            is_full and (adapter.lora_alpha is not None or adapter.lora_dropout > 0),
            f"--adapter {name} has neither the scale of --lora_alpha nor the A of --lora_dropout; leave them out",
        ),
        (
            is_full and config.optim.lora_plus_ratio is not None,
            f"--lora_plus_ratio is made for A and B of a LoRA, which --adapter {name} does not have; {out}",
        ),
    )


def _of_lora_pro(config: Sections) -> tuple[tuple[object, str], ...]:
    """What LoRA-Pro's fit to the gradient of W does not go with, and why."""
    if config.optim.optimizer != "lora-pro":
        return ()
    method = config.perturb.method
    return (
        (
            "lora-pro" in METHODS[method].excludes,
            f"--optimizer lora-pro needs gradients taken at the A and B that it moves, and --method {method} moves "
            "them in between; use another of the two",
        ),
        (
            config.optim.lora_plus_ratio is not None,
            "--lora_plus_ratio would undo by its faster B what --optimizer lora-pro fits; leave one out",
        ),
    )


def _of_data_and_objective(config: Sections) -> Iterable[tuple[object, str]]:
    """Whether `config` has what cannot be together, and the sentence that names both, for each such pair."""
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
            config.adapter.train_text_encoder and config.tokens.train_text_encoder_ti,
            "--train_text_encoder and --train_text_encoder_ti train the same encoders; leave one out",
        ),
        (
            data.with_prior_preservation and not (data.class_data_dir and data.class_prompt),
            "--with_prior_preservation needs --class_data_dir and --class_prompt",
        ),
        *_of_folds(config),
        *_of_members(config),
        *_of_weightings(config),
        *_of_prior_from_base(config),
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


def _of_members(config: Sections) -> Iterable[tuple[object, str]]:
    average, adapter = config.average, config.adapter
    if average.members is None:
        return (
            (
                average.average_rank is not None,
                "--average_rank is of the average of --members; give how many, such as 3",
            ),
            (average.remove_members, "--remove_members is for a run with --members; give how many, such as 3"),
        )
    return (
        (
            adapter.use_dora or adapter.adapter == "full",
            "--members averages plain LoRAs, exactly; leave --use_dora and --adapter full out, or give --members None",
        ),
        (
            config.tokens.train_text_encoder_ti,
            "--members trains no new tokens; leave --train_text_encoder_ti out, or train runs one by one and use "
            "`flatlora average`, which averages theirs",
        ),
        (config.data.holdout_folds, "--members and --holdout_folds both train several runs; leave one out"),
    )


def _of_folds(config: Sections) -> Iterable[tuple[object, str]]:
    data, steps, each = config.data, config.optim.max_train_steps, config.run.checkpointing_steps
    if not data.holdout_folds:
        return ()
    return (
        (data.holdout_folds == 1, "--holdout_folds 1 would leave nothing to train on; give 2 or more"),
        (
            data.holdout_images or data.holdout_patience,
            "--holdout_folds holds out each image in turn, over all steps; leave --holdout_images and "
            "--holdout_patience out",
        ),
        (steps is None, "--holdout_folds needs --max_train_steps: an epoch of fewer images has fewer steps"),
        (
            steps is not None and each >= steps,
            f"--holdout_folds chooses among checkpoints, and checkpointing_steps={each} makes none before the end of "
            f"{steps} steps; give fewer, such as a tenth of them",
        ),
    )


def _of_weightings(config: Sections) -> Iterable[tuple[object, str]]:
    objective = config.objective
    return (
        (
            objective.snr_gamma is not None and objective.do_edm_style_training,
            "--snr_gamma weights another objective than --do_edm_style_training; leave one out",
        ),
        (
            objective.debiased_estimation and objective.do_edm_style_training,
            "--debiased_estimation weights another objective than --do_edm_style_training; leave one out",
        ),
        (
            objective.debiased_estimation and objective.snr_gamma is not None,
            "--debiased_estimation and --snr_gamma both weight the timesteps; leave one out",
        ),
    )


def _of_prior_from_base(config: Sections) -> Iterable[tuple[object, str]]:
    if not config.objective.prior_from_base:
        return ()
    data, tokens = config.data, config.tokens
    prompt = data.class_prompt or ""
    return (
        (
            data.with_prior_preservation,
            "--prior_from_base does without the class images of --with_prior_preservation; leave one out",
        ),
        (
            not prompt.strip(),
            "--prior_from_base needs --class_prompt: a prompt without the trigger, such as that of the class",
        ),
        (
            prompt == data.instance_prompt,
            f"--prior_from_base would keep the LoRA from learning, since class_prompt={prompt!r} is the "
            "--instance_prompt; leave the trigger out of it",
        ),
        (
            tokens.train_text_encoder_ti and any(word in prompt for word in tokens.placeholders),
            f"--prior_from_base would keep new tokens from being learned, since class_prompt={prompt!r} has one of "
            f"--token_abstraction ({', '.join(tokens.placeholders)}); leave it out of the prompt",
        ),
    )
