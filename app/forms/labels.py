"""What the form calls the settings: their names in words, but where the field or this page has a better term."""

from __future__ import annotations

import re

from flatlora_diffusion.config import TrainConfig

# The app sets these itself: the folder, what to resume, the method (which may be both); a token is never saved.
DECIDED_BY_THE_APP = ("output_dir", "resume_from_checkpoint", "method", "hub_token", "local_rank")
_WORDS = {
    "adam": "Adam",
    "blora": "B-LoRA",
    "clip": "CLIP",
    "dir": "folder",
    "dora": "DoRA",
    "edm": "EDM",
    "ema": "EMA",
    "frac": "fraction",
    "hub": "Hub",
    "id": "ID",
    "kohya": "Kohya",
    "lora": "LoRA",
    "lr": "LR",
    "num": "number of",
    "rslora": "rsLoRA",
    "snr": "SNR",
    "tf32": "TF32",
    "unet": "UNet",
}
_TERMS = {
    "pretrained_model_name_or_path": "Base model",
    "pretrained_vae_model_name_or_path": "VAE",
    "variant": "Weight variant",
    "enable_xformers_memory_efficient_attention": "xFormers attention",
    "instance_data_dir": "Image folder in place of the upload",
    "dataset_name": "Hugging Face dataset in place of the upload",
    "dataset_config": "Dataset file in place of the upload",
    "cache_dir": "Dataset cache folder",
    "with_prior_preservation": "Prior preservation",
    "sample_batch_size": "Batch size of class images",
    "dataloader_num_workers": "Data loader workers",
    "pissa_iterations": "PiSSA iterations",
    "lora_ga_steps": "LoRA-GA steps",
    "init_lora": "Initial LoRA file",
    "train_text_encoder_ti": "Textual inversion (pivotal tuning)",
    "train_text_encoder_ti_frac": "Textual inversion fraction",
    "snr_gamma": "Min-SNR gamma",
    "ip_noise_gamma": "Input perturbation gamma",
    "do_edm_style_training": "EDM-style training",
    "sigma": "Flat-LoRA sigma",
    "rho": "SAM rho",
    "rho_rise": "SAM rho by loss increase",
    "bar_strength": "BAR strength",
    "perturb_seed": "Noise seed",
    "perturb_noise": "Noise scaling",
    "perturb_draw": "Noise sampling",
    "perturb_norm_every": "Steps between norm updates",
    "perturb_per": "Noise sampled per",
    "train_batch_size": "Batch size",
    "num_train_epochs": "Epochs",
    "max_train_steps": "Steps",
    "max_train_seconds": "Time limit in seconds",
    "lora_plus_ratio": "LoRA+ learning rate ratio",
    "lr_num_cycles": "LR cycles",
    "use_8bit_adam": "8-bit Adam",
    "adam_weight_decay_text_encoder": "Text encoder weight decay",
    "prodigy_use_bias_correction": "Prodigy bias correction",
    "max_grad_norm": "Max gradient norm",
    "checkpointing_steps": "Steps between checkpoints",
    "checkpoints_total_limit": "Checkpoints to keep",
    "validation_prompt": "Preview prompts",
    "validation_prompts_file": "Preview prompts file",
    "num_validation_images": "Images per preview prompt",
    "validation_epochs": "Epochs between previews",
    "image_loss_draws": "Draws of the loss by image",
    "report_to": "Tracker",
    "selfcheck": "Self-check",
}

# Hints for the fields in front; each other field has the setting's own help.
HINTS = {
    "rank": "how much the LoRA can learn: a higher rank captures more detail and makes a larger file",
    "max_train_steps": "each step trains on one batch; too many steps overfit",
    "learning_rate": "how far each step goes: too high ruins the style, too low does not learn it",
    "train_batch_size": "images per batch: larger is steadier and needs more memory",
    "validation_prompt": "one prompt per line; previews are drawn before, during and after the training",
}


def _label(name: str) -> str:
    words = " ".join(_WORDS.get(word, word) for word in name.removeprefix("use_").split("_"))
    return words if words in _WORDS.values() else words[:1].upper() + words[1:]


LABELS = {name: _TERMS.get(name) or _label(name) for name in TrainConfig().to_dict() if name not in DECIDED_BY_THE_APP}
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


def with_labels(text: str) -> str:
    """`text` with flags and names of settings replaced by their labels in the form."""

    def label(found: re.Match[str]) -> str:
        if found["set"]:
            return f"{_NAMED[found['set']]} = "
        name = found["flag"] or found["bare"]
        return f"“{_NAMED[name]}”" if name else found[0]

    return _SETTING.sub(label, text)
