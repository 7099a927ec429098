"""The settings of the training objective and of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flatlora_diffusion.config.setting import Section, setting

MixedPrecision = Literal["no", "fp16", "bf16"]
LossType = Literal["l2", "huber"]
WeightingScheme = Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"]
Optimizer = Literal["adamw", "prodigy", "adafactor", "lora-pro"]
LrScheduler = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


@dataclass(frozen=True)
class ObjectiveConfig(Section):
    """Loss, timesteps and noise."""

    loss_type: LossType = setting("l2", "loss: l2 (mean squared error) or huber")
    snr_gamma: float | None = setting(None, "gamma of min-SNR loss weighting (arXiv:2303.09556), usually 5", min=1e-6)
    debiased_estimation: bool = setting(
        False,
        "debiased estimation: weight the loss by 1/sqrt(SNR) (arXiv:2310.08442), for v-prediction by 1/(SNR + 1)",
    )
    noise_offset: float = setting(0.0, "noise offset; 0.05 to 0.1 for very dark or bright images", affects="draws")
    multires_noise_iterations: int = setting(
        0,
        "multires (pyramid) noise: number of lower resolutions of the noise",
        min=0,
        max=10,
        affects="draws",
    )
    multires_noise_discount: float = setting(
        0.3,
        "multires (pyramid) noise discount: weight of each lower resolution relative to the one above",
        min=0,
        max=1,
        affects="draws",
    )
    ip_noise_gamma: float = setting(
        0.0,
        "input perturbation noise (arXiv:2301.11706), usually 0.1",
        min=0,
        max=1,
        affects="draws",
    )
    min_timestep: int = setting(0, "lowest timestep to train on", min=0, affects="draws")
    max_timestep: int | None = setting(
        None,
        "highest timestep to train on; default: last timestep of the base",
        min=0,
        affects="draws",
    )
    weighting_scheme: WeightingScheme = setting(
        "none",
        "flow matching: distribution of the noise levels (logit_normal, mode; otherwise uniform) or weight of their "
        "losses (sigma_sqrt, cosmap)",
        affects="draws",
    )
    logit_mean: float = setting(0.0, "mean of --weighting_scheme logit_normal", affects="draws")
    logit_std: float = setting(
        1.0, "standard deviation of --weighting_scheme logit_normal", min=0.01, max=100, affects="draws"
    )
    mode_scale: float = setting(
        1.29,
        "scale of --weighting_scheme mode; above 0 more of the middle noise levels",
        min=-1,
        max=1.75,  # 2 / (pi - 2): beyond both the levels leave [0, 1] (arXiv:2403.03206)
        affects="draws",
    )
    do_edm_style_training: bool = setting(
        False, "EDM training objective (arXiv:2206.00364); automatic for a base with an EDM scheduler"
    )
    prior_from_base: bool = setting(
        False,
        "prior preservation without class images: on --class_prompt keep the prediction close to that of the base",
    )
    prior_loss_weight: float = setting(1.0, "weight of the prior preservation loss", min=0)
    alpha_mask_loss: bool = setting(
        False,
        "masked loss: exclude pixels that are transparent or masked by NAME-masklabel.png",
        affects="draws",
    )


@dataclass(frozen=True)
class OptimConfig(Section):
    """Steps, optimizer and precision."""

    train_batch_size: int = setting(4, "batch size per device", min=1, max=4096, affects="draws")
    gradient_accumulation_steps: int = setting(
        1, "gradient accumulation steps: micro-batches per optimizer step", min=1, max=4096, affects="draws"
    )
    num_train_epochs: int = setting(1, "number of epochs; ignored with --max_train_steps", min=1, free_on_resume=True)
    max_train_steps: int | None = setting(
        None,
        "number of optimizer steps; default: from --num_train_epochs",
        min=1,
        free_on_resume=True,
        is_resolved=True,
        affects="draws",
    )
    max_train_seconds: float | None = setting(
        None,
        "time limit in seconds: save a checkpoint and stop; the run can be resumed",
        min=1,
        free_on_resume=True,
    )
    learning_rate: float = setting(
        1e-4, "learning rate of the LoRA of the UNet or transformer", min=0, max=10, retryable=True
    )
    text_encoder_lr: float = setting(
        5e-6, "learning rate of the text encoders; prodigy uses --learning_rate", min=0, max=10, retryable=True
    )
    lora_plus_ratio: float | None = setting(
        None,
        "LoRA+ ratio: learning rate of B divided by that of A (arXiv:2402.12354), 16 in the paper; default: 1",
        min=1e-3,
        max=1e4,
        legacy_default=None,
    )
    scale_lr: bool = setting(
        False, "multiply the learning rate by batch size, gradient accumulation steps and number of processes"
    )
    lr_scheduler: LrScheduler = setting("constant", "learning rate scheduler")
    lr_warmup_steps: int = setting(500, "learning rate warmup steps; no effect with constant", min=0)
    lr_num_cycles: int = setting(1, "number of cycles of cosine_with_restarts", min=1)
    lr_power: float = setting(1.0, "power of the polynomial scheduler", min=0)
    optimizer: Optimizer = setting(
        "adamw",
        "optimizer; lora-pro is AdamW with adjusted gradients of A and B, so that W follows its own gradient as "
        "closely as possible (arXiv:2407.18242)",
    )
    use_8bit_adam: bool = setting(False, "8-bit AdamW of bitsandbytes")
    adam_beta1: float = setting(0.9, "beta1 of AdamW and prodigy", min=0, max=0.9999999)
    adam_beta2: float = setting(0.999, "beta2 of AdamW and prodigy", min=0, max=0.9999999)
    adam_weight_decay: float = setting(1e-4, "weight decay", min=0)
    adam_weight_decay_text_encoder: float = setting(1e-3, "weight decay of the text encoders", min=0)
    adam_epsilon: float = setting(1e-8, "epsilon of AdamW and prodigy", min=0)
    prodigy_beta3: float | None = setting(
        None, "prodigy: beta3, decay of the step size estimate; default: sqrt(beta2)", min=0, max=0.9999999
    )
    prodigy_decouple: bool = setting(True, "prodigy: decoupled weight decay")
    prodigy_use_bias_correction: bool = setting(True, "prodigy: bias correction of Adam")
    prodigy_safeguard_warmup: bool = setting(True, "prodigy: prevent a too large step size after warmup")
    max_grad_norm: float = setting(1.0, "max gradient norm for clipping; 0: no clipping", min=0, retryable=True)
    use_ema: bool = setting(False, "save an exponential moving average (EMA) of the LoRA weights")
    ema_decay: float = setting(0.999, "decay of the EMA", min=0, max=0.9999999)
    gradient_checkpointing: bool = setting(False, "gradient checkpointing: less memory, slower", retryable=True)
    mixed_precision: MixedPrecision | None = setting(
        None,
        "mixed precision; default: from the accelerate config; LoRA weights are always fp32",
        retryable=True,
        is_resolved=True,
        is_shared=True,
    )
    base_dtype: Literal["fp32"] | None = setting(
        None,
        "precision of the frozen base weights; default: as --mixed_precision; fp32 adds eps before rounding and takes "
        "twice the memory of the base",
        is_shared=True,
    )
    deterministic: bool = setting(False, "use deterministic kernels only: reproducible on GPU, slower")

    @property
    def precision_of_base(self) -> str:
        """Precision of the frozen weights; `no` (fp32) by default."""
        return self.base_dtype or self.mixed_precision or "no"
