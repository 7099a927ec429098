"""The layers of each layout that each tool loads: measured counts on SDXL's names, and diffusers itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya
from lora_layouts import (
    ALPHAS,
    ATTENTION,
    adapted,
    as_diffusers_loads,
    by_diffusers,
    comfyui,
    deltas,
    factors,
    kohya,
    lycoris,
    peft,
    processor,
    saved,
    with_old_text,
)
from safetensors.torch import load_file
from torch import Tensor

from flatlora_diffusion.families.sdxl.sgm_names import original_path
from flatlora_diffusion.lora_files.names import BaseNames, base_names
from flatlora_diffusion.lora_files.reading import parse_layers
from flatlora_diffusion.lora_files.safe_reading import read_header
from flatlora_diffusion.lora_tools.tool_support import tool_support

UNET, FIRST, SECOND = 560, 48, 128  # attention layers of SDXL's UNet and text encoders
TEXT = FIRST + SECOND
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")
ALL = UNET + TEXT
CONVOLUTIONS = 66  # of its blocks, with the time projections
TOOLS = (
    *("ComfyUI", "AUTOMATIC1111", "Forge", "InvokeAI", "SD.Next"),
    *("sd-scripts", "stable-diffusion.cpp", "Draw Things", "diffusers"),
)
PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def sdxl() -> BaseNames:
    return base_names()


@pytest.fixture(scope="module")
def attention(sdxl: BaseNames) -> Tensors:
    """A LoRA of rank 1 on every attention layer of SDXL, by PART.PATH in PEFT's names."""
    ends = (*(f".{name}" for name in ATTENTION), *(f".{name}" for name in TEXT_LAYERS))
    tensors = {}
    for part, layers in sdxl.shapes.items():
        for module, (out, wide, *_) in layers.items():
            if module.endswith(ends) and "attentions" in module + "attentions" * (part != "unet"):
                tensors[f"{part}.{module}.lora_A.weight"] = torch.full((1, wide), 0.01, dtype=torch.float16)
                tensors[f"{part}.{module}.lora_B.weight"] = torch.full((out, 1), 0.01, dtype=torch.float16)
    assert len(tensors) == 2 * ALL
    return tensors


def unet_only(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: value for name, value in tensors.items() if name.startswith(("unet.", "lora_unet_"))}


def text_only(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: value for name, value in tensors.items() if name not in unet_only(tensors)}


def renamed(tensors: Mapping[str, Tensor], *changes: tuple[str, str]) -> Tensors:
    found = {}
    for name, value in tensors.items():
        new = name
        for old, now in changes:
            new = new.replace(old, now)
        found[new] = value
    return found


def in_kohya(tensors: Mapping[str, Tensor]) -> Tensors:
    """kohya's layout with diffusers' block names and an alpha of 1, its rank."""
    found = {}
    for name, value in tensors.items():
        module, _, end = name.partition(".lora_")
        part, _, path = module.partition(".")
        flat = f"{PREFIXES[part]}_{path.replace('.', '_')}"
        found[f"{flat}.{'lora_down' if end[0] == 'A' else 'lora_up'}.weight"] = value
        found[f"{flat}.alpha"] = torch.tensor(1.0)
    return found


def in_sgm(tensors: Mapping[str, Tensor], sdxl: BaseNames) -> Tensors:
    """The same with SDXL's own block names."""
    own = {(target.part, target.module): name for name, target in sdxl.targets.items() if target.style == "kohya-sgm"}
    found = {}
    for name, value in tensors.items():
        stem, _, end = name.partition(".")
        target = sdxl.targets[stem]
        found[f"{own['unet', target.module] if target.part == 'unet' else stem}.{end}"] = value
    return found


def scripts_kohya_copy(tensors: Mapping[str, Tensor]) -> Tensors:
    """What `--output_kohya_format` of diffusers' script makes of a LoRA of all parts."""
    as_saved = renamed(unet_only(tensors), (".lora_A", ".lora.down"), (".lora_B", ".lora.up")) | renamed(
        text_only(tensors),
        (".lora_A", ".lora_linear_layer.down"),
        (".lora_B", ".lora_linear_layer.up"),
        ("text_encoder.text_model.", "text_encoder."),  # as transformers calls these layers now
    )
    return dict(convert_state_dict_to_kohya(convert_all_state_dict_to_peft(as_saved)))


