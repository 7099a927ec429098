"""Every layout of a LoRA gives the same update of each weight, equal to that of diffusers; error messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_layouts import (
    ALPHAS,
    ATTENTION,
    RANK,
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
)
from torch import Tensor

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.lora_files.names import base_names, layer_shapes
from flatlora_diffusion.lora_files.reading import ImportedLora, import_lora, load_for_base
from flatlora_diffusion.lora_files.safe_reading import read_header


@pytest.fixture(scope="module")
def pipeline(base: Path) -> Any:
    return adapted(base)


@pytest.fixture(scope="module")
def attention(base: Path) -> Any:
    """Only the layers that the oldest layout can hold."""
    return adapted(base, ATTENTION, ("q_proj", "k_proj", "v_proj", "out_proj"))


def read(path: Path, base: Path | str | None) -> ImportedLora:
    return import_lora(read_header(path), None if base is None else str(base))


def updates(lora: ImportedLora) -> dict[str, Tensor]:
    """scale * B A by `PART.PATH`, with any layout's convolutions as (out, in, kh, kw)."""
    found = {}
    for part, layers in lora.updates.items():
        for module, (down, up, scale) in layers.items():
            product = scale * (up.flatten(1) @ down.flatten(1))
            found[f"{part}.{module}"] = product.view(len(up), *down.shape[1:])
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0.01, name
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=name)


def test_kohya_with_the_original_block_names_is_read(pipeline: Any, base: Path, tmp_path: Path) -> None:
    lora = read(saved(kohya(factors(pipeline)), tmp_path / "x.safetensors"), base)
    assert_same(updates(lora), deltas(pipeline))
    assert_same(as_diffusers_loads(base, tmp_path / "x.safetensors"), updates(lora))
    assert {layer.target.style for layer in lora.layers} == {"kohya-sgm"}
    assert {layer.alpha for layer in lora.layers if layer.target.part == "unet"} == {ALPHAS["unet"]}
    assert not lora.unknown


def test_kohya_with_diffusers_block_names_is_read(pipeline: Any, base: Path, tmp_path: Path) -> None:
    lora = read(saved(kohya(factors(pipeline), original=False), tmp_path / "x.safetensors"), base)
    assert_same(updates(lora), deltas(pipeline))
    assert {layer.target.style for layer in lora.layers if layer.target.part == "unet"} == {"kohya-diffusers"}


def test_kohya_without_alphas_has_the_scale_1(pipeline: Any, base: Path, tmp_path: Path) -> None:
    tensors = {name: value for name, value in kohya(factors(pipeline)).items() if not name.endswith(".alpha")}
    lora = read(saved(tensors, tmp_path / "x.safetensors"), base)
    by_alpha = deltas(pipeline)
    expected = {name: value * RANK / ALPHAS[name.split(".")[0]] for name, value in by_alpha.items()}
    assert_same(updates(lora), expected)


