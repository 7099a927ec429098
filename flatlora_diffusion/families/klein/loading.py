"""Loading of a FLUX.2 klein pipeline from settings: quantized if requested, on its device and frozen."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from flatlora_diffusion.config import ConfigError, ModelConfig
from flatlora_diffusion.families.base_title import TINY_KLEIN_TITLE, title_with_size
from flatlora_diffusion.families.klein.labels import labels_of
from flatlora_diffusion.families.klein.latents import decode_one_by_one
from flatlora_diffusion.families.klein.shapes import native_size
from flatlora_diffusion.families.paths import SETTING, base_path, read_settings
from flatlora_diffusion.families.quantization import quantization_config
from flatlora_diffusion.storage.formatting import first_line
from flatlora_diffusion.storage.hub_errors import hub_is_reachable, loading_failure
from flatlora_diffusion.storage.model_paths import check_models

logger = logging.getLogger(__name__)

LAYERS = (9, 18, 27)  # of the text encoder, that the transformer reads
_PARTS = ("transformer", "text_encoder", "vae")
_CONFIGS = (*(f"{part}/config.json" for part in _PARTS), "tokenizer/tokenizer_config.json")
# Of diffusers and transformers, for missing and damaged files and for wrong values in config files.
_LOAD_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, SafetensorError, StrictDataclassError)


def load_pipeline(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Flux2KleinPipeline:
    """Load the base on `device`, frozen, in eval mode and in `dtype`, with the VAE in fp32.

    Raises:
        ConfigError: there is no FLUX.2 klein, or a setting is not supported by the model, device or packages.
    """
    path = base_path(config.pretrained_model_name_or_path)
    quantization = quantization_config("transformer", config.quantize_base, device, dtype)
    try:
        pipeline = Flux2KleinPipeline.from_pretrained(
            path,
            dtype={"default": dtype, "vae": torch.float32},
            revision=config.revision,
            variant=config.variant,
            local_files_only=not Path(path).is_dir() and not hub_is_reachable(),
            use_safetensors=True,
            quantization_config=quantization,
        )
    except _LOAD_ERRORS as error:
        why = loading_failure(path, error)
        raise ConfigError(f"{_named(config)} cannot be loaded as a FLUX.2 klein: {why}") from error
    _check_pipeline(pipeline, config)
    labels = labels_of(pipeline.transformer)
    name = TINY_KLEIN_TITLE if labels.is_demo else labels.name
    logger.info("the base is %s", title_with_size(name, native_size(pipeline.vae.config)))
    decode_one_by_one(pipeline.vae)
    pipeline.to(device)
    for part in _PARTS:
        getattr(pipeline, part).requires_grad_(False).eval()
    return pipeline


def check_source(config: ModelConfig) -> None:
    """Raise ConfigError for an invalid base, by paths, config files and file headers only."""
    check_models(config)
    folder = Path(base_path(config.pretrained_model_name_or_path))
    for name in _CONFIGS if folder.is_dir() else ():
        if not (folder / name).is_file():
            raise ConfigError(f"{_named(config)} has no {name}; copy or download the base again")
        read_settings(folder / name)
    for part in _PARTS:
        for file in sorted((folder / part).glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt"):
                    pass
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{file} is damaged or not a safetensors file: {first_line(error)}") from error


def _check_pipeline(pipeline: Flux2KleinPipeline, config: ModelConfig) -> None:
    if pipeline.transformer.config.guidance_embeds:
        raise ConfigError(
            f"{_named(config)} is not a FLUX.2 klein: its transformer has guidance embeddings; give klein-base-4B"
        )
    layers = pipeline.text_encoder.config.num_hidden_layers
    if layers < LAYERS[-1]:
        raise ConfigError(
            f"{_named(config)} is not a FLUX.2 klein: its text encoder has {layers} layers, and the transformer reads "
            f"layer {LAYERS[-1]}"
        )
    if not pipeline.tokenizer.chat_template:
        raise ConfigError(
            f"{_named(config)} has no chat template in its tokenizer folder; copy that of the base again"
        )
    missing = [
        f"{part}.{name}"
        for part in _PARTS
        for name, tensor in getattr(pipeline, part).named_parameters()
        if tensor.is_meta
    ]
    if missing:
        raise ConfigError(f"{_named(config)} lacks {len(missing)} weights, such as {missing[0]}")


def _named(config: ModelConfig) -> str:
    return f"{SETTING}={config.pretrained_model_name_or_path!r}"
