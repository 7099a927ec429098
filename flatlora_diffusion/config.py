"""Every setting, once: default, bounds, help. The command line, config.json and the app's form come from here.

Names and defaults are those of diffusers' `train_dreambooth_lora_sdxl.py` wherever that script has the setting.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

SAMPLES = Path(__file__).resolve().parents[1] / "samples"

Method = Literal["lora", "flat-lora"]
SigmaSchedule = Literal["cosine", "linear", "constant"]
NoiseKind = Literal["filter", "iid"]
PerturbPer = Literal["microbatch", "step"]
MixedPrecision = Literal["no", "fp16", "bf16"]
LrScheduler = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]

DEFAULT_SIGMA = 0.1


class ConfigError(ValueError):
    """Something the user can put right: the message says what, and what is allowed."""


class RunError(RuntimeError):
    """A run that had to stop; the message says why and what to do."""


def setting(default: Any, help: str, min: float | None = None, max: float | None = None) -> Any:
    """A dataclass field with its help and its inclusive bounds."""
    return field(default=default, metadata={"help": help, "min": min, "max": max})


class Section:
    """Checks the type, the choices and the bounds of every setting of a dataclass when it is made."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in fields(self):  # type: ignore[arg-type]
            if item.metadata:
                _check(item, hints[item.name], getattr(self, item.name))


@dataclass(frozen=True)
class ModelConfig(Section):
    """The base model."""

    pretrained_model_name_or_path: str = setting(
        "tiny", "SDXL base: a diffusers folder, a hub id, or `tiny` for the small base that ships with this program"
    )
    pretrained_vae_model_name_or_path: str | None = setting(
        None, "another VAE, such as the fp16 fix: folder or hub id"
    )
    revision: str | None = setting(None, "hub revision of the base")
    variant: str | None = setting(None, "weight variant of the base, such as fp16")


@dataclass(frozen=True)
class DataConfig(Section):
    """The images and their captions."""

    instance_data_dir: str = setting("", "folder with the training images; captions from .txt/.caption beside them")
    instance_prompt: str | None = setting(None, "prompt for every image without a caption of its own")
    caption_column: str | None = setting(None, "field of metadata.jsonl that holds the captions")
    resolution: int | None = setting(
        None, "training size in pixels; default: the base's own (1024 for SDXL, 64 for tiny)", min=8, max=4096
    )
    center_crop: bool = setting(False, "crop at the centre instead of at random")
    random_flip: bool = setting(False, "mirror images at random, anew in each epoch")
    image_interpolation_mode: Interpolation = setting("lanczos", "filter for resizing")
    background_color: str = setting("white", "colour put behind transparent images: a name or #rrggbb")
    caption_dropout: float = setting(
        0.0, "share of samples trained without prompt (zero embeddings, as SDXL's unconditional half)", min=0, max=1
    )


@dataclass(frozen=True)
class AdapterConfig(Section):
    """The LoRA."""

    rank: int = setting(4, "rank of the LoRA", min=1, max=1024)
    lora_alpha: float | None = setting(None, "scale numerator, W + alpha/rank * BA; default: the rank", min=1e-6)
    lora_dropout: float = setting(0.0, "dropout in front of A", min=0, max=0.99)


