"""Loading of an SDXL pipeline from settings: quantized if requested, on its device and frozen."""

from __future__ import annotations

import logging
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionXLPipeline,
)
from safetensors import SafetensorError

from flatlora_diffusion.config import ConfigError, ModelConfig
from flatlora_diffusion.families.base_title import TINY_TITLE, title_with_size
from flatlora_diffusion.families.paths import SETTING, base_path, read_settings
from flatlora_diffusion.families.quantization import quantization_config
from flatlora_diffusion.families.sdxl.detect import (
    Header,
    Variant,
    check_channels,
    check_complete,
    describe_variant,
    read_header,
    scheduler_changes,
    variant_of,
    variant_warnings,
)
from flatlora_diffusion.families.sdxl.labels import labels_of
from flatlora_diffusion.families.sdxl.objective import is_edm_scheduler
from flatlora_diffusion.families.sdxl.shapes import part_settings
from flatlora_diffusion.families.sdxl.single_file import PREFIXES
from flatlora_diffusion.families.sdxl.vae import decode_one_by_one, vae_dtype
from flatlora_diffusion.storage.formatting import first_line
from flatlora_diffusion.storage.hub_errors import hub_is_reachable, hub_unreachable, is_missing_files, loading_failure
from flatlora_diffusion.storage.model_paths import check_models, is_single_file

logger = logging.getLogger(__name__)

_LOAD_ERRORS = (OSError, ValueError, SafetensorError)


