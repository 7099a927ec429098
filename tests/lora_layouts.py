"""One random LoRA on the tiny random pipeline, and the layouts in which programs have written such files; by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

PARTS = ("unet", "text_encoder", "text_encoder_2")
ALPHAS = {"unet": 6.0, "text_encoder": 3.0, "text_encoder_2": 10.0}
RANK = 4
UNET = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1", "conv_shortcut")
UNET_MORE = ("downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

Factors = dict[str, dict[str, tuple[Tensor, Tensor]]]


def adapted(base: Path, unet: tuple[str, ...] = UNET + UNET_MORE, text: tuple[str, ...] = TEXT) -> Any:
    """The pipeline with a LoRA of clear effect, its alpha not its rank and another one in each part."""
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(base)
    rng = torch.Generator().manual_seed(5)
    for part in PARTS:
        targets = unet if part == "unet" else text
        if not targets:
            continue
        model = getattr(pipeline, part)
        model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHAS[part], target_modules=list(targets)))
        for layer in lora_layers(model).values():
            for side in (layer.lora_A, layer.lora_B):
                weight = side["default"].weight.data
                weight.copy_(torch.randn(weight.shape, generator=rng) * 0.2)
    return pipeline


def lora_layers(model: torch.nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def shared(part: str, name: str) -> str:
    """A module's path with `text_model.`, as every released file has it."""
    return name if part == "unet" or name.startswith("text_model.") else f"text_model.{name}"


def factors(pipeline: Any) -> Factors:
    """A and B by shared path and part; B without the scale."""
    return {
        part: {
            shared(part, name): tuple(side["default"].weight.detach().clone() for side in (layer.lora_A, layer.lora_B))
            for name, layer in lora_layers(getattr(pipeline, part)).items()
        }
        for part in PARTS
        if lora_layers(getattr(pipeline, part))
    }


def deltas(pipeline: Any) -> dict[str, Tensor]:
    """What PEFT adds to each weight, by `PART.PATH`: the sum over the loaded adapters."""
    return {
        f"{part}.{shared(part, name)}": sum(layer.get_delta_weight(adapter) for adapter in layer.lora_A).detach()
        for part in PARTS
        for name, layer in lora_layers(getattr(pipeline, part)).items()
    }


@lru_cache(maxsize=1)
def _stock(base: Path) -> Any:
    return StableDiffusionXLPipeline.from_pretrained(base)


def as_diffusers_loads(base: Path, file: Path) -> dict[str, Tensor]:
    """What a stock pipeline adds to each weight with this file."""
    pipeline = _stock(base)
    try:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        loaded = deltas(pipeline)
        pipeline.unload_lora_weights()
    except Exception:
        _stock.cache_clear()  # a part of the file may be loaded
        raise
    return loaded


def sgm(module: str) -> str:
    """A layer's name in the original numbering for a UNet of one layer per block, by a table for the test's base."""
    heads = {
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
        "down_blocks.1.attentions.0": "input_blocks.3.1",
        "down_blocks.1.downsamplers.0.conv": "input_blocks.4.0.op",
        "down_blocks.2.resnets.0": "input_blocks.5.0",
        "down_blocks.2.attentions.0": "input_blocks.5.1",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        **{f"up_blocks.{i}.resnets.{j}": f"output_blocks.{2 * i + j}.0" for i in range(3) for j in range(2)},
        **{f"up_blocks.{i}.attentions.{j}": f"output_blocks.{2 * i + j}.1" for i in range(2) for j in range(2)},
        "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.3.2.conv",
    }
    tails = {"conv1": "in_layers.2", "conv_shortcut": "skip_connection", "time_emb_proj": "emb_layers.1"}
    head = next(head for head in heads if module == head or module.startswith(f"{head}."))
    tail = module.removeprefix(head).removeprefix(".")
    return heads[head] + (f".{tails.get(tail, tail)}" if tail else "")