def test_kohya_with_an_alpha_for_each_layer_is_read(pipeline: Any, base: Path, tmp_path: Path) -> None:
    """diffusers gives the commonest alpha to all; other tools and we do not."""
    tensors = kohya(factors(pipeline))
    names = [name for name in tensors if name.endswith(".alpha")]
    for index, name in enumerate(names):
        tensors[name] = torch.tensor(1 + index % 3)  # whole numbers, as diffusers' own converter writes them
    lora = read(saved(tensors, tmp_path / "x.safetensors"), base)
    alphas = {layer.name: layer.alpha for layer in lora.layers}
    assert set(alphas.values()) == {1.0, 2.0, 3.0}
    by_alpha, found = deltas(pipeline), updates(lora)
    for layer in lora.layers:
        part, module, _ = layer.target
        assert layer.alpha == float(tensors[f"{layer.name}.alpha"])
        expected = by_alpha[f"{part}.{module}"] * layer.alpha / ALPHAS[part]
        torch.testing.assert_close(found[f"{part}.{module}"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("old_names", [False, True], ids=["lora_A", "lora.down"])
def test_the_files_of_diffusers_scripts_are_read(attention: Any, base: Path, tmp_path: Path, old_names: bool) -> None:
    path = by_diffusers(attention, tmp_path / "x.safetensors", old_names)
    lora = read(path, base)
    assert_same(updates(lora), deltas(attention))
    assert_same(as_diffusers_loads(base, path), updates(lora))
    assert {layer.target.style for layer in lora.layers} == {"diffusers-old" if old_names else "peft"}


def test_a_file_with_two_kinds_of_names_is_read_completely(pipeline: Any, base: Path, tmp_path: Path) -> None:
    """diffusers' converter renames attention only, and its loader then skips one of the two kinds."""
    lora = read(by_diffusers(pipeline, tmp_path / "x.safetensors", old_names=True), base)
    assert_same(updates(lora), deltas(pipeline))
    assert {layer.target.style for layer in lora.layers} == {"diffusers-old", "peft"}


def test_peft_with_the_scale_in_the_factors_is_read(pipeline: Any, base: Path, tmp_path: Path) -> None:
    path = saved(peft(factors(pipeline), ALPHAS), tmp_path / "x.safetensors")
    assert_same(updates(read(path, base)), deltas(pipeline))
    assert_same(as_diffusers_loads(base, path), deltas(pipeline))


def test_peft_without_text_model_and_with_its_own_prefix_is_read(pipeline: Any, base: Path, tmp_path: Path) -> None:
    tensors = peft(factors(pipeline), ALPHAS)
    short = {name.replace(".text_model.", "."): value for name, value in tensors.items()}
    assert_same(updates(read(saved(short, tmp_path / "x.safetensors"), base)), deltas(pipeline))
    unet = {name.removeprefix("unet."): value for name, value in tensors.items() if name.startswith("unet.")}
    bare = read(saved(unet, tmp_path / "y.safetensors"), base)
    saved_by_peft = {f"base_model.model.{name}": value for name, value in unet.items()}
    wrapped = read(saved(saved_by_peft, tmp_path / "z.safetensors"), base)
    expected = {name: value for name, value in deltas(pipeline).items() if name.startswith("unet.")}
    assert_same(updates(bare), expected)
    assert_same(updates(wrapped), expected)


def test_rank_stabilized_scale_and_patterns_in_the_metadata_are_applied(
    pipeline: Any, base: Path, tmp_path: Path
) -> None:
    unet = {name: value for name, value in peft(factors(pipeline)).items() if name.startswith("unet.")}
    one = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    settings = {"unet.r": RANK, "unet.lora_alpha": 6, "unet.use_rslora": True, "unet.alpha_pattern": {one: 8}}
    lora = read(saved(unet, tmp_path / "x.safetensors", lora_adapter_metadata=settings), base)
    scales = {module: update.scale for module, update in lora.updates["unet"].items()}
    assert scales.pop(one) == 8 / RANK**0.5
    assert set(scales.values()) == {6 / RANK**0.5}


def saved_by_peft(folder: Path, pipeline: Any, config: dict[str, Any] | None) -> Path:
    """The UNet's LoRA as PEFT itself saves a model, with its adapter_config.json."""
    folder.mkdir()
    tensors = {name: value for name, value in peft(factors(pipeline)).items() if name.startswith("unet.")}
    named = {f"base_model.model.{name.removeprefix('unet.')}": value for name, value in tensors.items()}
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return saved(named, folder / "adapter_model.safetensors")


def test_the_scale_of_a_peft_file_is_read_from_adapter_config_json(
    pipeline: Any, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    config = {"r": RANK, "lora_alpha": 16, "use_rslora": False, "alpha_pattern": {one: 8}, "rank_pattern": {}}
    for name, settings, scale, of_one in (
        ("plain", config, 4.0, 2.0),
        ("stabilized", config | {"use_rslora": True}, 8.0, 4.0),
    ):
        path = saved_by_peft(tmp_path / name, pipeline, settings)
        scales = {module: update.scale for module, update in read(path, base).updates["unet"].items()}
        assert scales.pop(one) == of_one
        assert set(scales.values()) == {scale}
    assert "adapter_config.json" not in caplog.text
    alone = read(saved_by_peft(tmp_path / "alone", pipeline, None), base)
    assert {update.scale for update in alone.updates["unet"].values()} == {1.0}
    assert "adapter_config.json" in caplog.text


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"lora_alpha": 8, "use_dora": True}, "use_dora in adapter_config.json"),
        ({"lora_alpha": "8"}, "lora_alpha of .*'8'"),
        ({"lora_alpha": 8, "alpha_pattern": {".*to_q": 4}}, r"alpha_pattern \.\*to_q"),
        ([], "adapter_config.json"),
    ],
)
def test_unsupported_settings_of_peft_are_an_error_of_one_sentence(
    pipeline: Any, base: Path, tmp_path: Path, config: Any, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read(saved_by_peft(tmp_path / "x", pipeline, config), base)


def test_a_dora_in_peft_s_layout_loads_only_if_it_is_complete(pipeline: Any, base: Path, tmp_path: Path) -> None:
    unet = {name: value for name, value in peft(factors(pipeline)).items() if name.startswith("unet.")}
    magnitudes = {
        name.replace(".lora_B.weight", ".lora_magnitude_vector"): torch.rand(len(value))
        for name, value in unet.items()
        if name.endswith("lora_B.weight")
    }
    names = base_names(str(base))

    def loaded(tensors: dict[str, Tensor]) -> ImportedLora:
        return load_for_base(read_header(saved(tensors, tmp_path / "x.safetensors")), names)

    found = loaded(unet | magnitudes).magnitudes["unet"]
    assert len(found) == len(magnitudes)
    for module, value in found.items():
        assert torch.equal(value.flatten(), magnitudes[f"unet.{module}.lora_magnitude_vector"])
    with pytest.raises(ConfigError, match=r"contains DoRA"):
        read(tmp_path / "x.safetensors", base)
    first = next(iter(magnitudes))
    with pytest.raises(ConfigError, match="magnitude"):
        loaded(unet | {first: magnitudes[first]})
    with pytest.raises(ConfigError, match=r"shape \(3,\)"):
        loaded(unet | magnitudes | {first: torch.ones(3)})


def test_the_oldest_names_of_diffusers_are_read(attention: Any, base: Path, tmp_path: Path) -> None:
    path = saved(processor(factors(attention), ALPHAS), tmp_path / "x.safetensors")
    lora = read(path, base)
    assert_same(updates(lora), deltas(attention))
    assert {layer.target.style for layer in lora.layers if layer.target.part == "unet"} == {"processor"}
    assert_same(as_diffusers_loads(base, path), updates(lora))


@pytest.mark.parametrize("alphas", [ALPHAS, None], ids=["alphas", "no-alphas"])
def test_the_names_of_comfyui_are_read(
    pipeline: Any, base: Path, tmp_path: Path, alphas: dict[str, float] | None
) -> None:
    """With the changes of biases and norms beside the factors, as its nodes save them unless told not to."""
    small = {
        "diffusion_model.out.2.diff_b": torch.ones(4),
        "diffusion_model.input_blocks.1.0.in_layers.0.diff": torch.ones(8),
    }
    lora = read(saved(comfyui(factors(pipeline), alphas) | small, tmp_path / "x.safetensors"), base)
    expected = deltas(pipeline)
    if alphas is None:
        expected = {name: value * RANK / ALPHAS[name.split(".")[0]] for name, value in expected.items()}
    assert_same(updates(lora), expected)
    assert {layer.target.style for layer in lora.layers} == {"comfyui"}
    assert sorted(lora.unknown) == sorted(small)


def test_a_locon_with_the_names_of_lycoris_is_read(pipeline: Any, base: Path, tmp_path: Path) -> None:
    lora = read(saved(lycoris(factors(pipeline)), tmp_path / "x.safetensors"), base)
    assert_same(updates(lora), {name: value for name, value in deltas(pipeline).items() if name.startswith("unet.")})
    assert {layer.target.style for layer in lora.layers} == {"lycoris"}


def test_unknown_keys_are_listed_and_the_others_are_read(pipeline: Any, base: Path, tmp_path: Path) -> None:
    more = {
        "lora_unet_no_such_layer.lora_down.weight": torch.ones(4, 8),
        "lora_unet_no_such_layer.alpha": torch.ones(()),
    }
    lora = read(saved(kohya(factors(pipeline)) | more, tmp_path / "x.safetensors"), base)
    assert sorted(lora.unknown) == sorted(more)
    assert_same(updates(lora), deltas(pipeline))


@pytest.mark.parametrize("original", [True, False])
def test_every_layer_of_real_sdxl_is_found_by_its_name(original: bool) -> None:
    """794 layers in blocks, six outside of them, and the text encoders' linear layers."""
    names = base_names()
    style = "kohya-sgm" if original else "kohya-diffusers"
    found = [
        target for name, target in names.targets.items() if name.startswith("lora_unet") and target.style == style
    ]
    assert {target.module for target in found} == set(names.shapes["unet"])
    assert len(found) == len(names.shapes["unet"]) == 794
    target = names.target("lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k", "peft")
    assert target is not None
    assert target.module == "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k"
    assert names.shapes["unet"][target.module] == (1280, 2048)
    assert len(names.shapes["text_encoder"]) == 12 * 6
    assert len(names.shapes["text_encoder_2"]) == 32 * 6 + 1


def test_a_quantized_layer_has_the_shape_of_its_unquantized_weight() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Conv2d(2, 3, 5))
    model[0].weight = torch.nn.Parameter(torch.zeros(24, 1, dtype=torch.uint8), requires_grad=False)
    assert layer_shapes("unet", model) == {"0": (6, 8), "1": (3, 2, 5, 5)}


