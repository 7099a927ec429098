"""Every setting of a training, once: default, bounds, help.

The command line, config.json and the app's form come from here.

Names and defaults are those of diffusers' `train_dreambooth_lora_sdxl.py` wherever that script has the setting.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from flatlora_diffusion.config.combinations import check_combinations
from flatlora_diffusion.config.methods import PerturbConfig
from flatlora_diffusion.config.section import SAMPLES, ConfigError, Section, Traits, _kinds, setting

AdapterKind = Literal["lora", "rslora", "dora", "pissa", "lora-ga", "adalora", "full"]
_PISSA_ITERATIONS, _LORA_GA_STEPS = 4, 8
MixedPrecision = Literal["no", "fp16", "bf16"]
Precision = Literal["no", "fp32", "fp16", "bf16"]
PredictionType = Literal["epsilon", "v_prediction"]
Quantization = Literal["nf4", "int8", "torchao-int8"]
SaveDtype = Literal["fp16", "bf16", "fp32"]
FileLayout = Literal["kohya", "diffusers"]
LoraLayout = Literal["kohya", "diffusers", "both"]
LossType = Literal["l2", "huber"]
Optimizer = Literal["adamw", "prodigy", "adafactor", "lora-pro"]
SelfCheck = Literal["once", "always", "never"]
LrScheduler = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]


@dataclass(frozen=True)
class ModelConfig(Section):
    """The base model."""

    pretrained_model_name_or_path: str = setting(
        "tiny",
        "SDXL base: a diffusers folder, a hub id, a single .safetensors checkpoint, or `tiny` for the small base that "
        "ships with this program",
        place="model",
        names_base=True,
    )
    pretrained_vae_model_name_or_path: str | None = setting(
        None, "another VAE: folder or hub id; the fp16 fix is in fp16", place="model", names_base=True
    )
    revision: str | None = setting(None, "hub revision of the base", place="part", names_base=True)
    variant: str | None = setting(
        None, "weight variant of the base, such as fp16", place="part", names_base=True, only_loads=True
    )
    single_file_config: str | None = setting(
        None,
        "for a single-file base: a diffusers folder whose configs and tokenizers are used, to work offline",
        place="read",
        names_base=True,
    )
    prediction_type: PredictionType | None = setting(
        None, "what the base predicts; default: what its file or scheduler says"
    )
    zero_terminal_snr: bool = setting(
        False, "rescale the betas so that the last timestep is pure noise; v-prediction only"
    )
    clip_skip: int | None = setting(None, "text encoder layers to skip beyond SDXL's own choice", min=0, max=11)
    quantize_base: Quantization | None = setting(
        None, "load the frozen UNet in 4 or 8 bits (nf4, int8: bitsandbytes; torchao-int8: torchao)", only_loads=True
    )
    offload: bool = setting(
        False,
        "keep text encoders and VAE on the CPU once their outputs are cached",
        free_on_resume=True,
        only_loads=True,
    )
    enable_xformers_memory_efficient_attention: bool = setting(
        False, "attention by xformers; PyTorch's own (SDPA) is the default and as good on most GPUs", only_loads=True
    )
    allow_tf32: bool = setting(
        False, "TF32 matrix products on Ampere and newer GPUs: faster, less exact", only_loads=True
    )

    @property
    def is_unet_last(self) -> bool:
        """Whether the UNet is placed last, so that it need not share the device with the encoding of the images."""
        return self.offload and self.quantize_base is None


@dataclass(frozen=True)
class DataConfig(Section):
    """The images and their captions."""

    instance_data_dir: str | None = setting(
        None,
        "folder with the training images; captions from .txt/.caption beside them",
        place="read",
        free_on_resume=True,
        stays_open=True,
        is_shared=True,
    )
    dataset_name: str | None = setting(
        None,
        "in place of a folder: a Hugging Face dataset, by hub id or local path",
        place="model",
        free_on_resume=True,
        stays_open=True,
        is_shared=True,
    )
    dataset_config: str | None = setting(
        None,
        "in place of a folder: a dataset file (TOML) of sd-scripts with several folders, their repeats and prompts",
        place="read",
        free_on_resume=True,
        stays_open=True,
        is_shared=True,
    )
    dataset_config_name: str | None = setting(None, "configuration of that dataset", place="part")
    cache_dir: str | None = setting(None, "where downloaded datasets are kept", place="written", free_on_resume=True)
    image_column: str = setting("image", "dataset column with the images")
    caption_column: str | None = setting(
        None, "dataset column, or field of metadata.jsonl, with the captions; default: every image uses the prompt"
    )
    instance_prompt: str | None = setting(None, "prompt for every image without a caption of its own")
    holdout_images: int = setting(
        0,
        "so many of the images, always the same, are not trained on: their loss chooses the checkpoint that becomes "
        "the result",
        min=0,
        max=10_000,
        moves="draws",
    )
    holdout_patience: int = setting(
        0,
        "stop after so many checkpoints in a row without a lower loss of --holdout_images; 0: train all steps",
        min=0,
        free_on_resume=True,
    )
    holdout_folds: int = setting(
        0,
        "for few images: so many runs of --max_train_steps, each without another part of the images, find at how many "
        "steps the held-out loss of all images is lowest; then the run trains on all of them for so many",
        min=0,
        max=100,
    )
    repeats: int = setting(1, "how often each image is used per epoch", min=1, max=10_000, moves="draws")
    with_prior_preservation: bool = setting(
        False, "train on class images too, so that the class keeps its look", moves="draws"
    )
    class_data_dir: str | None = setting(
        None,
        "folder of class images; missing ones are generated into it",
        place="written",
        free_on_resume=True,
        stays_open=True,
    )
    class_prompt: str | None = setting(None, "prompt of the class, without the trigger")
    num_class_images: int = setting(100, "class images to have", min=1, free_on_resume=True)
    sample_batch_size: int = setting(4, "batch size of generating them", min=1, free_on_resume=True)
    prior_generation_precision: Precision | None = setting(
        None, "precision of generating them; default: fp16 on a GPU, fp32 on a CPU", free_on_resume=True
    )
    resolution: int | None = setting(
        None,
        "training size in pixels; default: the base's own (1024 for SDXL, 64 for tiny)",
        min=8,
        max=4096,
        is_settled=True,
        moves="draws",
    )
    use_aspect_ratio_buckets: bool = setting(
        False,
        "keep each image's shape: batches of one shape, all of about resolution x resolution pixels",
        moves="draws",
    )
    center_crop: bool = setting(False, "crop at the centre instead of at random", moves="draws")
    random_flip: bool = setting(False, "mirror images at random, anew in each epoch", moves="draws")
    image_interpolation_mode: Interpolation = setting("lanczos", "filter for resizing", moves="draws")
    background_color: str = setting("white", "colour put behind transparent images: a name or #rrggbb", moves="draws")
    caption_dropout: float = setting(
        0.0, "share of samples trained without prompt (zero embeddings, as SDXL's unconditional half)", min=0, max=1
    )
    shuffle_tags: bool = setting(False, "shuffle the tags of a caption, with commas between them, for each showing")
    keep_tags: int = setting(0, "so many first tags of a caption are neither shuffled nor dropped", min=0)
    tag_dropout: float = setting(0.0, "share of the other tags that a showing leaves out", min=0, max=1)
    cache_latents: bool = setting(
        False,
        "encode each image once: posterior mean and std, both flips, one seeded crop for the whole run",
        moves="draws",
    )
    cache_text_embeddings: bool = setting(
        False,
        "keep the prompt embeddings in --embedding_cache_dir; in memory they are always cached when frozen",
        free_on_resume=True,
    )
    embedding_cache_dir: str | None = setting(
        None, "keep what is cached in this folder, for later runs", place="written", free_on_resume=True
    )
    dataloader_num_workers: int = setting(
        0, "threads that load the images of the next step", min=0, max=64, free_on_resume=True
    )

    @property
    def draws_captions(self) -> bool:
        """Whether an image's caption is another one in each showing."""
        return self.shuffle_tags or self.tag_dropout > 0

    @property
    def is_given(self) -> bool:
        """Whether some setting names the training images."""
        return bool(self.instance_data_dir or self.dataset_name or self.dataset_config)


