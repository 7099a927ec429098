"""Original names of layers against diffusers' converters, and the layers that a LoRA is put on."""

from __future__ import annotations

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux2_lora_to_diffusers,
    _convert_non_diffusers_flux2_lora_to_diffusers,
)
from tiny_models import normal
from tiny_random_klein import tiny_random_klein
from torch import Tensor, nn

from flatlora_diffusion.adapter.lora import denoiser_targets
from flatlora_diffusion.config import AdapterConfig, ModelConfig
from flatlora_diffusion.families.klein.family import KleinFamily
from flatlora_diffusion.families.klein.lora_names import original_layer

RANK = 3


def linear_layers(transformer: Flux2Transformer2DModel) -> dict[str, nn.Linear]:
    return {
        name: layer
        for name, layer in transformer.named_modules()
        if isinstance(layer, nn.Linear) and name != "norm_out.linear"
    }


def original_factors(transformer: Flux2Transformer2DModel) -> dict[str, tuple[Tensor, Tensor]]:
    """A (R, in) and B (out, R) of each original layer, in the sizes that its layers of diffusers have together."""
    sizes: dict[str, list[tuple[int, int]]] = {}
    for name, layer in linear_layers(transformer).items():
        sizes.setdefault(original_layer(name).path, []).append((layer.out_features, layer.in_features))
    return {
        path: (normal(index, RANK, shapes[0][1]), normal(-index - 1, sum(out for out, _ in shapes), RANK))
        for index, (path, shapes) in enumerate(sorted(sizes.items()))
    }


def expected(transformer: Flux2Transformer2DModel) -> dict[str, Tensor]:
    """Factors by diffusers' names, from the original ones."""
    originals, found = original_factors(transformer), {}
    for name in linear_layers(transformer):
        path, third = original_layer(name)
        down, up = originals[path]
        found[f"transformer.{name}.lora_A.weight"] = down
        found[f"transformer.{name}.lora_B.weight"] = up if third is None else up.chunk(3)[third]
    return found


def test_original_names_are_those_that_diffusers_converts() -> None:
    transformer = tiny_random_klein().transformer
    state: dict[str, Tensor] = {}
    for path, (down, up) in original_factors(transformer).items():
        state[f"diffusion_model.{path}.lora_A.weight"] = down
        state[f"diffusion_model.{path}.lora_B.weight"] = up
    converted = _convert_non_diffusers_flux2_lora_to_diffusers(state)
    ours = expected(transformer)
    assert converted.keys() == ours.keys()
    assert all(torch.equal(converted[name], value) for name, value in ours.items())


def test_kohya_names_are_the_original_ones_with_underscores() -> None:
    transformer = tiny_random_klein().transformer
    state: dict[str, Tensor] = {}
    for path, (down, up) in original_factors(transformer).items():
        name = f"lora_unet_{path.replace('.', '_')}"
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(RANK)}
    converted = _convert_kohya_flux2_lora_to_diffusers(state)
    ours = {name: value for name, value in expected(transformer).items() if "modulation" not in name}
    assert converted.keys() == ours.keys()
    assert all(torch.equal(converted[name], value) for name, value in ours.items())


def test_attention_targets_are_those_of_diffusers_script() -> None:
    """Its list: five ends, and attn.to_out of the single blocks."""
    transformer = tiny_random_klein().transformer
    ends = ["to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj"]
    ends += [f"single_transformer_blocks.{index}.attn.to_out" for index in range(24)]
    theirs = {name for name in linear_layers(transformer) if any(f".{name}".endswith(f".{end}") for end in ends)}
    ours = set(denoiser_targets(transformer, AdapterConfig()))
    assert ours == theirs
    assert len(ours) == 12
    both = set(denoiser_targets(transformer, AdapterConfig(lora_target_modules="attn+ff")))
    assert {name.split(".", 2)[2] for name in both - ours} == {
        f"{part}.linear_{end}" for part in ("ff", "ff_context") for end in ("in", "out")
    }
    every = set(denoiser_targets(transformer, AdapterConfig(lora_target_modules="all-linear")))
    assert every == {name for name in linear_layers(transformer) if "transformer_blocks." in name}


def test_klein_4b_has_sixty_adapted_layers() -> None:
    transformer = KleinFamily().on_meta(ModelConfig("black-forest-labs/FLUX.2-klein-base-4B"), "transformer")
    targets = denoiser_targets(transformer, AdapterConfig())
    assert len(targets) == 60
    assert sum(transformer.get_submodule(name).weight.numel() for name in targets) == 2_642_411_520
