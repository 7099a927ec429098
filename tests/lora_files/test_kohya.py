"""Names and tensors of the kohya file, compared with diffusers' conversion on SDXL's topology."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import save
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from flatlora_diffusion.adapter.delta import Update, shared_path
from flatlora_diffusion.families.sdxl.lora_names import kohya_name
from flatlora_diffusion.families.sdxl.single_file import unet_tensors
from flatlora_diffusion.lora_files.kohya import kohya_tensors, with_required_layers
from flatlora_diffusion.lora_files.metadata import with_content_keys
from flatlora_diffusion.storage.tensor_io import contents_of

LEAVES = [f"self_attn_{x}_proj" for x in "qkv"] + ["self_attn_out_proj", "mlp_fc1", "mlp_fc2"]


@pytest.fixture(scope="module")
def unet() -> Any:
    """SDXL's own UNet without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        )


def body(unet: nn.Module) -> list[str]:
    """All modules with weights, norms too, where LoRAs have a name."""
    names = [name for name, module in unet.named_modules() if getattr(module, "weight", None) is not None]
    return [name for name in names if name.startswith(("down_blocks.", "mid_block.", "up_blocks."))]


def factors(rank: int, scale: float, width: int = 6, height: int = 5) -> Update:
    rng = torch.Generator().manual_seed(rank)
    return Update(torch.randn(rank, width, generator=rng), torch.randn(height, rank, generator=rng), scale)


def test_every_unet_name_equals_diffusers_conversion(unet: Any) -> None:
    original = {f"model.diffusion_model.{name}": value for name, value in unet_tensors(unet.state_dict()).items()}
    # Each tensor is told by its number, so that one of the same shape cannot stand in for it.
    numbered = {name: torch.tensor(number) for number, name in enumerate(original)}
    names = list(original)
    converted = convert_ldm_unet_checkpoint(dict(numbered), dict(unet.config))
    assert len(converted) == 1680
    checked = 0
    for module in body(unet):
        for kind in ("weight", "bias"):
            if f"{module}.{kind}" in converted:
                sgm = names[int(converted[f"{module}.{kind}"])].removeprefix("model.diffusion_model.")
                assert kohya_name("unet", module) == "lora_unet_" + sgm.removesuffix(f".{kind}").replace(".", "_")
                checked += 1
    outside = ("conv_in", "conv_norm_out", "conv_out", "time_embedding", "add_embedding")
    assert checked == 1680 - sum(name.startswith(outside) for name in converted)


def test_every_name_is_read_back_by_diffusers_lora_loader(unet: Any) -> None:
    layers = [name for name in body(unet) if isinstance(unet.get_submodule(name), nn.Linear | nn.Conv2d)]
    updates = {"unet": {name: factors(2, 1.0) for name in layers}}
    found, _ = StableDiffusionXLPipeline.lora_state_dict(dict(kohya_tensors(updates)), unet_config=unet.config)
    read = {key.split(".lora")[0].split("_lora.")[0].replace(".processor", "") for key in found}
    assert {name.replace("to_out.0", "to_out") for name in layers} == {
        name.removeprefix("unet.").replace("to_out.0", "to_out") for name in read
    }
    assert len(layers) == 794 - 6


def test_the_names_of_both_text_encoders_are_kohya_s() -> None:
    expected, found = set(), set()
    for number, (kind, layers) in enumerate(((CLIPTextModel, 12), (CLIPTextModelWithProjection, 32)), start=1):
        part = ("text_encoder", "text_encoder_2")[number - 1]
        with torch.device("meta"):
            encoder = kind(CLIPTextConfig(num_hidden_layers=layers, hidden_size=8, num_attention_heads=2))
        for name, module in encoder.named_modules():
            if isinstance(module, nn.Linear) and ".layers." in name:
                found.add(kohya_name(part, shared_path(part, name)))
        expected |= {
            f"lora_te{number}_text_model_encoder_layers_{layer}_{leaf}" for layer in range(layers) for leaf in LEAVES
        }
    assert len(expected) == 264
    assert found == expected


def test_the_header_of_a_lora_on_everything_stays_below_a_mebibyte(unet: Any) -> None:
    """ComfyUI shows no metadata of a file whose header is longer."""
    layers = [name for name in body(unet) if isinstance(unet.get_submodule(name), nn.Linear | nn.Conv2d)]
    updates: dict[str, dict[str, Update]] = {"unet": {name: factors(2, 1.0) for name in layers}}
    for part, count in (("text_encoder", 12), ("text_encoder_2", 32)):
        names = [
            f"text_model.encoder.layers.{i}.self_attn.{x}_proj" for i in range(count) for x in ("q", "k", "v", "out")
        ]
        updates[part] = {name: factors(2, 1.0) for name in names}
    raw = save(dict(kohya_tensors(updates, dtype=torch.float16)))
    assert int.from_bytes(raw[:8], "little") < 2**19