def oldest(tensors: Mapping[str, Tensor]) -> Tensors:
    """diffusers' oldest names in all parts."""
    changes = [(f".{leaf}.lora_", f".processor.{leaf.removesuffix('.0')}_lora.lora_") for leaf in ATTENTION]
    text = zip(TEXT_LAYERS, ("to_q", "to_k", "to_v", "to_out"), strict=True)
    ends = (("_lora.lora_A", "_lora.down"), ("_lora.lora_B", "_lora.up"))
    return renamed(unet_only(tensors), *changes, *ends) | renamed(
        text_only(tensors), *[(f".{new}.lora_", f".{old}_lora.lora_") for new, old in text], *ends
    )


def mixed(tensors: Mapping[str, Tensor], sdxl: BaseNames) -> Tensors:
    """192 layers by SDXL's own block names, the others by diffusers'."""
    first = {name: value for name, value in unet_only(tensors).items() if name.startswith("unet.down_blocks.")}
    others = {name: value for name, value in unet_only(tensors).items() if name not in first}
    return in_sgm(in_kohya(first), sdxl) | in_kohya(others)


def without_out_proj_in_the_second(tensors: Mapping[str, Tensor]) -> Tensors:
    whole = in_kohya(tensors)
    return {name: value for name, value in whole.items() if "lora_te2" not in name or "out_proj" not in name}


def counts(**found: int) -> dict[str, int]:
    """The tools' counts: those named, and `rest` for all others."""
    rest = found.pop("rest")
    named = {name.replace("_", " "): count for name, count in found.items()}
    spelled = {"SD Next": "SD.Next", "sd scripts": "sd-scripts", "sd cpp": "stable-diffusion.cpp"}
    return dict.fromkeys(TOOLS, rest) | {spelled.get(name, name): count for name, count in named.items()}