@dataclass(frozen=True)
class PerturbConfig(Section):
    """Flat-LoRA's perturbation of the base weights."""

    method: Method = setting("flat-lora", "flat-lora trains at W + eps (arXiv:2409.14396); lora is plain LoRA")
    sigma: float | None = setting(
        None,
        f"relative radius of eps, flat-lora only; default {DEFAULT_SIGMA}; 0.05 to 0.1 in the paper",
        min=0,
        max=1,
    )
    sigma_schedule: SigmaSchedule = setting(
        "cosine", "how sigma grows over the run; the paper names none for SDXL, a ramp is our choice"
    )
    perturb_seed: int | None = setting(None, "seed of eps alone; default: --seed", min=0, max=2**63 - 1)
    perturb_per: PerturbPer = setting(
        "microbatch", "a new eps for each micro-batch, or one for each optimizer step as in the paper"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "lora" and self.sigma is not None:
            raise ConfigError(
                f"--method lora has no perturbation, but sigma={self.sigma:g} was given; "
                "leave --sigma out or use --method flat-lora"
            )

    @property
    def strength(self) -> float:
        """The sigma in force: 0 for plain LoRA."""
        if self.method == "lora":
            return 0.0
        return DEFAULT_SIGMA if self.sigma is None else self.sigma


@dataclass(frozen=True)
class OptimConfig(Section):
    """Steps and optimizer."""

    train_batch_size: int = setting(4, "images per micro-batch and device", min=1, max=4096)
    gradient_accumulation_steps: int = setting(1, "micro-batches per optimizer step", min=1, max=4096)
    num_train_epochs: int = setting(1, "passes over the images; ignored with --max_train_steps", min=1)
    max_train_steps: int | None = setting(None, "optimizer steps", min=1)
    learning_rate: float = setting(1e-4, "learning rate of the LoRA", min=0, max=10)
    lr_scheduler: LrScheduler = setting("constant", "learning-rate schedule")
    lr_warmup_steps: int = setting(500, "warm-up steps; no effect with `constant`", min=0)
    lr_num_cycles: int = setting(1, "restarts of cosine_with_restarts", min=1)
    lr_power: float = setting(1.0, "power of polynomial", min=0)
    adam_beta1: float = setting(0.9, "AdamW's beta1", min=0, max=0.9999999)
    adam_beta2: float = setting(0.999, "AdamW's beta2", min=0, max=0.9999999)
    adam_weight_decay: float = setting(1e-4, "AdamW's weight decay", min=0)
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon", min=0)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", min=0)
    gradient_checkpointing: bool = setting(False, "recompute activations in backward: less memory, slower")
    mixed_precision: MixedPrecision = setting("no", "compute precision; the LoRA's weights stay fp32 in any case")


@dataclass(frozen=True)
class RunConfig(Section):
    """Where the run goes and what it leaves."""

    output_dir: str = setting("lora-dreambooth-model", "run folder: weights, checkpoints, log")
    seed: int | None = setting(None, "seed of every draw; default: drawn from the system, printed and saved", min=0)
    checkpointing_steps: int = setting(500, "a resumable checkpoint every N steps", min=1)
    checkpoints_total_limit: int | None = setting(None, "keep only this many checkpoints", min=1)
    resume_from_checkpoint: str | None = setting(None, "`latest` or the name of a checkpoint in the run folder")
    validation_prompt: str | None = setting(None, "prompt of the preview images; default: none are made")
    num_validation_images: int = setting(4, "preview images at the end of the run", min=1, max=64)


@dataclass(frozen=True)
class TrainConfig:
    """All settings of one training run, frozen."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    perturb: PerturbConfig = field(default_factory=PerturbConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def to_dict(self) -> dict[str, Any]:
        """Every setting by its flat name, JSON-able."""
        return {name: value for section in fields(self) for name, value in vars(getattr(self, section.name)).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The config with `values` by flat name over the defaults. Raises ConfigError for an unknown name."""
        return cls().replace(**values)

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
        return self.replace(**values)


def preset_file(name: str) -> Path:
    """The JSON file of a preset. Raises ConfigError that lists the presets there are."""
    path = SAMPLES / "presets" / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.json")))
        raise ConfigError(f"--preset {name} does not exist; there are: {known}")
    return path


def _check(item: dataclasses.Field[Any], hint: Any, value: Any) -> None:
    kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and types.NoneType in kinds:
        return
    kind = next(kind for kind in kinds if kind is not types.NoneType)
    if typing.get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ConfigError(f"{item.name}={value!r} is not one of {', '.join(get_args(kind))}")
        return
    if not _is_a(value, kind):
        raise ConfigError(f"{item.name}={value!r} must be of type {kind.__name__}")
    low, high = item.metadata["min"], item.metadata["max"]
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{item.name}={value} must be a finite number")
    if (low is not None and value < low) or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"{item.name}={value} is out of range: it must be {allowed}")


def _is_a(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
