"""What images, captions, objective and base exclude, and what to say of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flatlora_diffusion.config.train import TrainConfig


def exclusions(config: TrainConfig) -> Iterable[tuple[object, str]]:
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


def _of_members(config: TrainConfig) -> Iterable[tuple[object, str]]:
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
            adapter.is_dora or adapter.adapter == "full",
            "--members averages plain LoRAs, exactly; leave --use_dora and --adapter full out, or give --members None",
        ),
        (
            config.tokens.train_text_encoder_ti,
            "--members trains no new tokens; leave --train_text_encoder_ti out, or train runs one by one and use "
            "`flatlora average`, which averages theirs",
        ),
        (config.data.holdout_folds, "--members and --holdout_folds both train several runs; leave one out"),
    )


def _of_folds(config: TrainConfig) -> Iterable[tuple[object, str]]:
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


def _of_weightings(config: TrainConfig) -> Iterable[tuple[object, str]]:
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


def _of_prior_from_base(config: TrainConfig) -> Iterable[tuple[object, str]]:
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