Layout = Callable[[Tensors, BaseNames], Tensors]
# The layout, what each tool really loads of it, and the tools that give an error rather than a part.
TABLE: dict[str, tuple[Layout, dict[str, int], tuple[str, ...]]] = {
    "kohya, SDXL's own blocks": (lambda t, s: in_sgm(in_kohya(t), s), counts(rest=ALL), ()),
    "kohya, diffusers' blocks": (lambda t, s: in_kohya(t), counts(rest=ALL), ()),
    "PEFT": (
        lambda t, s: dict(t),
        counts(rest=0, ComfyUI=TEXT, sd_cpp=UNET, Draw_Things=UNET + FIRST, diffusers=ALL),
        ("Forge", "InvokeAI"),
    ),
    "diffusers' --output_kohya_format with text encoders": (
        lambda t, s: scripts_kohya_copy(t),
        counts(
            rest=0,
            ComfyUI=UNET + SECOND,
            AUTOMATIC1111=SECOND,
            SD_Next=TEXT,
            sd_scripts=SECOND,
            sd_cpp=UNET + SECOND,
            Draw_Things=SECOND,
        ),
        ("Forge", "InvokeAI", "diffusers"),
    ),
    "PEFT's own file of a UNet": (
        lambda t, s: renamed(unet_only(t), ("unet.", "base_model.model.")),
        counts(rest=0, Draw_Things=UNET),
        ("Forge", "InvokeAI"),
    ),
    "PEFT with the adapter's name": (
        lambda t, s: renamed(unet_only(t), (".weight", ".default.weight")),
        counts(rest=0, sd_cpp=UNET, Draw_Things=UNET),
        ("Forge", "InvokeAI"),
    ),
    "PEFT with the adapter's name and text encoders": (
        lambda t, s: renamed(t, (".weight", ".default.weight")),
        counts(rest=0, ComfyUI=TEXT, sd_cpp=UNET, Draw_Things=UNET + FIRST),
        ("Forge", "InvokeAI", "diffusers"),
    ),
    "kohya without out_proj in the second text encoder": (
        lambda t, s: without_out_proj_in_the_second(t),
        counts(rest=ALL - 32, AUTOMATIC1111=UNET + FIRST, diffusers=0),
        ("diffusers",),
    ),
    "kohya without text_model": (
        lambda t, s: renamed(in_kohya(t), ("_text_model_", "_")),
        counts(rest=UNET, Forge=0, SD_Next=UNET + FIRST, diffusers=0),
        ("Forge", "diffusers"),
    ),
    "kohya, text encoders alone": (
        lambda t, s: text_only(in_kohya(t)),
        counts(rest=TEXT, InvokeAI=0),
        ("InvokeAI",),
    ),
    "the oldest names in all parts": (
        lambda t, s: oldest(t),
        counts(rest=0, ComfyUI=UNET, sd_cpp=UNET, diffusers=ALL),
        ("Forge", "InvokeAI"),
    ),
    "both kinds of block names": (
        lambda t, s: mixed(t, s),
        counts(rest=UNET, InvokeAI=0, sd_scripts=0, diffusers=368),
        ("InvokeAI", "sd-scripts"),
    ),
    "ComfyUI's own names": (
        lambda t, s: comfyui_names(t, s),
        counts(rest=0, ComfyUI=ALL, sd_cpp=UNET, Draw_Things=UNET),
        ("Forge", "InvokeAI"),
    ),
    "ComfyUI's own names, UNet": (
        lambda t, s: comfyui_names(unet_only(t), s),
        counts(rest=0, ComfyUI=UNET, Forge=UNET, sd_cpp=UNET, Draw_Things=UNET),
        ("InvokeAI",),
    ),
    "LyCORIS names": (
        lambda t, s: renamed(unet_only(in_kohya(t)), ("lora_unet_", "lycoris_")),
        counts(rest=0, ComfyUI=UNET, Forge=UNET, sd_cpp=UNET, Draw_Things=UNET),
        ("InvokeAI", "diffusers"),
    ),
    "kohya with the embeddings of new tokens": (
        lambda t, s: in_sgm(in_kohya(t), s) | embeddings(1),
        counts(rest=ALL, diffusers=0),
        ("diffusers",),
    ),
    "kohya with the embeddings of seven new tokens": (
        lambda t, s: in_sgm(in_kohya(t), s) | embeddings(7),
        counts(rest=ALL, Forge=0, diffusers=0),
        ("Forge", "diffusers"),
    ),
    "kohya with norms of the UNet": (
        lambda t, s: in_sgm(in_kohya(t), s) | norms(s),
        counts(rest=ALL, diffusers=0),
        ("diffusers",),
    ),
    "kohya, diffusers' blocks with norms of the UNet": (
        lambda t, s: in_kohya(t) | norms(s, original=False),
        counts(rest=ALL, diffusers=0),
        ("diffusers",),
    ),
    "kohya, SDXL's own blocks with norms of diffusers' blocks": (
        lambda t, s: in_sgm(in_kohya(t), s) | norms(s, original=False),
        counts(rest=ALL, InvokeAI=0, diffusers=0),
        ("InvokeAI", "diffusers"),
    ),
    "kohya with norms of a text encoder": (
        lambda t, s: in_sgm(in_kohya(t), s) | text_norms(),
        counts(rest=ALL, Forge=0, diffusers=0),
        ("Forge", "diffusers"),
    ),
    "kohya with changes of the layers' biases": (
        lambda t, s: (
            in_sgm(in_kohya(t), s)
            | {f"{name}.diff_b": torch.ones(4) for name in layer_names(in_sgm(in_kohya(t), s)) if "to_out" in name}
        ),
        counts(rest=ALL, diffusers=0),
        ("diffusers",),
    ),
    "kohya, convolutions, diffusers' blocks": (
        lambda t, s: in_kohya(convolutions(s)),
        counts(rest=CONVOLUTIONS, AUTOMATIC1111=CONVOLUTIONS - 1),
        (),
    ),
    "kohya, convolutions, SDXL's own blocks": (
        lambda t, s: in_sgm(in_kohya(convolutions(s)), s),
        counts(rest=CONVOLUTIONS, InvokeAI=0),
        ("InvokeAI",),
    ),
    "kohya with half a layer of an unknown name": (
        lambda t, s: in_sgm(in_kohya(t), s) | {"lora_unet_extra.lora_down.weight": torch.ones(1, 8)},
        counts(rest=ALL, InvokeAI=0, diffusers=0),
        ("InvokeAI", "diffusers"),
    ),
    "kohya, diffusers' blocks, with a layer of an unknown name": (
        lambda t, s: in_kohya(t | {f"unet.extra.lora_{side}.weight": torch.ones(1, 1) for side in "AB"}),
        counts(rest=ALL),
        (),
    ),
}


