"""How much of a LoRA file diffusers loads into an SDXL pipeline: what its loader does with the names, rule by rule.

Its loader either converts a file whose keys are all kohya's, or takes the keys as they are; it stops with an error
where it cannot tell what a text encoder's names mean. The tests compare what is said here with what it does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from flatlora_diffusion.adapter.delta import PARTS
from flatlora_diffusion.config import TEXT_PARTS
from flatlora_diffusion.lora_files.reading import FileLayer, ImportedLora
from flatlora_diffusion.lora_files.safe_reading import shown
from flatlora_diffusion.lora_files.scale import PEFT_PREFIX

_PREFIXES = ("lora_te_", "lora_unet_", "lora_te1_", "lora_te2_")
_OWN_BLOCKS = ("input_blocks", "middle_block", "output_blocks")
_DIFFUSERS_BLOCKS = ("down_blocks", "mid_block", "up_blocks")
_REFUSES = "it refuses the file"
_UNTOLD = f"{_REFUSES}: it cannot tell how the {{}}'s names are to be read"


class _NotLoadedError(Exception):
    """Why the loader stops."""


def diffusers_support(lora: ImportedLora) -> tuple[int, str]:
    """How many layers it applies, and what its user should know."""
    keys = list(lora.file.entries)
    try:
        if all(key.startswith(_PREFIXES) for key in keys):
            loaded = _of_kohya(lora, keys)
            return len(loaded), _alpha_note(loaded)
        loaded = _of_diffusers(lora, keys)
        return len(loaded), "" if loaded else "it loads nothing and only warns"
    except _NotLoadedError as refused:
        return 0, str(refused)


def _of_kohya(lora: ImportedLora, keys: Sequence[str]) -> list[FileLayer]:
    has_both = all(
        any(block in key for key in keys for block in blocks) for blocks in (_OWN_BLOCKS, _DIFFUSERS_BLOCKS)
    )
    left = {key for key in keys if not (has_both and any(block in key for block in _OWN_BLOCKS))}
    stems = {key.removesuffix(".lora_down.weight") for key in left if key.endswith(".lora_down.weight")}
    halves = [stem for stem in stems if f"{stem}.lora_up.weight" not in left]
    if halves:
        raise _NotLoadedError(f"{_REFUSES}: of {shown(min(halves))} it has only one of the two factors")
    ends = (".lora_down.weight", ".lora_up.weight", ".alpha")
    strange = [key for key in left if not any(key.removesuffix(end) in stems for end in ends if key.endswith(end))]
    if strange:
        raise _NotLoadedError(f"{_REFUSES}: {len(strange)} tensors have kohya names with ends that it does not know")
    if "lora_adapter_metadata" in lora.file.metadata and any(key.endswith(".alpha") for key in left):
        raise _NotLoadedError(f"{_REFUSES}: alphas are in it twice, in tensors and in the metadata")
    layers = [layer for layer in lora.layers if layer.name in stems]
    loaded = [
        layer
        for layer in layers
        if layer.place.part == "unet"
        and not (layer.place.style == "kohya-diffusers" and layer.place.module.startswith("add_embedding."))
    ]
    for part in TEXT_PARTS:
        loaded += _text_of_kohya(part, [layer for layer in layers if layer.place.part == part])
    return loaded


def _text_of_kohya(part: str, layers: Sequence[FileLayer]) -> Sequence[FileLayer]:
    """Attention is converted to names that are only understood where `out_proj` is among them."""
    attention = [layer for layer in layers if ".self_attn." in layer.place.module]
    others = [layer for layer in layers if layer not in attention]
    if attention and not any(layer.place.module.endswith(".out_proj") for layer in attention):
        if not any(".mlp." in layer.place.module for layer in others):
            raise _NotLoadedError(_UNTOLD.format(part))
        return _known_text(part, others)
    return _known_text(part, layers)


def _of_diffusers(lora: ImportedLora, keys: Sequence[str]) -> list[FileLayer]:
    if not all("lora" in key for key in keys):
        raise _NotLoadedError(f"{_REFUSES}: all names must contain `lora`, but those of alphas do not")
    unet = [layer for layer in lora.layers if layer.name.startswith("unet.")]
    loaded = _unet_of_diffusers(unet, next((key for key in keys if key.startswith("unet.")), ""))
    for part in TEXT_PARTS:
        loaded += _text_of_diffusers(part, [layer for layer in lora.layers if layer.name.startswith(f"{part}.")])
    return loaded


def _unet_of_diffusers(layers: Sequence[FileLayer], first_key: str) -> list[FileLayer]:
    """Older names are converted if the first key has one."""
    if layers and all(PEFT_PREFIX in layer.name for layer in layers):
        raise _NotLoadedError(f"{_REFUSES}: the UNet has no layers of these names")
    ends = [".lora_A.weight"]
    if "lora_A" not in first_key:
        ends += [".lora.down.weight", "_lora.down.weight"]
    return [layer for layer in layers if layer.end in ends]


def _text_of_diffusers(part: str, layers: Sequence[FileLayer]) -> Sequence[FileLayer]:
    if not layers:
        return []
    ends = {layer.end for layer in layers}
    if any(layer.name.endswith(".to_out") and layer.end == "_lora.down.weight" for layer in layers):
        read = {"_lora.down.weight", ".lora_linear_layer.down.weight"}
    elif ".lora_A.weight" in ends:
        read = {".lora_A.weight", ".lora_linear_layer.down.weight"}
        in_old_names = (layer.place.module.endswith("_proj") or "linear" in layer.end for layer in layers)
        if not any(in_old_names):
            raise _NotLoadedError(_UNTOLD.format(part))
    elif ".lora_linear_layer.down.weight" in ends:
        read = {".lora_linear_layer.down.weight"}
    else:
        raise _NotLoadedError(_UNTOLD.format(part))
    return _known_text(part, [layer for layer in layers if layer.end in read])


def _known_text(part: str, layers: Sequence[FileLayer]) -> Sequence[FileLayer]:
    """The second text encoder has `text_model` in its names, the first has not, and loses it from the file's."""
    known = [layer for layer in layers if part == "text_encoder" or "text_model" in layer.name]
    others = [layer for layer in layers if layer.place.module == "text_projection"]
    if layers and not known:
        raise _NotLoadedError(f"{_REFUSES}: the {part} has no layers of these names, which lack `text_model`")
    return [*known, *others]


def _alpha_note(layers: Sequence[FileLayer]) -> str:
    """Attention's own alphas are lost, and all of the first text encoder: they get the commonest of their part."""
    wrong = 0
    for part in PARTS:
        own = [layer for layer in layers if layer.place.part == part]
        alphas = Counter(layer.alpha for layer in own if layer.alpha is not None)
        common = alphas.most_common(1)[0][0] if alphas else None
        for layer in own if alphas else ():
            is_kept = layer.alpha is not None and _keeps_alpha(layer)
            wrong += not is_kept and common != (layer.rank if layer.alpha is None else layer.alpha)
    return f"{wrong} layers get the commonest alpha of their part, not their own" if wrong else ""


def _keeps_alpha(layer: FileLayer) -> bool:
    part, module, _ = layer.place
    if part == "unet":
        return ".attn1." not in module and ".attn2." not in module
    return ".self_attn." not in module and (part == "text_encoder_2" or "text_model" not in layer.name)