@pytest.mark.parametrize("module", ["conv_in", "conv_out", "time_embedding.linear_1", "add_embedding.linear_2"])
def test_layers_that_other_tools_ignore_have_no_kohya_name(module: str) -> None:
    with pytest.raises(KeyError, match="no original name"):
        kohya_name("unet", module)


def product(tensors: dict[str, Tensor], name: str) -> Tensor:
    """alpha / r * up @ down, as every reader has it."""
    down, up = tensors[f"{name}.lora_down.weight"].float(), tensors[f"{name}.lora_up.weight"].float()
    return float(tensors[f"{name}.alpha"]) / len(down) * up @ down


Q, K, V = (f"mid_block.attentions.0.transformer_blocks.0.attn1.to_{x}" for x in "qkv")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("layers", "alpha"),
    [
        ({Q: factors(4, 2.0), K: factors(4, 2.0)}, 8),  # alpha / rank
        ({Q: factors(16, 2.0)}, 32),  # rank-stabilized: 8 / sqrt(16)
        ({Q: factors(4, 0.5), K: factors(4, 0.5), V: factors(7, 0.5)}, 2),  # mixed ranks
        ({Q: factors(4, 2.0), K: factors(4, 2.0), V: factors(4, 5.0)}, 8),  # mixed scales
        ({Q: factors(1, 3.0)}, 6),  # rank 1 is stored as 2
        ({Q: factors(8, 8**-0.5)}, None),  # an alpha that no half-precision number is
        ({Q: factors(4, 1e6)}, None),
    ],
)
def test_one_alpha_per_part_and_the_product_is_the_update(
    layers: dict[str, Update], alpha: float | None, dtype: torch.dtype
) -> None:
    tensors = dict(kohya_tensors({"unet": layers}, dtype=dtype))
    alphas = [value for name, value in tensors.items() if name.endswith(".alpha")]
    assert {float(value) for value in alphas} == ({alpha} if alpha else {float(alphas[0])})
    assert all(value.ndim == 0 for value in alphas)
    assert {value.dtype for value in tensors.values()} == {dtype}
    for module, update in layers.items():
        expected = update.scale * update.up @ update.down
        name = kohya_name("unet", module)
        assert len(tensors[f"{name}.lora_down.weight"]) == max(len(update.down), 2)
        error = (product(tensors, name) - expected).norm() / expected.norm()
        assert float(error) < 3 * torch.finfo(dtype).eps


def test_an_incomplete_attention_of_the_second_encoder_gets_partners_of_zeros(unet: Any) -> None:
    group = "text_model.encoder.layers.3.self_attn"
    updates: dict[str, dict[str, Update]] = {
        "text_encoder": {f"{group}.q_proj": factors(3, 2.0, 6, 6)},
        "text_encoder_2": {
            f"{group}.q_proj": factors(3, 2.0, 6, 6),
            "text_model.encoder.layers.3.mlp.fc1": factors(3, 2),
        },
    }
    whole = with_required_layers(updates, unet)
    assert whole["text_encoder"].keys() == updates["text_encoder"].keys()
    assert set(whole["text_encoder_2"]) == {
        "text_model.encoder.layers.3.mlp.fc1",
        *(f"{group}.{leaf}_proj" for leaf in ("q", "k", "v", "out")),
    }
    tensors = dict(kohya_tensors(whole))
    for leaf in ("k", "v", "out"):
        assert not product(tensors, f"lora_te2_text_model_encoder_layers_3_self_attn_{leaf}_proj").any()
    assert len({float(value) for name, value in tensors.items() if name.endswith(".alpha")}) == 1
    assert len(updates["text_encoder_2"]) == 2, "the given updates stay as they are"


def test_a_lora_on_some_blocks_gets_the_layers_that_identify_its_base(unet: Any) -> None:
    updates = {"unet": {"up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": factors(4, 1.0, 1280, 1280)}}
    tensors = dict(kohya_tensors(with_required_layers(updates, unet)))
    for name, width in (
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 640),
        ("lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k", 1280),
    ):
        assert tensors[f"{name}.lora_down.weight"].shape == (4, 2048)
        assert tensors[f"{name}.lora_up.weight"].shape == (width, 4)
        assert not tensors[f"{name}.lora_up.weight"].any()
    assert len(tensors) == 9
    assert with_required_layers({}, unet) == {}


def test_rank_and_alpha_of_the_metadata_are_from_a_layer_of_the_unet() -> None:
    def update(rank: int, scale: float) -> Update:
        return Update(torch.ones(rank, 8), torch.ones(8, rank), scale)

    block = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    text = {f"text_model.encoder.layers.{layer}.self_attn.q_proj": update(64, 0.25) for layer in range(5)}
    unet = {f"{block}.to_q": update(32, 1.0), f"{block}.to_k": update(32, 1.0), f"{block}.to_v": update(128, 0.25)}
    for updates, expected in (
        ({"text_encoder": text, "unet": unet}, ("32", "32.0")),
        ({"text_encoder": text}, ("64", "16.0")),
    ):
        metadata = with_content_keys({}, contents_of(kohya_tensors(updates)))
        assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == expected