def load_pipeline(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    """Load the SDXL base on `device`, frozen, in eval mode and in `dtype`, without watermark.

    The VAE is in fp32, because SDXL's VAE gives black images in half precision, or in fp16 if another VAE is given
    that supports it.

    Raises:
        ConfigError: there is no SDXL model, or a setting is not supported by the model, device or packages.
    """
    path = base_path(config.pretrained_model_name_or_path)
    is_file = is_single_file(path)
    variant = variant_of(path, _checked_source(path, config))
    quantization = quantization_config("unet", config.quantize_base, device, dtype)
    parts = {}
    if config.pretrained_vae_model_name_or_path is not None:
        parts["vae"] = _load_vae(config.pretrained_vae_model_name_or_path, dtype)
    is_offline = _needs_hub(path, config) and not hub_is_reachable()  # then only downloaded files are used
    try:
        if is_file:
            pipeline = _from_single_file(path, config, dtype, parts, is_offline)
        else:
            pipeline = _from_folder(path, config, dtype, quantization, parts, is_offline)
    except _LOAD_ERRORS as error:
        why = _why(path, error, is_file, config)
        raise ConfigError(f"{_named(config)} cannot be loaded as an SDXL base: {why}") from error
    except (NotImplementedError, KeyError) as error:  # of diffusers' single-file loader, for a missing tensor
        raise ConfigError(f"{_named(config)} lacks weights: {first_line(error)}") from error
    _check_pipeline(pipeline, config)
    pipeline.scheduler = _scheduler(pipeline, config, variant)
    logger.info("%s", describe_variant(_with_tiny_name(variant, pipeline), config, pipeline.scheduler))
    for message in variant_warnings(variant, pipeline.scheduler):
        logger.warning("%s", message)
    decode_one_by_one(pipeline.vae)
    pipeline.to(device)
    for part in _modules(pipeline):
        part.requires_grad_(False)
        part.eval()
    if config.enable_xformers_memory_efficient_attention:
        _enable_xformers(pipeline)
    return pipeline


def check_source(config: ModelConfig) -> None:
    """Raise ConfigError for an invalid base or VAE, by paths and file headers only."""
    path = base_path(config.pretrained_model_name_or_path)
    _checked_source(path, config)
    vae = config.pretrained_vae_model_name_or_path
    for folder in (*(Path(path, part) for part in PREFIXES), *([] if vae is None else [Path(vae)])):
        for file in sorted(folder.glob("*.safetensors")):
            _header(file, str(file))
    if Path(path).is_dir():
        _check_folder(Path(path), config)


def _check_folder(folder: Path, config: ModelConfig) -> None:
    """Raise ConfigError unless the configs of a folder saved by diffusers are those of an SDXL base."""
    what = _named(config)
    parts = read_settings(folder / "model_index.json")
    for part, of_what in (("text_encoder_2", "Stable Diffusion 1 or 2"), ("text_encoder", "SDXL's refiner")):
        if not any(parts.get(part) or ()):
            raise ConfigError(f"{what} has no {part}, as {of_what}; choose an SDXL base")
    unet, vae = part_settings(config, "unet"), part_settings(config, "vae")
    check_channels(unet.get("in_channels", 4), vae.get("latent_channels", 4), what)


def _checked_source(path: str, config: ModelConfig) -> Header:
    """Check the base before loading; returns the header of a single file, otherwise an empty header."""
    check_models(config)
    if is_single_file(path):
        return _checked_file(Path(path), config)
    if config.single_file_config is not None:
        raise ConfigError(
            f"--single_file_config is for a single .safetensors file, but {_named(config)} is not one; leave it out"
        )
    return Header()


def _checked_file(file: Path, config: ModelConfig) -> Header:
    what = _named(config)
    if config.revision is not None or config.variant is not None:
        raise ConfigError(
            f"--revision and --variant are for hub ids and folders, but {what} is a file; leave them out"
        )
    if config.quantize_base is not None:
        # diffusers 0.42 assumes that a single file's weights are already quantized, and does not quantize them.
        raise ConfigError(
            f"--quantize_base works on folders and hub ids, but {what} is a file; convert it to a folder with "
            "StableDiffusionXLPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        )
    if config.single_file_config is not None and not Path(config.single_file_config, "model_index.json").is_file():
        raise ConfigError(
            f"single_file_config={config.single_file_config!r} must be a folder saved by diffusers, with "
            "model_index.json"
        )
    header = _header(file, what)
    check_complete(header, what, has_vae=config.pretrained_vae_model_name_or_path is not None)
    return header


def _header(file: Path, what: str) -> Header:
    try:
        return read_header(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{what} is damaged or not a safetensors file: {first_line(error)}") from error


def _needs_hub(path: str, config: ModelConfig) -> bool:
    """Whether the base is a hub id, or a file whose configs are on the hub."""
    return config.single_file_config is None and not Path(path).is_dir()


def _from_folder(
    path: str, config: ModelConfig, dtype: torch.dtype, quantization: Any, parts: dict[str, Any], is_offline: bool
) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(
        path,
        dtype={"default": dtype, "vae": torch.float32},
        revision=config.revision,
        variant=config.variant,
        local_files_only=is_offline,
        use_safetensors=True,
        quantization_config=quantization,
        add_watermarker=False,
        **parts,
    )


def _from_single_file(
    path: str, config: ModelConfig, dtype: torch.dtype, parts: dict[str, Any], is_offline: bool
) -> StableDiffusionXLPipeline:
    """Load an original checkpoint; the VAE separately, because diffusers has one dtype for the whole file."""
    options: dict[str, Any] = {"config": config.single_file_config, "local_files_only": is_offline}
    if "vae" not in parts:
        parts["vae"] = AutoencoderKL.from_single_file(path, subfolder="vae", dtype=torch.float32, **options)
    return StableDiffusionXLPipeline.from_single_file(path, dtype=dtype, add_watermarker=False, **options, **parts)


def _why(path: str, error: Exception, is_file: bool, config: ModelConfig) -> str:
    """Explain why the base could not be loaded, and what to do."""
    if not is_file:
        return loading_failure(path, error)
    if config.single_file_config is not None:
        return f"{first_line(error)}; do the configs in {config.single_file_config} fit it?"
    why = f"its configs are not downloaded, and {hub_unreachable()}" if is_missing_files(error) else first_line(error)
    return f"{why}; to work without the hub, give --single_file_config FOLDER"


def _load_vae(path: str, dtype: torch.dtype) -> AutoencoderKL:
    try:
        is_offline = not Path(path).is_dir() and not hub_is_reachable()
        vae = AutoencoderKL.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, local_files_only=is_offline
        )
    except _LOAD_ERRORS as error:
        raise ConfigError(
            f"pretrained_vae_model_name_or_path={path!r} cannot be loaded: {loading_failure(path, error)}"
        ) from error
    return vae.to(vae_dtype(vae.config, dtype))


def _check_pipeline(pipeline: StableDiffusionXLPipeline, config: ModelConfig) -> None:
    if pipeline.text_encoder_2 is None:
        raise ConfigError(f"{_named(config)} is not SDXL: it has no second text encoder")
    if pipeline.text_encoder is None:
        raise ConfigError(
            f"{_named(config)} is SDXL's refiner, not a base: it has only the second text encoder; give the base"
        )
    check_channels(pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels, _named(config))
    layers = min(part.config.num_hidden_layers for part in (pipeline.text_encoder, pipeline.text_encoder_2))
    if config.clip_skip is not None and config.clip_skip >= layers:
        raise ConfigError(
            f"clip_skip={config.clip_skip} is too large for this base, whose text encoders have {layers} layers: it "
            f"must be at most {layers - 1}"
        )
    missing = [name for part in _modules(pipeline) for name, tensor in part.named_parameters() if tensor.is_meta]
    if missing:
        raise ConfigError(f"{_named(config)} lacks {len(missing)} weights, such as {missing[0]}")


def _with_tiny_name(variant: Variant, pipeline: StableDiffusionXLPipeline) -> Variant:
    """Return the variant, with the name of the tiny base if the sizes are its sizes."""
    if not labels_of(pipeline.unet).is_demo:
        return variant
    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    return replace(variant, name=title_with_size(TINY_TITLE, size))


def _scheduler(pipeline: StableDiffusionXLPipeline, config: ModelConfig, variant: Variant) -> Any:
    """Return the base's scheduler, changed as file and settings require; for training and sampling."""
    scheduler = pipeline.scheduler
    if variant.is_edm and not is_edm_scheduler(scheduler):
        raise ConfigError(
            f"{_named(config)} is Playground v2.5, but the scheduler in "
            f"single_file_config={config.single_file_config!r} is not EDM's; give a folder of Playground's configs"
        )
    changes = scheduler_changes(variant, config, scheduler, _named(config))
    changed = type(scheduler).from_config(scheduler.config, **changes)
    ignored = [name for name, value in changes.items() if changed.config.get(name) != value]
    if ignored:
        raise ConfigError(f"the scheduler of the base, {type(scheduler).__name__}, has no {', '.join(ignored)}")
    return changed


def _enable_xformers(pipeline: StableDiffusionXLPipeline) -> None:
    setting = "enable_xformers_memory_efficient_attention"
    if find_spec("xformers") is None:
        raise ConfigError(f"{setting} needs the package xformers; leave it out to use PyTorch's own attention")
    try:
        pipeline.unet.enable_xformers_memory_efficient_attention()
    except (ImportError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"{setting} does not work here, leave it out: {first_line(error)}") from error


def _modules(pipeline: StableDiffusionXLPipeline) -> tuple[torch.nn.Module, ...]:
    return pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2


def _named(config: ModelConfig) -> str:
    return f"{SETTING}={config.pretrained_model_name_or_path!r}"
