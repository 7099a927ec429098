"""Checks for settings that exclude each other; each error message names both."""

from __future__ import annotations

from collections.abc import Iterable

from flatlora_diffusion.config.adapter import ADAPTERS, adapters_with
from flatlora_diffusion.config.methods import METHODS
from flatlora_diffusion.config.sections import Sections
from flatlora_diffusion.config.setting import ConfigError

REMOVE = "remove one of them"
Check = tuple[object, str]  # truthy for a conflict, and its message


def check_combinations(config: Sections) -> None:
    """Raise ConfigError for the first settings that exclude each other."""
    for is_conflict, message in (*_data_and_objective(config), *_methods_and_adapters(config)):
        if is_conflict:
            raise ConfigError(message)


def _methods_and_adapters(config: Sections) -> tuple[Check, ...]:
    adapter, perturb, optim = config.adapter, config.perturb, config.optim
    name, row, method = adapter.adapter, ADAPTERS[adapter.adapter], METHODS[perturb.method]
    return (
        *_adapters_without_factors(config),
        *_lora_pro(config),
        (
            name in method.excludes,
            f"--method {perturb.method} needs the matrices A and B of a LoRA, which --adapter {name} does not have; "
            "change one of them",
        ),
        (
            optim.use_8bit_adam and optim.optimizer != "adamw",
            f"--use_8bit_adam needs --optimizer adamw, not {optim.optimizer}; change one of them",
        ),
        (
            row.has_nonzero_start and adapter.use_dora,
            f"--adapter {name} has a nonzero start, which --use_dora does not support; {REMOVE}",
        ),
        (
            row.has_nonzero_start and adapter.init_lora is not None,
            f"--adapter {name} and --init_lora both initialize the weights; {REMOVE}",
        ),
        (
            row.is_linear_only and adapter.lora_target_modules == "conv",
            f"--adapter {name} supports linear layers only, not --lora_target_modules conv; use all-linear or another "
            "adapter",
        ),
        *(
            (
                getattr(adapter, setting) is not None and name not in adapters_with(setting),
                f"--{setting} has no effect with --adapter {name}; remove it or use --adapter "
                f"{' or '.join(adapters_with(setting))}",
            )
            for setting in ("pissa_iterations", "lora_ga_steps")
        ),
        (
            adapter.use_dora and adapter.lora_dropout > 0 and method.adds_to_weights,
            f"--lora_dropout with --use_dora does not rescale the perturbation of --method {perturb.method}; set "
            "--lora_dropout 0",
        ),
        (
            config.objective.prior_from_base and (row.has_nonzero_start or not method.allows_prior_from_base),
            "--prior_from_base needs --method lora or flat-lora and an --adapter that starts at the base, not "
            f"{perturb.method} with {name}; remove it",
        ),
        (
            optim.lora_plus_ratio is not None and optim.optimizer == "prodigy",
            f"--lora_plus_ratio needs two learning rates, and --optimizer prodigy has only one; {REMOVE}",
        ),
    )


def _adapters_without_factors(config: Sections) -> tuple[Check, ...]:
    adapter, name = config.adapter, config.adapter.adapter
    if ADAPTERS[name].is_lora:
        return ()
    is_full = name == "full"
    return (
        (
            adapter.use_dora or adapter.use_rslora,
            f"--adapter {name} does not support --use_dora and --use_rslora; {REMOVE}",
        ),
        (adapter.init_lora is not None, f"--adapter {name} cannot start from the LoRA of --init_lora; {REMOVE}"),
        (
            adapter.lora_block_ranks is not None,
            f"--adapter {name} has the same --rank in all layers and does not support --lora_block_ranks; {REMOVE}",
        ),
        (adapter.train_text_encoder, f"--adapter {name} does not support --train_text_encoder; {REMOVE}"),
        (
            config.model.quantize_base is not None,
            f"--adapter {name} does not support the layers of --quantize_base; {REMOVE}",
        ),
        (
            not is_full and config.optim.use_ema,
            f"--use_ema cannot average the weights of --adapter {name}, which prunes ranks; {REMOVE}",
        ),
        (
            config.optim.optimizer == "lora-pro",
            f"--optimizer lora-pro needs the matrices A and B of a LoRA, which --adapter {name} does not have; "
            f"{REMOVE}",
        ),
        (
            is_full and (adapter.lora_alpha is not None or adapter.lora_dropout > 0),
            f"--adapter {name} does not support --lora_alpha and --lora_dropout; remove them",
        ),
        (
            is_full and config.optim.lora_plus_ratio is not None,
            f"--lora_plus_ratio needs the matrices A and B of a LoRA, which --adapter {name} does not have; {REMOVE}",
        ),
    )