@dataclass(frozen=True)
class AdapterConfig(Section):
    """The LoRA."""

    adapter: AdapterKind = setting(
        "lora",
        "lora; rslora, as --use_rslora; dora, as --use_dora; pissa, which starts at W's largest directions "
        "(arXiv:2404.02948), or lora-ga, which starts at those of the first gradients (arXiv:2407.05000): both are "
        "saved as a plain LoRA of twice the rank; adalora, which begins with half as many ranks again and takes those "
        "that matter least over all layers until --rank is the mean (arXiv:2303.10512); full, which trains all of "
        "each layer's weights and saves the merged pipeline beside a LoRA of --rank by SVD",
        moves="weights",
        before="lora",
    )
    pissa_iterations: int | None = setting(
        None,
        f"power iterations of PiSSA's fast SVD; 0: the exact one; default: {_PISSA_ITERATIONS}",
        min=0,
        max=100,
        moves="weights",
        before=None,
    )
    lora_ga_steps: int | None = setting(
        None,
        f"steps whose batches give the gradients that LoRA-GA starts from; default: {_LORA_GA_STEPS}",
        min=1,
        max=10_000,
        moves="weights",
        before=None,
    )
    rank: int = setting(4, "rank of the LoRA", min=1, max=1024, moves="weights")
    lora_alpha: float | None = setting(None, "scale numerator, W + alpha/rank * BA; default: the rank", min=1e-6)
    lora_dropout: float = setting(0.0, "dropout in front of A", min=0, max=0.99)
    use_dora: bool = setting(
        False,
        "DoRA: train the rows' magnitudes apart from their directions (arXiv:2402.09353); as --adapter dora",
        moves="weights",
    )
    use_rslora: bool = setting(
        False, "rank-stabilized scale, alpha/sqrt(rank) (arXiv:2312.03732); as --adapter rslora"
    )
    lora_target_modules: str = setting(
        "attn",
        "UNet layers: attn, attn+ff, all-linear, conv (all-linear and convolutions), or names with commas",
        moves="weights",
    )
    lora_unet_blocks: str | None = setting(
        None,
        "only these UNet blocks, with commas, such as up_blocks.0.attentions.0,mid_block; default: all",
        moves="weights",
    )
    use_blora: bool = setting(
        False, "B-LoRA (arXiv:2403.14572): only up_blocks.0.attentions.0 and .1", moves="weights"
    )
    lora_block_ranks: str | None = setting(
        None, "another rank for some blocks, such as mid_block=16,up_blocks.0=8", moves="weights"
    )
    train_text_encoder: bool = setting(False, "a LoRA on the attention of both text encoders too", moves="weights")
    init_lora: str | None = setting(
        None, "start from this LoRA file instead of from zero", place="read", moves="weights"
    )
    lora_init_seed: int | None = setting(
        None, "seed of the LoRA's first weights alone; default: --seed", min=0, max=2**63 - 1, moves="weights"
    )

    @property
    def is_dora(self) -> bool:
        return self.use_dora or self.adapter == "dora"

    @property
    def is_rslora(self) -> bool:
        return self.use_rslora or self.adapter == "rslora"

    @property
    def iterations(self) -> int:
        """Those of PiSSA's SVD in force."""
        return _PISSA_ITERATIONS if self.pissa_iterations is None else self.pissa_iterations

    @property
    def slope_steps(self) -> int:
        """The steps in force whose batches give LoRA-GA's gradients."""
        return _LORA_GA_STEPS if self.lora_ga_steps is None else self.lora_ga_steps