def layer_names(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")]


def embeddings(tokens: int) -> Tensors:
    """A1111's bundle: each new token has a row for both text encoders."""
    widths = {"clip_l": 768, "clip_g": 1280}
    return {
        f"bundle_emb.style-{number}.string_to_param.{part}": torch.ones(1, width)
        for number in range(tokens)
        for part, width in widths.items()
    }


def norms(sdxl: BaseNames, original: bool = True) -> Tensors:
    """LyCORIS's changes of all norms of the UNet, beside the factors."""
    found = {}
    for module, layer in sdxl.denoiser.named_modules():
        if isinstance(layer, torch.nn.GroupNorm | torch.nn.LayerNorm):
            path = original_path(module, 2) if original else module
            for kind in ("w_norm", "b_norm"):
                found[f"lora_unet_{path.replace('.', '_')}.{kind}"] = torch.ones(4)
    assert len(found) > 100
    return found


def text_norms() -> Tensors:
    names = [f"lora_te1_text_model_encoder_layers_{layer}_layer_norm1" for layer in range(12)]
    return {f"{name}.{kind}": torch.ones(4) for name in names for kind in ("w_norm", "b_norm")}


def convolutions(sdxl: BaseNames) -> Tensors:
    """A LoRA on every convolution and time projection of the UNet's blocks, in PEFT's names."""
    found = {}
    for module, (out, *inner) in sdxl.shapes["unet"].items():
        if module.endswith("time_emb_proj") or (len(inner) == 3 and module.startswith(("down", "mid", "up"))):
            found[f"unet.{module}.lora_A.weight"] = torch.ones(1, *inner)
            found[f"unet.{module}.lora_B.weight"] = torch.ones(out, 1, *[1] * len(inner[1:]))
    assert len(found) == 2 * CONVOLUTIONS
    return found


def comfyui_names(tensors: Mapping[str, Tensor], sdxl: BaseNames) -> Tensors:
    own = {(target.part, target.module): name for name, target in sdxl.targets.items() if target.style == "comfyui"}
    found = {}
    for name, value in tensors.items():
        module, _, end = name.partition(".lora_")
        part, _, path = module.partition(".")
        found[f"{own[part, path]}.{'lora_down' if end[0] == 'A' else 'lora_up'}.weight"] = value
    return found


@pytest.mark.parametrize("layout", TABLE)
def test_each_tool_loads_the_listed_layers_of_each_layout(
    attention: Tensors, sdxl: BaseNames, tmp_path: Path, layout: str
) -> None:
    make, loaded, errors = TABLE[layout]
    web = {"ss_base_model_version": "sdxl_base_v1-0"}
    path = saved(make(attention, sdxl), tmp_path / "x.safetensors", **web)
    found = tool_support(parse_layers(read_header(path), sdxl))
    assert {row.tool: row.layers for row in found} == loaded
    refusing = {row.tool for row in found if "rejects" in row.note or "cannot recognize" in row.note}
    assert refusing == set(errors)


@pytest.fixture(scope="module")
def pipeline(base: Path) -> Any:
    return adapted(base)


@pytest.fixture(scope="module")
def of_attention(base: Path) -> Any:
    return adapted(base, ATTENTION, TEXT_LAYERS)


def kept(tensors: Mapping[str, Tensor], keep: Callable[[str], bool]) -> Tensors:
    return {name: value for name, value in tensors.items() if keep(name)}


def half_and_half(pipeline: Any) -> Tensors:
    unet = factors(pipeline)["unet"]
    down = {module: value for module, value in unet.items() if module.startswith("down_blocks.")}
    others = {module: value for module, value in unet.items() if module not in down}
    return kohya({"unet": down}) | kohya({"unet": others}, original=False)


def text_to_linear(name: str) -> bool:
    return not name.startswith("text") or "_proj." not in name


# What a stock pipeline is given: of attention layers alone, or of convolutions and feed-forward layers too.
OF_ATTENTION: dict[str, Callable[[Any, Path], Tensors]] = {
    "kohya": lambda p, f: kohya(factors(p)),
    "peft": lambda p, f: peft(factors(p), ALPHAS),
    "script": lambda p, f: load_file(by_diffusers(p, f, old_names=True)),
    "script-kohya": lambda p, f: scripts_kohya_copy(peft(factors(p))),
    "script-kohya-unet": lambda p, f: dict(
        convert_state_dict_to_kohya(convert_all_state_dict_to_peft(unet_only(load_file(by_diffusers(p, f, True)))))
    ),
    "peft-own": lambda p, f: renamed(unet_only(peft(factors(p))), ("unet.", "base_model.model.")),
    "peft-own-in-unet": lambda p, f: renamed(unet_only(peft(factors(p))), ("unet.", "unet.base_model.model.")),
    "adapter-name": lambda p, f: renamed(unet_only(peft(factors(p))), (".weight", ".default.weight")),
    "adapter-name-text": lambda p, f: renamed(peft(factors(p)), (".weight", ".default.weight")),
    "no-out_proj-2": lambda p, f: kept(kohya(factors(p)), lambda n: "lora_te2" not in n or "out_proj" not in n),
    "no-out_proj-1": lambda p, f: kept(kohya(factors(p)), lambda n: "lora_te1" not in n or "out_proj" not in n),
    "short-1": lambda p, f: renamed(kohya(factors(p)), ("lora_te1_text_model_", "lora_te1_")),
    "short-2": lambda p, f: renamed(kohya(factors(p)), ("lora_te2_text_model_", "lora_te2_")),
    "peft-short-1": lambda p, f: renamed(peft(factors(p)), ("text_encoder.text_model.", "text_encoder.")),
    "peft-short-2": lambda p, f: renamed(peft(factors(p)), ("text_encoder_2.text_model.", "text_encoder_2.")),
    "bare": lambda p, f: renamed(unet_only(peft(factors(p))), ("unet.", "")),
    "processor": lambda p, f: processor(factors(p), ALPHAS),
    "oldest": lambda p, f: with_old_text(processor(factors(p), ALPHAS)),
    "oldest-no-out": lambda p, f: kept(
        with_old_text(processor(factors(p), ALPHAS)), lambda n: not n.startswith("text") or "to_out" not in n
    ),
    "text-lora.down": lambda p, f: renamed(load_file(by_diffusers(p, f, True)), (".lora_linear_layer.", ".lora.")),
    "mixed-blocks": lambda p, f: half_and_half(p),
    "lycoris": lambda p, f: lycoris(factors(p)),
    "lycoris-no-alpha": lambda p, f: kept(lycoris(factors(p)), lambda n: "alpha" not in n),
    "comfyui": lambda p, f: comfyui(factors(p)),
    "peft-with-alpha": lambda p, f: peft(factors(p)) | {"unet.conv_in.alpha": torch.tensor(1.0)},
    "peft-and-kohya": lambda p, f: unet_only(peft(factors(p))) | kept(text_only(kohya(factors(p))), _no_alpha),
    "strange-layer": lambda p, f: (
        kohya(factors(p))
        | {"lora_unet_x.lora_down.weight": torch.ones(4, 8), "lora_unet_x.lora_up.weight": torch.ones(8, 4)}
    ),
    "strange-alpha": lambda p, f: kohya(factors(p)) | {"lora_unet_x.alpha": torch.tensor(1.0)},
    "strange-down": lambda p, f: kohya(factors(p)) | {"lora_unet_x.lora_down.weight": torch.ones(4, 8)},
    "strange-up": lambda p, f: kohya(factors(p)) | {"lora_te1_x.lora_up.weight": torch.ones(8, 4)},
    "strange-down-text": lambda p, f: kohya(factors(p)) | {"lora_te1_x.lora_down.weight": torch.ones(4, 8)},
    "strange-layer-text": lambda p, f: (
        kohya(factors(p))
        | {"lora_te2_x.lora_down.weight": torch.ones(4, 8), "lora_te2_x.lora_up.weight": torch.ones(8, 4)}
    ),
    "norms": lambda p, f: kohya(factors(p)) | {"lora_unet_input_blocks_3_1_norm.w_norm": torch.ones(32)},
    "embeddings": lambda p, f: kohya(factors(p)) | embeddings(1),
    "peft-strange-down": lambda p, f: peft(factors(p)) | {"unet.x.lora_A.weight": torch.ones(4, 8)},
    "peft-strange-up": lambda p, f: peft(factors(p)) | {"unet.x.lora_B.weight": torch.ones(8, 4)},
    "peft-strange-down-text": lambda p, f: peft(factors(p)) | {"text_encoder.x.lora_A.weight": torch.ones(4, 8)},
    "peft-strange-layer": lambda p, f: (
        peft(factors(p)) | {"unet.x.lora_A.weight": torch.ones(4, 8), "unet.x.lora_B.weight": torch.ones(8, 4)}
    ),
    "peft-of-another-part": lambda p, f: peft(factors(p)) | {"other.x.lora_A.weight": torch.ones(4, 8)},
    "script-strange-down": lambda p, f: (
        load_file(by_diffusers(p, f, old_names=True)) | {"unet.x.lora.down.weight": torch.ones(4, 8)}
    ),
    "script-strange-up": lambda p, f: (
        load_file(by_diffusers(p, f, old_names=True)) | {"unet.x.lora.up.weight": torch.ones(8, 4)}
    ),
}
OF_ALL: dict[str, Callable[[Any, Path], Tensors]] = {
    "all-kohya": lambda p, f: kohya(factors(p)),
    "all-peft": lambda p, f: peft(factors(p)),
    "all-script": lambda p, f: load_file(by_diffusers(p, f, old_names=True)),
    "all-no-out_proj": lambda p, f: kept(kohya(factors(p)), lambda n: "lora_te" not in n or "out_proj" not in n),
    "all-peft-text-fc": lambda p, f: kept(peft(factors(p)), text_to_linear),
    "all-peft-text-q": lambda p, f: kept(peft(factors(p)), lambda n: not n.startswith("text") or "q_proj" in n),
    "all-kohya-text-fc": lambda p, f: kept(kohya(factors(p)), lambda n: "lora_te" not in n or "proj" not in n),
}


def _no_alpha(name: str) -> bool:
    return not name.endswith(".alpha")


@pytest.mark.parametrize("layout", [*OF_ATTENTION, *OF_ALL])
def test_diffusers_loads_as_many_layers_as_reported(
    pipeline: Any, of_attention: Any, base: Path, tmp_path: Path, layout: str
) -> None:
    make, source = (OF_ATTENTION[layout], of_attention) if layout in OF_ATTENTION else (OF_ALL[layout], pipeline)
    tensors = make(source, tmp_path / "made.safetensors")
    path = saved(tensors, tmp_path / "x.safetensors")
    reported = next(
        row for row in tool_support(parse_layers(read_header(path), names(base))) if row.tool == "diffusers"
    )
    loaded = applied_by_diffusers(base, path)
    assert (reported.layers, "rejects" in reported.note) == (loaded or 0, loaded is None)


def applied_by_diffusers(base: Path, path: Path) -> int | None:
    """How many layers a stock pipeline changes; None for an error."""
    try:
        found = as_diffusers_loads(base, path)
    except (ValueError, IndexError, KeyError):
        return None
    return sum(not value.is_meta and bool(value.any()) for value in found.values())


def names(base: Path) -> BaseNames:
    return base_names(str(base))


def with_alpha(tensors: Mapping[str, Tensor], chosen: Callable[[str], bool], alpha: float | None) -> Tensors:
    """`tensors` with another alpha where `chosen`, or with none."""
    found = dict(tensors)
    for name in tensors:
        if name.endswith(".alpha") and chosen(name):
            del found[name]
            if alpha is not None:
                found[name] = torch.tensor(alpha)
    return found


@pytest.mark.parametrize(
    ("chosen", "alpha", "is_noted"),
    [
        (lambda name: False, 1.0, False),
        (lambda name: any(end in name for end in ("_layers_2", "_layers_3", "_op.", "skip", "conv.")), 1.0, False),
        (lambda name: "_ff_net_" in name, 1.0, False),
        (lambda name: "lora_te2" in name and "_mlp_" in name, 1.0, False),
        (lambda name: "lora_te1" in name and "_mlp_" in name, 1.0, True),
        (lambda name: "_attn1_to_q" in name, 1.0, True),
        (lambda name: "lora_te2" in name and "q_proj" in name, 1.0, True),
        (lambda name: "_proj_in" in name, None, True),
    ],
    ids=["one-alpha", "locon", "feed-forward", "second-mlp", "first-mlp", "attention", "text-attention", "no-alpha"],
)
def test_the_note_on_alphas_appears_if_diffusers_changes_a_layer_s_alpha(
    pipeline: Any, base: Path, tmp_path: Path, chosen: Callable[[str], bool], alpha: float | None, is_noted: bool
) -> None:
    path = saved(with_alpha(kohya(factors(pipeline)), chosen, alpha), tmp_path / "x.safetensors")
    lora = parse_layers(read_header(path), names(base))
    found = as_diffusers_loads(base, path)
    expected = {
        f"{part}.{module}": update.scale * (update.up.flatten(1) @ update.down.flatten(1))
        for part, layers in lora.updates.items()
        for module, update in layers.items()
    }
    wrong = [name for name in found if not torch.allclose(found[name].flatten(1), expected[name], atol=1e-5)]
    assert bool(wrong) == is_noted
    note = next(row.note for row in tool_support(lora) if row.tool == "diffusers")
    assert note == (
        f"{len(wrong)} layers get the most common alpha of their part instead of their own" if wrong else ""
    )


def test_the_weight_changes_of_these_tests_are_not_zero(pipeline: Any) -> None:
    assert all(bool(value.any()) for value in deltas(pipeline).values())
