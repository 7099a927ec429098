"""What the settings are called on the page, and what they do, in words of somebody who draws.

A setting that is not named here keeps its own help; each has a label.
"""

from __future__ import annotations

import re

from flatlora_diffusion.config import DEFAULT_SIGMA
from flatlora_diffusion.config.perturb import IN_FORCE

# Beside LoRA, Flat-LoRA and the pair of both, each in a sentence.
OTHER_METHODS = {
    "sam": "learns from the worst place near the base's weights, at twice the time; better at unknown things alone",
    "mixed-noise": "learns in each step with Flat-LoRA's noise and without it, at twice the time",
    "factor-noise": "has its noise on the two halves of the LoRA, A and B, in place of the base",
    "lora-sam": "learns from the worst place near the LoRA's own weights, at twice the time",
    "bi-lora": "trains against a second LoRA that makes the task harder and is dropped at the end",
    "nbar": "keeps the two halves of the LoRA in balance, by how strongly each is pulled",
    "obar": "keeps the two halves of the LoRA in balance, by how large each is",
}

LABELS = {
    "pretrained_model_name_or_path": "Base model",
    "pretrained_vae_model_name_or_path": "Another VAE",
    "revision": "Revision of the base",
    "variant": "Weight variant of the base",
    "single_file_config": "Configs for a single-file base",
    "prediction_type": "What the base predicts",
    "zero_terminal_snr": "Last timestep is pure noise",
    "clip_skip": "CLIP skip",
    "quantize_base": "Load the base in fewer bits",
    "offload": "Keep text encoders and VAE off the GPU",
    "enable_xformers_memory_efficient_attention": "Attention by xformers",
    "allow_tf32": "Fast TF32 arithmetic",
    "instance_data_dir": "Image folder in place of the upload",
    "dataset_config": "Data set file with several folders in place of the upload",
    "dataset_name": "Hugging Face data set in place of the upload",
    "dataset_config_name": "Configuration of the data set",
    "cache_dir": "Where data sets are kept",
    "image_column": "Column with the images",
    "caption_column": "Column with the captions",
    "instance_prompt": "Prompt for images without a caption",
    "repeats": "Repeats of each image",
    "with_prior_preservation": "Keep the look of the class (prior preservation)",
    "class_data_dir": "Folder of class images",
    "class_prompt": "Prompt of the class images",
    "num_class_images": "Number of class images",
    "sample_batch_size": "Class images drawn at once",
    "prior_generation_precision": "Precision of drawing class images",
    "resolution": "Size in pixels",
    "use_aspect_ratio_buckets": "Keep the shapes of the images (aspect-ratio buckets)",
    "center_crop": "Crop at the centre",
    "random_flip": "Mirror images at random",
    "image_interpolation_mode": "Filter for resizing",
    "background_color": "Background of transparent images",
    "holdout_images": "Images kept aside to stop in time",
    "holdout_patience": "Stop after checkpoints without a gain",
    "holdout_folds": "Folds that find the number of steps",
    "shuffle_tags": "Shuffle the tags of captions",
    "keep_tags": "First tags that stay",
    "tag_dropout": "Share of tags left out",
    "caption_dropout": "Share trained without a caption",
    "cache_latents": "Encode each image only once",
    "cache_text_embeddings": "Keep encoded captions for later runs",
    "embedding_cache_dir": "Where encoded captions are kept",
    "dataloader_num_workers": "Threads that load images",
    "adapter": "Kind of LoRA",
    "pissa_iterations": "PiSSA: rounds of its start",
    "lora_ga_steps": "LoRA-GA: steps that its start looks at",
    "rank": "Rank",
    "lora_alpha": "Alpha",
    "lora_dropout": "Dropout",
    "use_dora": "DoRA",
    "use_rslora": "Rank-stabilized scale (rsLoRA)",
    "lora_target_modules": "Trained layers",
    "lora_unet_blocks": "Trained blocks",
    "use_blora": "B-LoRA",
    "lora_block_ranks": "Other ranks for some blocks",
    "train_text_encoder": "Train the text encoders too",
    "init_lora": "Go on from a LoRA file",
    "lora_init_seed": "Seed of the first weights",
    "token_abstraction": "Words that stand for new tokens",
    "num_new_tokens_per_abstraction": "New tokens for each word",
    "train_text_encoder_ti": "Train new tokens (pivotal tuning)",
    "train_text_encoder_ti_frac": "Share of the run that trains new tokens",
    "train_text_encoder_frac": "Share of the run that trains the text encoders",
    "loss_type": "Kind of loss",
    "snr_gamma": "Min-SNR weighting",
    "debiased_estimation": "Debiased weighting",
    "noise_offset": "Noise offset",
    "multires_noise_iterations": "Coarser sizes of noise",
    "multires_noise_discount": "Weight of each coarser noise",
    "ip_noise_gamma": "More noise in what is seen",
    "min_timestep": "First timestep",
    "max_timestep": "Last timestep",
    "do_edm_style_training": "EDM training",
    "prior_from_base": "Keep the look of the class without class images",
    "prior_loss_weight": "Weight of keeping the class",
    "alpha_mask_loss": "Learn only what is not transparent",
    "sigma": "Sigma (noise of Flat-LoRA)",
    "sigma_rise": "Sigma by the loss's rise",
    "sigma_schedule": "How sigma grows",
    "sigma_ramp_steps": "Steps in which sigma grows",
    "noise_share": "Mixed noise: share with noise",
    "rho": "Radius of the search for the worst",
    "rho_rise": "That radius by the loss's rise",
    "bar_strength": "BAR: strength of balancing",
    "perturb_seed": "Seed of the noise",
    "perturb_noise": "Kind of noise",
    "perturb_draw": "How the noise is drawn",
    "perturb_norm_every": "Steps between measurements of the weights",
    "perturb_per": "When the noise is drawn anew",
    "train_batch_size": "Batch size",
    "gradient_accumulation_steps": "Batches for each step",
    "num_train_epochs": "Passes over the images",
    "max_train_steps": "Steps",
    "max_train_seconds": "Longest time in seconds",
    "learning_rate": "Learning rate",
    "text_encoder_lr": "Learning rate of the text encoders",
    "lora_plus_ratio": "LoRA+: how much faster B learns",
    "scale_lr": "Scale the learning rate with the batch",
    "lr_scheduler": "How the learning rate changes",
    "lr_warmup_steps": "Warm-up steps",
    "lr_num_cycles": "Restarts of the schedule",
    "lr_power": "Power of the schedule",
    "optimizer": "Optimizer",
    "use_8bit_adam": "AdamW in 8 bits",
    "adam_beta1": "First beta of the optimizer",
    "adam_beta2": "Second beta of the optimizer",
    "adam_weight_decay": "Weight decay",
    "delta_weight_decay": "Hold down the change of the weights",
    "adam_weight_decay_text_encoder": "Weight decay of the text encoders",
    "adam_epsilon": "Smallest divisor of the optimizer",
    "prodigy_beta3": "Prodigy: average of the step size",
    "prodigy_decouple": "Prodigy: decoupled weight decay",
    "prodigy_use_bias_correction": "Prodigy: bias correction",
    "prodigy_safeguard_warmup": "Prodigy: careful warm-up",
    "max_grad_norm": "Longest gradient",
    "use_ema": "Save an average of the LoRA over the steps (EMA)",
    "ema_decay": "Decay of that average",
    "members": "LoRAs to train and average",
    "average_rank": "Rank of their average",
    "remove_members": "Keep their average only",
    "gradient_checkpointing": "Save memory by computing twice",
    "mixed_precision": "Precision of computing",
    "base_dtype": "Precision of the base",
    "deterministic": "Exactly repeatable on a GPU",
    "output_name": "Name of the LoRA file",
    "output_kohya_format": "Second copy of the file for other tools",
    "save_dtype": "Precision of the LoRA file",
    "seed": "Seed",
    "checkpointing_steps": "Steps between checkpoints",
    "checkpoints_total_limit": "Checkpoints to keep",
    "validation_prompt": "Preview prompts",
    "validation_prompts_file": "File of preview prompts",
    "num_validation_images": "Pictures of each preview prompt",
    "validation_epochs": "Passes between previews",
    "validation_data_dir": "Folder of images to test on",
    "report_to": "Log to",
    "logging_dir": "Folder of the log",
    "selfcheck": "Check the first steps",
    "push_to_hub": "Upload to the Hugging Face hub",
    "hub_model_id": "Repository to upload to",
}

