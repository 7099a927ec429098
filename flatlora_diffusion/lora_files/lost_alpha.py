"""Detects LoRA files that lost their alpha when they were written, and by how much their strength is off.

`--output_kohya_format` of diffusers' training scripts writes the rank as an integer for every alpha, or omits the
UNet's alphas: such a file has scale 1, whatever scale the LoRA was trained with.
"""

from __future__ import annotations

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.lora_files.reading import FileLayer, ImportedLora
from flatlora_diffusion.lora_files.safe_reading import read_header
from flatlora_diffusion.lora_files.scale import adapter_scale, adapter_settings
from flatlora_diffusion.storage.run_dir import LORA_FILE


def lost_alpha_warning(lora: ImportedLora) -> str | None:
    """A warning with the factor and a remedy; None if the alphas are right or the scale was 1 anyway."""
    if not all(_is_lost(lora, layer) for layer in lora.layers):
        return None
    start = f"{lora.file.path.name} lost its alpha, a bug of diffusers' `--output_kohya_format`:"
    scales = _scales_beside(lora)
    if scales is None:
        ranks = "-".join(str(rank) for rank in dict.fromkeys((_ranks(lora)[0], _ranks(lora)[-1])))
        return (
            f"{start} its effect is {ranks} / lora_alpha times the trained one, which is wrong unless lora_alpha was "
            f"the rank, {ranks}; `export` the {LORA_FILE} of that training instead"
        )
    if scales == [1.0]:
        return None
    times = " to ".join(f"{1 / scale:.3g}" for scale in dict.fromkeys((scales[-1], scales[0])))
    return f"{start} its effect is {times} times the trained one; `export` {LORA_FILE} beside it instead"


def _is_lost(lora: ImportedLora, layer: FileLayer) -> bool:
    if not layer.name.startswith("lora_"):
        return False
    if layer.alpha is None:
        return layer.end == "_lora.down.weight"
    return layer.alpha == layer.rank and lora.file.entries[f"{layer.name}.alpha"].dtype == "I64"


def _ranks(lora: ImportedLora) -> list[int]:
    return sorted({layer.rank for layer in lora.layers})


def _scales_beside(lora: ImportedLora) -> list[float] | None:
    """The scales in the metadata of diffusers' file of the same training; None without such a file."""
    path = lora.file.path.with_name(LORA_FILE)
    if not path.is_file():
        return None
    try:
        file = read_header(path)
        settings = adapter_settings(file)
        if not settings or len(file.entries) != 2 * len(lora.layers):
            return None
        return sorted(
            {adapter_scale(settings, layer.target.part, layer.target.module, layer.rank) for layer in lora.layers}
        )
    except ConfigError:
        return None