def test_sdxl_and_the_tiny_base_are_distinguished_by_shapes(tmp_path: Path) -> None:
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    for width, out, base in ((2048, 640, "SDXL"), (224, 96, "tiny")):
        tensors = {f"{name}.lora_down.weight": torch.ones(2, width), f"{name}.lora_up.weight": torch.ones(out, 2)}
        assert read(saved(tensors, tmp_path / f"{base}.safetensors"), None).base.base == base


def with_one(name: str, width: int, out: int, end: tuple[str, str] = ("lora_down", "lora_up")) -> dict[str, Tensor]:
    return {f"{name}.{end[0]}.weight": torch.ones(2, width), f"{name}.{end[1]}.weight": torch.ones(out, 2)}


ATTN2 = "transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    ("tensors", "family"),
    [
        (with_one(f"lora_unet_down_blocks_1_attentions_0_{ATTN2}", 768, 640), "Stable Diffusion 1"),
        (with_one(f"lora_unet_down_blocks_1_attentions_0_{ATTN2}", 1024, 640), "Stable Diffusion 2"),
        (with_one(f"lora_unet_up_blocks_3_attentions_0_{ATTN2}", 99, 320), "Stable Diffusion 1 or 2"),
        (with_one(f"lora_unet_input_blocks_11_1_{ATTN2}", 99, 320), "Stable Diffusion 1 or 2"),
        (with_one("lora_te_text_model_encoder_layers_0_mlp_fc1", 768, 3072), "Stable Diffusion 1 or 2"),
        (with_one("lora_unet_double_blocks_18_img_attn_qkv", 3072, 9216), "Flux"),
        (with_one("transformer.single_transformer_blocks.0.attn.to_q", 8, 8, ("lora_A", "lora_B")), "Flux"),
        (with_one("lora_unet_joint_blocks_0_x_block_attn_qkv", 1536, 4608), "Stable Diffusion 3"),
        (
            with_one("transformer.transformer_blocks.0.attn.add_k_proj", 1536, 1536, ("lora_A", "lora_B")),
            "Stable Diffusion 3",
        ),
        (with_one("diffusion_model.blocks.0.self_attn.q", 8, 8, ("lora_A", "lora_B")), "a transformer model"),
    ],
)
def test_the_error_for_a_lora_of_another_family_names_the_family(
    tmp_path: Path, tensors: dict[str, Tensor], family: str
) -> None:
    remedy = ".*klein.*--base$" if family in ("Flux", "Stable Diffusion 3", "a transformer model") else "$"
    with pytest.raises(ConfigError, match=f"is a LoRA for {family}.*, not for SDXL{remedy}"):
        read(saved(tensors, tmp_path / "x.safetensors"), None)


