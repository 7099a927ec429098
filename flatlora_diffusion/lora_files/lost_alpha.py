"""LoRA files whose alpha was lost when they were written: how far their strength is off, and how to mend it.

`--output_kohya_format` of diffusers' training scripts writes the rank, as a whole number, for every alpha, or leaves
the UNet's out: such a file has the scale 1 whatever it was trained with.
"""

from __future__ import annotations

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.lora_files.reading import FileLayer, ImportedLora
from flatlora_diffusion.lora_files.safe_reading import checked_file
from flatlora_diffusion.lora_files.scale import adapter_scale, adapter_settings
from flatlora_diffusion.storage.run_dir import LORA_FILE


def lost_alpha(lora: ImportedLora) -> str | None:
    """A sentence with the factor and what to do; None for a file that has its alphas, or never had another than 1."""
    if not all(_is_lost(lora, layer) for layer in lora.layers):
        return None
    start = f"{lora.file.path.name} has lost its alpha, as `--output_kohya_format` of diffusers' scripts does it:"
    scales = _scales_beside(lora)
    if scales is None:
        ranks = "-".join(str(rank) for rank in dict.fromkeys((_ranks(lora)[0], _ranks(lora)[-1])))
        return (
            f"{start} it has {ranks} / lora_alpha times the effect that was trained, which is wrong unless lora_alpha "
            f"was its rank, {ranks}; `export` the {LORA_FILE} of that training instead"
        )
    if scales == [1.0]:
        return None
    times = " to ".join(f"{1 / scale:.3g}" for scale in dict.fromkeys((scales[-1], scales[0])))
    return f"{start} it has {times} times the effect that was trained; `export` {LORA_FILE} beside it instead"


def _is_lost(lora: ImportedLora, layer: FileLayer) -> bool:
    if not layer.name.startswith("lora_"):
        return False
    if layer.alpha is None:
        return layer.end == "_lora.down.weight"
    return layer.alpha == layer.rank and lora.file.entries[f"{layer.name}.alpha"].dtype == "I64"


def _ranks(lora: ImportedLora) -> list[int]:
    return sorted({layer.rank for layer in lora.layers})


def _scales_beside(lora: ImportedLora) -> list[float] | None:
    """The scales that diffusers' file of the same training has in its metadata; None without such a file."""
    path = lora.file.path.with_name(LORA_FILE)
    if not path.is_file():
        return None
    try:
        file = checked_file(path)
        settings = adapter_settings(file)
        if not settings or len(file.entries) != 2 * len(lora.layers):
            return None
        return sorted(
            {adapter_scale(settings, layer.place.part, layer.place.module, layer.rank) for layer in lora.layers}
        )
    except ConfigError:
        return None