# In place of the settings' own help, where that is for somebody at a command line.
HELP = {
    "adapter": "lora; rslora and dora as below; pissa and lora-ga start at the largest directions of the base or of "
    "the first gradients, and make a file of twice the rank; adalora gives the layers that need it more of the rank; "
    "full trains all weights of the layers, which takes far more memory",
    "noise_share": "how much of each step is learned with noise, the rest without; left empty: half",
    "rho": "how far SAM, LoRA-SAM and Bi-LoRA look for the worst place around the weights; left empty: for "
    "SAM by the rise below, for the others what is usual",
    "optimizer": "adamw, prodigy or adafactor; lora-pro is adamw with steps that come nearer to training all weights",
    "lora_plus_ratio": "B learns so many times as fast as A; 16 is usual; left empty: alike",
    "pretrained_model_name_or_path": "an SDXL model: a folder, a name on the Hugging Face hub, a .safetensors file, "
    "or tiny: the demo base of 64 pixels that ships with this program",
    "cache_text_embeddings": "in memory they are kept in any case",
    "rank": "how much the LoRA can hold: more learns more detail and makes a larger file",
    "lora_alpha": "strength of the LoRA, as a multiple of its rank; left empty: the rank",
    "lora_init_seed": "left empty: the seed of the run",
    "use_rslora": "keeps high ranks from becoming too weak",
    "delta_weight_decay": "how strongly what is learned is kept small as a whole; 0: not at all",
    "lora_dropout": "share of the LoRA that rests in each step",
    "perturb_seed": "of Flat-LoRA's noise alone; left empty: the seed of the run",
    "perturb_noise": "filter: in proportion to each filter of the base, as in the paper; iid: spread evenly",
    "perturb_draw": "low_rank: as strong as in the paper, of far fewer numbers, in less time; full: each by itself, "
    "as in the paper; philox: likewise, faster on a GPU",
    "perturb_norm_every": "the noise is in proportion to the weights, which are measured anew every so many steps",
    "perturb_per": "for each batch, once for each step as in the paper, or for each image, with low_rank above",
    "sigma": f"how strong the noise is that Flat-LoRA trains against; left empty: {DEFAULT_SIGMA}",
    "sigma_rise": "where sigma is left empty: the share by which the noise is to lift the loss, such as 0.02; the "
    "sigma that does so on this base is found before the first step",
    "rho_rise": "for SAM, where the radius is left empty: the share by which the worst place is to lift the loss; the "
    f"radius that does so on this base is found before the first step; left empty: {IN_FORCE['rho_rise']['sam']:g}",
    "sigma_schedule": "over the run: constant, rising from nothing, or falling to nothing",
    "sigma_ramp_steps": "left empty: all steps, or those of the finished run that is trained longer",
    "holdout_images": "so many are not trained on: the result is the checkpoint that knows them best",
    "holdout_patience": "stop after so many checkpoints in a row that know the images kept aside no better; 0: never",
    "holdout_folds": "for few images: so many runs, each without another part of the images, find how many steps are "
    "best; then all images are trained on for so many",
    "multires_noise_discount": "each coarser noise counts so much as the one before",
    "members": "so many, each with a seed of its own, one after the other; left empty: one LoRA, which is no average",
    "average_rank": "left empty: the sum of their ranks, which is exact, in a file that much larger",
    "remove_members": "the averaged LoRAs are removed at the end",
    "max_train_steps": "one step looks at one batch; more steps learn more, and in the end by heart",
    "num_train_epochs": "only if Steps is empty",
    "learning_rate": "how far each step goes: too high spoils the style, too low does not learn it",
    "text_encoder_lr": "not for prodigy, which has one for all",
    "train_batch_size": "images in one batch: more is steadier and needs more memory",
    "base_dtype": "left empty: as it is computed in; fp32 is more exact and needs twice the memory",
    "output_name": "left empty: the name of the run",
    "use_8bit_adam": "needs less memory; from the package bitsandbytes",
    "num_validation_images": "more than one: of several seeds",
    "validation_prompt": "one a line; each is drawn before the training, on its way and at the end",
    "validation_prompts_file": "one preview for each line of a JSON Lines file",
    "validation_epochs": "previews are also drawn at the start and at the end",
    "gradient_checkpointing": "slower; try it when the GPU runs out of memory",
    "snr_gamma": "weighs easy and hard noise levels alike; 5 is usual, left empty it is off",
    "debiased_estimation": "weighs noisy and clean levels so that large shapes are not neglected; not with Min-SNR",
    "prior_from_base": "the LoRA is held to what the base itself makes of the prompt of the class; needs about the "
    "memory of twice the batch size",
    "prior_loss_weight": "how much it counts, with class images or without",
    "repeats": "in one pass over all images",
    "use_aspect_ratio_buckets": "without it every image is cropped to a square",
    "report_to": "tensorboard, wandb, comet_ml, all, or none",
    "hub_model_id": "left empty: the name of the run",
    "seed": "the same number gives the same training; left empty: a new one",
    "adam_epsilon": "usually left as it is",
    "do_edm_style_training": "switched on by itself for a base that needs it",
    "use_dora": "trains how strong each row is apart from where it points",
    "use_blora": "trains only the two blocks that hold content and style",
    "prodigy_beta3": "left empty: from the second beta",
    "output_kohya_format": "as diffusers names it; a file for other tools is written in any case",
}

_NAMED = LABELS | {"method": "Train"}
_NAMES = sorted(_NAMED, key=len, reverse=True)
_ANY, _UNLIKE_WORDS = "|".join(_NAMES), "|".join(name for name in _NAMES if "_" in name)
# What stands in quotes is the user's.
_SETTING = re.compile(
    r"(?<!\w)'(?:[^'\\]|\\.)*'"
    rf"|--(?P<flag>{_ANY})(?![\w-])"
    rf"|\b(?P<set>{_ANY})=(?=\S)"
    rf"|(?<![\w-])(?P<bare>{_UNLIKE_WORDS})(?!\w)"
)


def in_form_words(text: str) -> str:
    """What is told of settings, with their labels in the form for their flags and names."""

    def worded(found: re.Match[str]) -> str:
        if found["set"]:
            return f"{_NAMED[found['set']]} = "
        name = found["flag"] or found["bare"]
        return f"“{_NAMED[name]}”" if name else found[0]

    return _SETTING.sub(worded, text)
