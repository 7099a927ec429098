"""Predicts how much of a LoRA file diffusers loads into an SDXL pipeline, by its loader's rules for key names.

The loader either converts a file whose keys are all kohya's, or uses the keys as they are; it raises an error for
ambiguous names of a text encoder. The tests compare these predictions with the loader.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from flatlora_diffusion.adapter.layers import PARTS
from flatlora_diffusion.config import TEXT_PARTS
from flatlora_diffusion.lora_files.reading import FileLayer, ImportedLora
from flatlora_diffusion.lora_files.safe_reading import printable
from flatlora_diffusion.lora_files.scale import PEFT_PREFIX

_PREFIXES = ("lora_te_", "lora_unet_", "lora_te1_", "lora_te2_")
_SGM_BLOCKS = ("input_blocks", "middle_block", "output_blocks")
_DIFFUSERS_BLOCKS = ("down_blocks", "mid_block", "up_blocks")
_REFUSES = "it rejects the file"
_UNCLEAR_NAMES = f"{_REFUSES}: it cannot interpret the {{}}'s names"


class _NotLoadedError(Exception):
    """The reason for which the loader raises an error."""


def diffusers_support(lora: ImportedLora) -> tuple[int, str]:
    """Return the number of layers that diffusers applies, and a note for its user."""
    keys = list(lora.file.entries)
    try:
        if all(key.startswith(_PREFIXES) for key in keys):
            loaded = _kohya_layers(lora, keys)
            return len(loaded), _alpha_note(loaded)
        loaded = _diffusers_layers(lora, keys)
        return len(loaded), "" if loaded else "it loads nothing, with a warning"
    except _NotLoadedError as error:
        return 0, str(error)


def _kohya_layers(lora: ImportedLora, keys: Sequence[str]) -> list[FileLayer]:
    has_both = all(
        any(block in key for key in keys for block in blocks) for blocks in (_SGM_BLOCKS, _DIFFUSERS_BLOCKS)
    )
    remaining = {key for key in keys if not (has_both and any(block in key for block in _SGM_BLOCKS))}
    stems = {key.removesuffix(".lora_down.weight") for key in remaining if key.endswith(".lora_down.weight")}
    incomplete = [stem for stem in stems if f"{stem}.lora_up.weight" not in remaining]
    if incomplete:
        raise _NotLoadedError(f"{_REFUSES}: {printable(min(incomplete))} has only one of the two factors")
    ends = (".lora_down.weight", ".lora_up.weight", ".alpha")
    unknown = [
        key for key in remaining if not any(key.removesuffix(end) in stems for end in ends if key.endswith(end))
    ]
    if unknown:
        raise _NotLoadedError(f"{_REFUSES}: {len(unknown)} tensors have kohya names with unknown suffixes")
    if "lora_adapter_metadata" in lora.file.metadata and any(key.endswith(".alpha") for key in remaining):
        raise _NotLoadedError(f"{_REFUSES}: it contains alphas twice, in tensors and in the metadata")
    layers = [layer for layer in lora.layers if layer.name in stems]
    loaded = [
        layer
        for layer in layers
        if layer.target.part == "unet"
        and not (layer.target.style == "kohya-diffusers" and layer.target.module.startswith("add_embedding."))
    ]
    for part in TEXT_PARTS:
        loaded += _kohya_text_layers(part, [layer for layer in layers if layer.target.part == part])
    return loaded


def _kohya_text_layers(part: str, layers: Sequence[FileLayer]) -> Sequence[FileLayer]:
    """The loader understands converted names of attention layers only if `out_proj` is among them."""
    attention = [layer for layer in layers if ".self_attn." in layer.target.module]
    others = [layer for layer in layers if layer not in attention]
    if attention and not any(layer.target.module.endswith(".out_proj") for layer in attention):
        if not any(".mlp." in layer.target.module for layer in others):
            raise _NotLoadedError(_UNCLEAR_NAMES.format(part))
        return _resolvable_text_layers(part, others)
    return _resolvable_text_layers(part, layers)


def _diffusers_layers(lora: ImportedLora, keys: Sequence[str]) -> list[FileLayer]:
    if not all("lora" in key for key in keys):
        raise _NotLoadedError(f"{_REFUSES}: all names must contain `lora`, but the names of alphas do not")
    unet = [layer for layer in lora.layers if layer.name.startswith("unet.")]
    loaded = _diffusers_unet_layers(unet, next((key for key in keys if key.startswith("unet.")), ""))
    for part in TEXT_PARTS:
        loaded += _diffusers_text_layers(part, [layer for layer in lora.layers if layer.name.startswith(f"{part}.")])
    return loaded


def _diffusers_unet_layers(layers: Sequence[FileLayer], first_key: str) -> list[FileLayer]:
    """The loader converts older names only if the first key has such a name."""
    if layers and all(PEFT_PREFIX in layer.name for layer in layers):
        raise _NotLoadedError(f"{_REFUSES}: the UNet has no layers of these names")
    ends = [".lora_A.weight"]
    if "lora_A" not in first_key:
        ends += [".lora.down.weight", "_lora.down.weight"]
    return [layer for layer in layers if layer.end in ends]


def _diffusers_text_layers(part: str, layers: Sequence[FileLayer]) -> Sequence[FileLayer]:
    if not layers:
        return []
    ends = {layer.end for layer in layers}
    if any(layer.name.endswith(".to_out") and layer.end == "_lora.down.weight" for layer in layers):
        loaded = {"_lora.down.weight", ".lora_linear_layer.down.weight"}
    elif ".lora_A.weight" in ends:
        loaded = {".lora_A.weight", ".lora_linear_layer.down.weight"}
        if not any(layer.target.module.endswith("_proj") or "linear" in layer.end for layer in layers):
            raise _NotLoadedError(_UNCLEAR_NAMES.format(part))
    elif ".lora_linear_layer.down.weight" in ends:
        loaded = {".lora_linear_layer.down.weight"}
    else:
        raise _NotLoadedError(_UNCLEAR_NAMES.format(part))
    return _resolvable_text_layers(part, [layer for layer in layers if layer.end in loaded])


def _resolvable_text_layers(part: str, layers: Sequence[FileLayer]) -> Sequence[FileLayer]:
    """The second text encoder requires `text_model` in the names; for the first the loader strips it."""
    known = [layer for layer in layers if part == "text_encoder" or "text_model" in layer.name]
    projections = [layer for layer in layers if layer.target.module == "text_projection"]
    if layers and not known:
        raise _NotLoadedError(f"{_REFUSES}: the {part} has no layers with these names, which lack `text_model`")
    return [*known, *projections]


def _alpha_note(layers: Sequence[FileLayer]) -> str:
    """The loader applies the most common alpha of a part to attention layers and to the whole first text encoder."""
    wrong = 0
    for part in PARTS:
        of_part = [layer for layer in layers if layer.target.part == part]
        alphas = Counter(layer.alpha for layer in of_part if layer.alpha is not None)
        common = alphas.most_common(1)[0][0] if alphas else None
        for layer in of_part if alphas else ():
            is_preserved = layer.alpha is not None and _keeps_alpha(layer)
            wrong += not is_preserved and common != (layer.rank if layer.alpha is None else layer.alpha)
    return f"{wrong} layers get the most common alpha of their part instead of their own" if wrong else ""


def _keeps_alpha(layer: FileLayer) -> bool:
    part, module, _ = layer.target
    if part == "unet":
        return ".attn1." not in module and ".attn2." not in module
    return ".self_attn." not in module and (part == "text_encoder_2" or "text_model" not in layer.name)