NAME = f"lora_unet_input_blocks_4_1_{ATTN2}"
DOWN, UP = f"{NAME}.lora_down.weight", f"{NAME}.lora_up.weight"
GOOD = with_one(NAME, 2048, 640)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (GOOD | {f"{NAME}.dora_scale": torch.ones(640, 1)}, "contains DoRA, .* not portable"),
        (GOOD | {f"{NAME}.lora_magnitude_vector": torch.ones(640)}, "contains DoRA"),
        ({f"{NAME}.lokr_w1": torch.ones(4, 4)}, "contains LoKr"),
        ({f"{NAME}.hada_w1_a": torch.ones(4, 4)}, "contains LoHa"),
        ({f"lycoris_down_blocks_1_attentions_0_{ATTN2}.lokr_w1": torch.ones(4, 4)}, "contains LoKr"),
        ({f"lycoris_down_blocks_1_attentions_0_{ATTN2}.hada_w2_b": torch.ones(4, 4)}, "contains LoHa"),
        (GOOD | {f"{NAME}.diff": torch.ones(640, 2048)}, "contains full weights"),
        ({f"{NAME}.oft_blocks": torch.ones(4, 4)}, "contains OFT"),
        ({f"{NAME}.diff": torch.ones(4, 4)}, "contains full weights"),
        (GOOD | {f"{NAME}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "contains LoCon with Tucker"),
        ({DOWN: GOOD[DOWN]}, "is incomplete"),
        (GOOD | {UP: torch.ones(641, 2)}, "1 layer.s.*SDXL.*--base"),
        (GOOD | {UP: torch.ones(640, 3)}, "--base"),
        (GOOD | {DOWN: torch.ones(2, 2048, 3, 3)}, "--base"),
        (GOOD | {DOWN: torch.ones(2048)}, "--base"),
        (GOOD | {DOWN: torch.ones(2, 2048, dtype=torch.int8)}, "dtype I8"),
        (GOOD | {DOWN: torch.full((2, 2048), torch.nan)}, "NaN or infinity"),
        (GOOD | {f"{NAME}.alpha": torch.tensor(0.0)}, "alpha is 0"),
        (GOOD | {f"{NAME}.alpha": torch.tensor(torch.inf)}, "NaN or infinity"),
        (GOOD | {f"{NAME}.alpha": torch.ones(2)}, r"alpha .*\(2,\)"),
        (GOOD | with_one(f"lora_unet_down_blocks_1_attentions_0_{ATTN2}", 2048, 640), "twice"),
        ({"some.weight": torch.ones(2)}, r"no LoRA layer.*some\.weight"),
    ],
)
def test_a_file_that_is_not_a_lora_of_sdxl_is_an_error_of_one_sentence(
    tmp_path: Path, tensors: dict[str, Tensor], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        read(saved(tensors, tmp_path / "x.safetensors"), None)
    assert "\n" not in str(caught.value)


def test_the_file_of_these_errors_is_read_without_them(tmp_path: Path) -> None:
    assert read(saved(GOOD, tmp_path / "good.safetensors"), None).layers


@pytest.mark.parametrize("metadata", ["[", "[]", "[" * 9999, '{"unet.lora_alpha": "4"}', '{"unet.lora_alpha": NaN}'])
def test_invalid_adapter_metadata_is_an_error(tmp_path: Path, metadata: str) -> None:
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = with_one(name, 2048, 640, ("lora_A", "lora_B"))
    with pytest.raises(ConfigError, match="lora_adapter_metadata"):
        read(saved(tensors, tmp_path / "x.safetensors", lora_adapter_metadata=metadata), None)
