"""The settings of the loss, and of the steps that lower it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flatlora_diffusion.config.setting import Section, setting

MixedPrecision = Literal["no", "fp16", "bf16"]
LossType = Literal["l2", "huber"]
Optimizer = Literal["adamw", "prodigy", "adafactor", "lora-pro"]
LrScheduler = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


@dataclass(frozen=True)
class ObjectiveConfig(Section):
    """The loss."""

    loss_type: LossType = setting("l2", "squared error, or its robust sibling huber")
    snr_gamma: float | None = setting(None, "min-SNR weighting (arXiv:2303.09556); 5 is usual", min=1e-6)
    debiased_estimation: bool = setting(
        False,
        "weight each timestep by 1/sqrt(SNR) (arXiv:2310.08442), for v-prediction by 1/(SNR + 1)",
    )
    noise_offset: float = setting(
        0.0, "noise shared by all pixels of a channel; 0.05 to 0.1 for dark or bright images", moves="draws"
    )
    multires_noise_iterations: int = setting(
        0,
        "add noise of so many coarser sizes, each half the last, so that large shapes are learned",
        min=0,
        max=10,
        moves="draws",
    )
    multires_noise_discount: float = setting(
        0.3,
        "each coarser noise of --multires_noise_iterations counts so much as the last",
        min=0,
        max=1,
        moves="draws",
    )
    ip_noise_gamma: float = setting(
        0.0,
        "more noise on what the model sees than it has to predict (arXiv:2301.11706); 0.1 is usual",
        min=0,
        max=1,
        moves="draws",
    )
    min_timestep: int = setting(
        0, "first timestep that is trained; more leaves out the least noisy", min=0, moves="draws"
    )
    max_timestep: int | None = setting(
        None,
        "last timestep that is trained; less leaves out the noisiest; default: the base's last",
        min=0,
        moves="draws",
    )
    do_edm_style_training: bool = setting(
        False, "the EDM objective (arXiv:2206.00364); switched on by itself for a base with an EDM scheduler"
    )
    prior_from_base: bool = setting(
        False,
        "keep the class without class images: hold the LoRA to the base's own prediction on --class_prompt, with the "
        "same latents and noise",
    )
    prior_loss_weight: float = setting(
        1.0, "weight of the class images' loss, or of what --prior_from_base holds", min=0
    )
    alpha_mask_loss: bool = setting(
        False,
        "count only pixels that the image's alpha channel and the mask NAME-masklabel.png beside it show, so that an "
        "icon's background is not learned",
        moves="draws",
    )


@dataclass(frozen=True)
class OptimConfig(Section):
    """Steps and optimizer."""

    train_batch_size: int = setting(4, "images per micro-batch and device", min=1, max=4096, moves="draws")
    gradient_accumulation_steps: int = setting(1, "micro-batches per optimizer step", min=1, max=4096, moves="draws")
    num_train_epochs: int = setting(
        1, "passes over the images; ignored with --max_train_steps", min=1, free_on_resume=True
    )
    max_train_steps: int | None = setting(
        None, "optimizer steps", min=1, free_on_resume=True, is_settled=True, moves="draws"
    )
    max_train_seconds: float | None = setting(
        None,
        "stop after this time as after a stop request: save, so that it can be resumed",
        min=1,
        free_on_resume=True,
    )
    learning_rate: float = setting(1e-4, "learning rate of the UNet's LoRA", min=0, max=10, is_remedy=True)
    text_encoder_lr: float = setting(
        5e-6, "learning rate of the text encoders; prodigy uses --learning_rate for all", min=0, max=10, is_remedy=True
    )
    lora_plus_ratio: float | None = setting(
        None,
        "LoRA+ (arXiv:2402.12354): B's learning rate is so many times A's, 16 in the paper; default: the same",
        min=1e-3,
        max=1e4,
        before=None,
    )
    scale_lr: bool = setting(False, "multiply the learning rate by batch, accumulation and number of processes")
    lr_scheduler: LrScheduler = setting("constant", "learning-rate schedule")
    lr_warmup_steps: int = setting(500, "warm-up steps; no effect with `constant`", min=0)
    lr_num_cycles: int = setting(1, "restarts of cosine_with_restarts", min=1)
    lr_power: float = setting(1.0, "power of polynomial", min=0)
    optimizer: Optimizer = setting(
        "adamw",
        "adamw, prodigy or adafactor, in any case; lora-pro is AdamW with the gradients of A and B that move W as "
        "nearly as they can as its own would (arXiv:2407.18242)",
    )
    use_8bit_adam: bool = setting(False, "AdamW with 8-bit state, from bitsandbytes")
    adam_beta1: float = setting(0.9, "beta1 of AdamW and prodigy", min=0, max=0.9999999)
    adam_beta2: float = setting(0.999, "beta2 of AdamW and prodigy", min=0, max=0.9999999)
    adam_weight_decay: float = setting(1e-4, "weight decay", min=0)
    adam_weight_decay_text_encoder: float = setting(1e-3, "weight decay of the text encoders", min=0)
    adam_epsilon: float = setting(1e-8, "epsilon of AdamW and prodigy", min=0)
    prodigy_beta3: float | None = setting(
        None, "prodigy's step-size average; default: sqrt(beta2)", min=0, max=0.9999999
    )
    prodigy_decouple: bool = setting(True, "prodigy: decoupled weight decay")
    prodigy_use_bias_correction: bool = setting(True, "prodigy: Adam's bias correction")
    prodigy_safeguard_warmup: bool = setting(True, "prodigy: keep warm-up from inflating the step size")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm; 0: they are not", min=0, is_remedy=True)
    use_ema: bool = setting(False, "save an exponential moving average of the LoRA")
    ema_decay: float = setting(0.999, "its decay", min=0, max=0.9999999)
    gradient_checkpointing: bool = setting(
        False, "recompute activations in backward: less memory, slower", is_remedy=True
    )
    mixed_precision: MixedPrecision | None = setting(
        None,
        "compute precision; default: accelerate's own setting; the LoRA's weights stay fp32 in any case",
        is_remedy=True,
        is_settled=True,
        is_shared=True,
    )
    base_dtype: Literal["fp32"] | None = setting(
        None,
        "precision of the frozen base's weights; default: that of --mixed_precision. fp32 adds eps before they are "
        "rounded to it, at twice their memory",
        is_shared=True,
    )
    deterministic: bool = setting(False, "only deterministic kernels: repeatable on a GPU too, slower")

    @property
    def precision_of_base(self) -> str:
        """That of the frozen weights; `no` where neither setting says it."""
        return self.base_dtype or self.mixed_precision or "no"