@dataclass(frozen=True)
class TokenConfig(Section):
    """Pivotal tuning: new tokens whose embeddings are trained."""

    token_abstraction: str = setting("TOK", "words in the prompts that stand for new tokens, with commas")
    num_new_tokens_per_abstraction: int = setting(2, "new tokens for each of these words", min=1, max=64)
    train_text_encoder_ti: bool = setting(False, "train embeddings of new tokens along with the UNet's LoRA")
    train_text_encoder_ti_frac: float = setting(0.5, "share of the run that trains them", min=0, max=1)
    train_text_encoder_frac: float = setting(1.0, "share of the run that trains the text encoders", min=0, max=1)


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
    delta_weight_decay: float = setting(
        0.0,
        "hold down the change of the weights itself: this times half the sum of ||W' - W||^2 over the layers is "
        "added to what is minimized, though not to the loss that is told",
        min=0,
        max=1e6,
        before=0.0,
    )
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


@dataclass(frozen=True)
class RunConfig(Section):
    """Where the run goes and what it leaves."""

    output_dir: str = setting(
        "lora-dreambooth-model",
        "run folder: weights, checkpoints, log",
        place="run",
        free_on_resume=True,
        is_shared=True,
    )
    output_name: str | None = setting(
        None, "name of the LoRA for other tools; default: the run folder's", free_on_resume=True, is_shared=True
    )
    output_kohya_format: bool = setting(
        False,
        "also write the file for other tools as pytorch_lora_weights_kohya.safetensors, as diffusers names it",
        free_on_resume=True,
    )
    save_dtype: SaveDtype = setting(
        "fp16", "precision of the LoRA files; what a resumed run needs stays fp32", free_on_resume=True
    )
    seed: int | None = setting(
        None,
        "seed of every draw; default: drawn from the system, printed and saved",
        min=0,
        is_settled=True,
        is_shared=True,
    )
    checkpointing_steps: int = setting(
        500, "a resumable checkpoint every N steps", min=1, free_on_resume=True, is_shared=True
    )
    checkpoints_total_limit: int | None = setting(None, "keep only this many checkpoints", min=1, free_on_resume=True)
    resume_from_checkpoint: str | None = setting(
        None, "a checkpoint's name; `latest` starts a run if there is none", free_on_resume=True, is_shared=True
    )
    validation_prompt: str | None = setting(
        None,
        "prompt of the preview images; given several times, or with one a line, of each; default: none are made",
        free_on_resume=True,
        is_lines=True,
    )
    validation_prompts_file: str | None = setting(
        None,
        "JSON Lines with prompt and, if wanted, negative_prompt and seed: one preview image each",
        place="read",
        free_on_resume=True,
        stays_open=True,
    )
    num_validation_images: int = setting(
        4, "preview images of each --validation_prompt", min=1, max=64, free_on_resume=True
    )
    validation_epochs: int = setting(
        50, "previews after every N epochs, beside those of the base and at the end", min=1, free_on_resume=True
    )
    validation_data_dir: str | None = setting(
        None,
        "images that are not trained on: their loss, with fixed noise and timesteps, is logged with the previews",
        place="read",
        free_on_resume=True,
        stays_open=True,
    )
    selfcheck: SelfCheck = setting(
        "once",
        "let the first three steps of a new run check themselves and tell what they found: once for each version on "
        "each kind of CUDA device, always, or never",
        free_on_resume=True,
    )
    report_to: str = setting("tensorboard", "tracker: tensorboard, wandb, comet_ml, all or none", free_on_resume=True)
    logging_dir: str = setting("logs", "folder of the tracker, in the run folder", place="part", free_on_resume=True)
    push_to_hub: bool = setting(
        False,
        "upload LoRA, model card and preview images to the Hugging Face hub",
        free_on_resume=True,
        is_shared=True,
    )
    hub_token: str | None = setting(
        None, "token for it; never saved. Better: log in with `hf auth login`", is_secret=True, free_on_resume=True
    )
    hub_model_id: str | None = setting(
        None, "repository to upload to; default: the run folder's name", free_on_resume=True
    )
    local_rank: int = setting(
        -1, "accepted for old launchers; the environment's LOCAL_RANK is what counts", free_on_resume=True
    )

    @property
    def preview_prompts(self) -> list[str]:
        """Each line of `validation_prompt` once; an empty one is a prompt of its own, as in diffusers' script."""
        if self.validation_prompt is None:
            return []
        lines = [line.strip() for line in self.validation_prompt.splitlines() if line.strip()]
        return list(dict.fromkeys(lines)) or [""]