def kohya(whole: Factors, alphas: Mapping[str, float] = ALPHAS, original: bool = True) -> dict[str, Tensor]:
    """kohya's layout with the original block names or with diffusers'; an alpha for each layer."""
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    tensors = {}
    for part, layers in whole.items():
        for module, (down, up) in layers.items():
            path = sgm(module) if original and part == "unet" else module
            name = f"{prefixes[part]}_{path.replace('.', '_')}"
            tensors[f"{name}.lora_down.weight"] = down
            tensors[f"{name}.lora_up.weight"] = up
            tensors[f"{name}.alpha"] = torch.tensor(alphas[part])
    return tensors


def peft(whole: Factors, alphas: Mapping[str, float] | None = None) -> dict[str, Tensor]:
    """`unet.PATH.lora_A.weight`; with `alphas` the scale is folded into B."""
    tensors = {}
    for part, layers in whole.items():
        for module, (down, up) in layers.items():
            scale = 1.0 if alphas is None else alphas[part] / len(down)
            tensors[f"{part}.{module}.lora_A.weight"] = down
            tensors[f"{part}.{module}.lora_B.weight"] = up * scale
    return tensors


def processor(whole: Factors, alphas: Mapping[str, float]) -> dict[str, Tensor]:
    """diffusers before 0.22: attention only, `processor.to_q_lora.down` and `q_proj.lora_linear_layer.down`."""
    tensors = {}
    for part, layers in whole.items():
        for module, (down, up) in layers.items():
            head, _, leaf = module.removesuffix(".0").rpartition(".")
            name = f"{part}.{module}.lora_linear_layer" if part != "unet" else f"{part}.{head}.processor.{leaf}_lora"
            tensors[f"{name}.down.weight"] = down
            tensors[f"{name}.up.weight"] = up * (alphas[part] / len(down))
    return tensors


def with_old_text(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`processor`'s layout with the oldest names in text encoders too: `to_q_lora.down`."""
    found = {}
    for name, value in tensors.items():
        new = name
        for now in ("q_proj", "k_proj", "v_proj", "out_proj"):
            new = new.replace(f".{now}.lora_linear_layer.", f".to_{now.removesuffix('_proj')}_lora.")
        found[new] = value
    return found


def comfyui(whole: Factors, alphas: Mapping[str, float] | None = None) -> dict[str, Tensor]:
    """The names of ComfyUI's own models, as its nodes save a LoRA; with `alphas` an alpha for each layer."""
    prefixes = {
        "unet": "diffusion_model",
        "text_encoder": "text_encoders.clip_l.transformer",
        "text_encoder_2": "text_encoders.clip_g.transformer",
    }
    tensors = {}
    for part, layers in whole.items():
        for module, (down, up) in layers.items():
            name = f"{prefixes[part]}.{sgm(module) if part == 'unet' else module}"
            tensors[f"{name}.lora_up.weight"] = up
            tensors[f"{name}.lora_down.weight"] = down
            if alphas is not None:
                tensors[f"{name}.alpha"] = torch.tensor(alphas[part])
    return tensors


def lycoris(whole: Factors, alphas: Mapping[str, float] = ALPHAS) -> dict[str, Tensor]:
    """A UNet's LoRA or LoCon as LyCORIS names it around a model of diffusers."""
    tensors = kohya({"unet": whole["unet"]}, alphas, original=False)
    return {name.replace("lora_unet_", "lycoris_"): value for name, value in tensors.items()}


def by_diffusers(pipeline: Any, path: Path, old_names: bool) -> Path:
    """The file that diffusers' own training scripts write, its alphas in the metadata."""
    states: dict[str, Any] = {}
    for part in PARTS:
        model = getattr(pipeline, part)
        if not lora_layers(model):
            continue
        state = get_peft_model_state_dict(model)
        states[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(state) if old_names else state
        states[f"{part}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    StableDiffusionXLPipeline.save_lora_weights(path.parent, weight_name=path.name, **states)
    return path


def saved(tensors: Mapping[str, Tensor], path: Path, **metadata: Any) -> Path:
    """Write a LoRA file; metadata that are not text as JSON."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    save_file({key: value.detach().contiguous() for key, value in tensors.items()}, path, metadata=texts)
    return path
