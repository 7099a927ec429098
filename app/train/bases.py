"""Whether a base can be trained on, told before a training is queued, without loading any weights."""

from __future__ import annotations

from pathlib import Path

from flatlora_diffusion.config import ConfigError, ModelConfig

from ..runs.processes import read_json


def check_base(model: ModelConfig) -> None:
    """Raises ConfigError for what is no SDXL base, as far as its place, its lists and its header tell.

    Of a name on the hub nothing is known until it is loaded.
    """
    from flatlora_diffusion.sdxl.loading import base_path, check_source  # imports diffusers, which takes seconds
    from flatlora_diffusion.sdxl.shapes import part_settings
    from flatlora_diffusion.sdxl.variants import check_channels

    check_source(model)
    path = Path(base_path(model.pretrained_model_name_or_path))
    if not path.is_dir():
        return
    parts = read_json(path / "model_index.json")
    what = f"pretrained_model_name_or_path={model.pretrained_model_name_or_path!r}"
    for part, of_what in (("text_encoder_2", "Stable Diffusion 1 or 2"), ("text_encoder", "SDXL's refiner")):
        if not any(parts.get(part) or ()):
            raise ConfigError(f"{what} has no {part}, as {of_what}; choose an SDXL base")
    unet, vae = part_settings(model, "unet"), part_settings(model, "vae")
    check_channels(unet.get("in_channels", 4), vae.get("latent_channels", 4), what)