@dataclass(frozen=True)
class TrainConfig:
    """All settings of one training run, frozen."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    tokens: TokenConfig = field(default_factory=TokenConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    perturb: PerturbConfig = field(default_factory=PerturbConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        """Refuse settings that exclude each other. Raises ConfigError that names both."""
        check_combinations(self)

    @property
    def trains_text(self) -> bool:
        """Whether anything in the text encoders is trained, so that prompts must be encoded in each step."""
        return self.adapter.train_text_encoder or self.tokens.train_text_encoder_ti

    @property
    def encodes_in_steps(self) -> bool:
        """Whether the text encoders are needed in each step, trained or not."""
        return self.trains_text or self.data.draws_captions

    def to_dict(self) -> dict[str, Any]:
        """Every setting by its flat name, JSON-able."""
        return {name: value for section in fields(self) for name, value in vars(getattr(self, section.name)).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The config with `values` by flat name over the defaults. Raises ConfigError for an unknown name."""
        return cls().replace(**completed(values))

    def replace(self, **values: Any) -> TrainConfig:
        """A copy with the settings `values` by flat name."""
        sections = {}
        left = dict(values)
        for section in fields(self):
            names = {item.name for item in fields(getattr(self, section.name))}
            mine = {name: left.pop(name) for name in list(left) if name in names}
            sections[section.name] = dataclasses.replace(getattr(self, section.name), **mine)
        if left:
            raise ConfigError(f"unknown setting(s): {', '.join(sorted(left))}; see --help for all names")
        return TrainConfig(**sections)

    def updated_from(self, path: Path) -> TrainConfig:
        """This config with the settings of a JSON file over it. Raises ConfigError when the file cannot be used."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"config file {path} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"config file {path} must hold one JSON object of settings")
        return self.replace(**completed(values))


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Saved settings, with those that their version did not have yet as it worked then.

    A file that leaves out older settings of the section, too, is no saved one: what it does not say is the default.
    """
    whole = dict(values)
    for section in typing.get_type_hints(TrainConfig).values():
        before = {item.name: item.metadata["before"] for item in fields(section) if "before" in item.metadata}
        if {item.name for item in fields(section)} - before.keys() <= values.keys():
            whole = {**before, **whole}
    return whole