def _lora_pro(config: Sections) -> tuple[Check, ...]:
    if config.optim.optimizer != "lora-pro":
        return ()
    method = config.perturb.method
    return (
        (
            "lora-pro" in METHODS[method].excludes,
            f"--optimizer lora-pro needs gradients at the current A and B, but --method {method} changes A and B "
            "before the update; change one of them",
        ),
        (
            config.optim.lora_plus_ratio is not None,
            f"--lora_plus_ratio conflicts with the adjusted gradients of --optimizer lora-pro; {REMOVE}",
        ),
    )


def _data_and_objective(config: Sections) -> Iterable[Check]:
    data, objective = config.data, config.objective
    return (
        (
            sum(map(bool, (data.instance_data_dir, data.dataset_name, data.dataset_config))) > 1,
            "--instance_data_dir, --dataset_name and --dataset_config exclude each other; give only one of them",
        ),
        (
            data.cache_text_embeddings and data.draws_captions,
            "--cache_text_embeddings cannot cache captions that --shuffle_tags and --tag_dropout change; remove it, "
            "or both of them",
        ),
        (
            data.keep_tags and not data.draws_captions,
            "--keep_tags needs --shuffle_tags or --tag_dropout; add one of them or remove --keep_tags",
        ),
        (
            config.adapter.train_text_encoder and config.tokens.train_text_encoder_ti,
            f"--train_text_encoder and --train_text_encoder_ti exclude each other; {REMOVE}",
        ),
        (
            data.with_prior_preservation and not (data.class_data_dir and data.class_prompt),
            "--with_prior_preservation needs --class_data_dir and --class_prompt",
        ),
        *_members(config),
        *_weightings(config),
        *_prior_from_base(config),
        (
            config.model.zero_terminal_snr and config.model.prediction_type == "epsilon",
            "--zero_terminal_snr needs --prediction_type v_prediction, not epsilon; change one of them",
        ),
        (
            config.model.zero_terminal_snr and objective.do_edm_style_training,
            f"--zero_terminal_snr does not support --do_edm_style_training; {REMOVE}",
        ),
        (
            config.optim.base_dtype is not None and config.model.quantize_base is not None,
            f"--base_dtype fp32 excludes --quantize_base; {REMOVE}",
        ),
        (
            data.holdout_patience and not data.holdout_images,
            "--holdout_patience needs --holdout_images; add a number of images, such as 3",
        ),
        (
            data.cache_text_embeddings and config.trains_text,
            "--cache_text_embeddings needs frozen text encoders; remove it, or --train_text_encoder and "
            "--train_text_encoder_ti",
        ),
    )


def _members(config: Sections) -> Iterable[Check]:
    average, adapter = config.average, config.adapter
    if average.members is None:
        return (
            (
                average.average_rank is not None,
                "--average_rank needs --members; add a number of members, such as 3",
            ),
            (average.remove_members, "--remove_members needs --members; add a number of members, such as 3"),
        )
    return (
        (
            adapter.use_dora or adapter.adapter == "full",
            "--members cannot average --use_dora and --adapter full; remove them, or give --members None",
        ),
        (
            config.tokens.train_text_encoder_ti,
            "--members does not support --train_text_encoder_ti; remove one of them, or train separate runs and use "
            "`flatlora average`",
        ),
    )


def _weightings(config: Sections) -> Iterable[Check]:
    objective = config.objective
    return (
        (
            objective.snr_gamma is not None and objective.do_edm_style_training,
            f"--snr_gamma does not apply to --do_edm_style_training; {REMOVE}",
        ),
        (
            objective.debiased_estimation and objective.do_edm_style_training,
            f"--debiased_estimation does not apply to --do_edm_style_training; {REMOVE}",
        ),
        (
            objective.debiased_estimation and objective.snr_gamma is not None,
            f"--debiased_estimation and --snr_gamma exclude each other; {REMOVE}",
        ),
    )


def _prior_from_base(config: Sections) -> Iterable[Check]:
    if not config.objective.prior_from_base:
        return ()
    data, tokens = config.data, config.tokens
    prompt = data.class_prompt or ""
    return (
        (
            data.with_prior_preservation,
            f"--prior_from_base excludes --with_prior_preservation; {REMOVE}",
        ),
        (
            not prompt.strip(),
            "--prior_from_base needs --class_prompt, a prompt without the trigger word; add it",
        ),
        (
            prompt == data.instance_prompt,
            f"--prior_from_base needs a --class_prompt other than --instance_prompt, not {prompt!r}; remove the "
            "trigger word from it",
        ),
        (
            tokens.train_text_encoder_ti and any(word in prompt for word in tokens.placeholders),
            f"--prior_from_base needs a --class_prompt without the words of --token_abstraction "
            f"({', '.join(tokens.placeholders)}), not {prompt!r}; remove them from it",
        ),
    )