def setting_hints() -> dict[str, Any]:
    """The type of every setting of a TrainConfig by flat name."""
    sections = typing.get_type_hints(TrainConfig).values()
    return {name: hint for section in sections for name, hint in typing.get_type_hints(section).items()}


def settings_that(trait: str, *values: str) -> tuple[str, ...]:
    """The names of the training settings with a trait (see `Traits`), or with one of its `values`, in their order.

    `is_path` is true of those that name a place, whether a hub id may stand there or not.
    """
    if trait not in {"is_path", *Traits.__annotations__}:
        raise KeyError(trait)
    names = []
    for section in typing.get_type_hints(TrainConfig).values():
        for item in fields(section):
            traits = {"is_path": item.metadata.get("place", "part") != "part", **item.metadata}
            found = traits.get(trait, False)
            if found in values if values else found:
                names.append(item.name)
    return tuple(names)


def read_setting(name: str, text: str) -> Any:
    """The value that `text` gives a training setting. Raises ConfigError for a name or a value that cannot be."""
    hint = setting_hints().get(name)
    if hint is None:
        raise ConfigError(f"unknown setting {name!r}; see `train --help` for all names")
    kind = next(kind for kind in _kinds(hint) if kind is not types.NoneType)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{name}={text!r} must be true or false")
        return text.lower() == "true"
    if kind not in (int, float):
        return text
    try:
        return kind(text)
    except ValueError as error:
        raise ConfigError(f"{name}={text!r} must be of type {kind.__name__}") from error


def preset_file(name: str) -> Path:
    """The JSON file of a preset. Raises ConfigError that lists the presets there are."""
    path = SAMPLES / "presets" / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.json")))
        raise ConfigError(f"--preset {name} does not exist; there are: {known}")
    return path
