"""Real model classes at tiny sizes, seeded, with a LoRA whose product BA is not zero; no hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import Flux2Transformer2DModel, UNet2DConditionModel
from lora_by_hand import gradients, lora_layers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ATTENTION_AND_CONV = (*ATTENTION, "ff.net.0.proj", "proj_in", "conv1", "conv_shortcut", "time_emb_proj")


# With fused query, key, value and feed-forward in the single blocks.
KLEIN_LAYERS = (
    *(*ATTENTION, "to_qkv_mlp_proj", "ff.linear_in", "ff_context.linear_out"),
    *(f"single_transformer_blocks.{block}.attn.to_out" for block in range(2)),
)


@dataclass(frozen=True)
class Adapter:
    """What is put on a model: the LoRA's settings, and the dtypes of base and LoRA weights."""

    targets: tuple[str, ...] = ()
    rank: int = 4
    alpha: int = 6
    dora: bool = False
    rslora: bool = False
    dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    dtype: torch.dtype = torch.float32
    lora_dtype: torch.dtype | None = None  # None: as the base

    def config(self, default_targets: tuple[str, ...]) -> LoraConfig:
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.targets or default_targets),
            lora_dropout=self.dropout,
            use_dora=self.dora,
            use_rslora=self.rslora,
            bias=self.bias,
            init_lora_weights="gaussian",
        )


@dataclass(frozen=True)
class Case:
    """A model with LoRA and one fixed batch: `predict` runs a given copy of the model on it."""

    model: Any
    predict: Callable[[Any], Tensor]
    target: Tensor

    def loss(self, model: nn.Module | None = None) -> Tensor:
        return F.mse_loss(self.predict(self.model if model is None else model).float(), self.target)


def loss_and_gradients(case: Case, model: nn.Module | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    model = case.model if model is None else model
    loss = case.loss(model)
    loss.backward()
    return loss.detach(), gradients(model)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initialize model weights under `seed`, then give the global generator back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int, vocabulary: int, *shape: int) -> Tensor:
    return torch.randint(2, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def randomize_adapters(model: nn.Module, seed: int = 1) -> None:
    """Give every LoRA (and DoRA magnitude) weights so large that W + sBA differs clearly from W."""
    rng = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        for name in layer.lora_A:
            down, up = layer.lora_A[name].weight.data, layer.lora_B[name].weight.data
            down.copy_(torch.randn(down.shape, generator=rng) * down[0].numel() ** -0.5)
            up.copy_(torch.randn(up.shape, generator=rng) * 0.2)
            if name in layer.lora_magnitude_vector:
                magnitude = layer.lora_magnitude_vector[name].weight.data
                magnitude.mul_(torch.rand(magnitude.shape, generator=rng) + 0.5)


def spread_row_norms(model: nn.Module, seed: int = 2) -> None:
    """Scale each filter of each adapted W by its own factor in [0.3, 1.7], so that rows can be told apart."""
    rng = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        weight = layer.get_base_layer().weight.data
        weight.mul_((torch.rand(len(weight), generator=rng) * 1.4 + 0.3).view(-1, *[1] * (weight.ndim - 1)))


def to_dtypes(model: nn.Module, adapter: Adapter) -> None:
    """Cast the base to `adapter.dtype` and the LoRA parameters to `adapter.lora_dtype`, in place."""
    for parameter in model.parameters():
        is_lora = parameter.requires_grad
        dtype = adapter.lora_dtype if is_lora and adapter.lora_dtype else adapter.dtype
        parameter.data = parameter.data.to(dtype)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(adapter.dtype)


class Toy(nn.Module):
    """Convolutions with stride, uneven kernels and uneven padding, then two linear layers on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(3, 12, (3, 2), stride=2, padding=(1, 0))
        self.odd = nn.Conv2d(12, 16, 3, padding=(2, 1), stride=(1, 2), bias=False)
        self.tall = nn.Conv2d(16, 20, (3, 1), padding=(1, 0))
        self.pointwise = nn.Conv2d(20, 24, 1)
        self.wide = nn.Linear(24, 40)
        self.narrow = nn.Linear(40, 10, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        hidden = F.silu(self.strided(image))
        hidden = F.silu(self.odd(hidden))
        hidden = F.silu(self.tall(hidden))
        hidden = F.silu(self.pointwise(hidden)).flatten(2).transpose(1, 2)
        return self.narrow(F.silu(self.wide(hidden)))


TOY_TARGETS = ("strided", "odd", "tall", "pointwise", "wide", "narrow")


def toy_case(adapter: Adapter | None = None, seed: int = 0) -> Case:
    adapter = adapter or Adapter()
    with seeded(seed):
        model = get_peft_model(Toy(), adapter.config(TOY_TARGETS), autocast_adapter_dtype=False)
    spread_row_norms(model)
    randomize_adapters(model)
    to_dtypes(model, adapter)
    image = normal(seed + 10, 2, 3, 9, 8).to(adapter.dtype)
    with torch.no_grad():
        target = normal(seed + 11, *model(image).shape)
    return Case(model, lambda module: module(image.to(base_dtype(module))), target)


def add_second_adapter(case: Case, targets: tuple[str, ...] = TOY_TARGETS) -> None:
    """Put a second adapter of another rank and scale on a toy, and make both active and trained."""
    case.model.add_adapter("second", Adapter(rank=2, alpha=5).config(targets))
    randomize_adapters(case.model, seed=9)
    case.model.base_model.set_adapter(["default", "second"])


def unet_case(adapter: Adapter | None = None, seed: int = 0, layers_per_block: int = 1) -> Case:
    """An SDXL-style UNet (text_time, linear projections, its block types) with diffusers' own `add_adapter` LoRA."""
    adapter = adapter or Adapter()
    with seeded(seed):
        unet: Any = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 24, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=layers_per_block,
            transformer_layers_per_block=1,
            attention_head_dim=(2, 3, 4),
            norm_num_groups=8,
            cross_attention_dim=20,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 16,
        )
        unet.requires_grad_(False)
        unet.add_adapter(adapter.config(ATTENTION))
    randomize_adapters(unet)
    to_dtypes(unet, adapter)
    sample, text, pooled = normal(seed + 10, 2, 4, 8, 8), normal(seed + 11, 2, 5, 20), normal(seed + 12, 2, 16)
    time_ids = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).repeat(2, 1)

    def predict(module: nn.Module) -> Tensor:
        dtype = base_dtype(module)
        conditions = {"text_embeds": pooled.to(dtype), "time_ids": time_ids.to(dtype)}
        timesteps = torch.tensor([11, 703])
        return module(sample.to(dtype), timesteps, text.to(dtype), added_cond_kwargs=conditions).sample

    return Case(unet, predict, normal(seed + 13, 2, 4, 8, 8))


def klein_case(adapter: Adapter | None = None, seed: int = 0) -> Case:
    """A FLUX.2 klein transformer: two blocks of two streams and two of one stream."""
    adapter = adapter or Adapter()
    with seeded(seed):
        transformer: Any = Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=20,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
        transformer.requires_grad_(False)
        transformer.add_adapter(adapter.config(KLEIN_LAYERS))
    randomize_adapters(transformer)
    to_dtypes(transformer, adapter)
    latents, text = normal(seed + 10, 2, 16, 16), normal(seed + 11, 2, 5, 20)
    image_ids = torch.tensor([[0, row, column, 0] for row in range(4) for column in range(4)])
    text_ids = torch.tensor([[0, 0, 0, token] for token in range(5)])

    def predict(module: nn.Module) -> Tensor:
        dtype = base_dtype(module)
        return module(
            hidden_states=latents.to(dtype),
            encoder_hidden_states=text.to(dtype),
            timestep=torch.tensor([0.3, 0.8]),
            img_ids=image_ids,
            txt_ids=text_ids,
        ).sample

    return Case(transformer, predict, normal(seed + 13, 2, 16, 16))


def t5_case(adapter: Adapter | None = None, seed: int = 0) -> Case:
    config = T5Config(
        vocab_size=60,
        d_model=24,
        d_kv=6,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
    )
    with seeded(seed):
        model = T5ForConditionalGeneration(config)
    question, answer = tokens(seed + 10, 60, 2, 7), tokens(seed + 11, 60, 2, 5)
    return _language_case(
        model,
        adapter or Adapter(),
        ("q", "k", "v", "o", "wi", "wo"),
        lambda module: module(input_ids=question, decoder_input_ids=answer).logits,
    )


def clip_case(adapter: Adapter | None = None, seed: int = 0) -> Case:
    shared: dict[str, Any] = {"intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(
        text_config={**shared, **special, "hidden_size": 24, "vocab_size": 60, "max_position_embeddings": 9},
        vision_config={**shared, "hidden_size": 20, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    with seeded(seed):
        model = CLIPModel(config)
    text, image = tokens(seed + 10, 60, 2, 8), normal(seed + 11, 2, 3, 16, 16)
    text[:, -1] = 1

    def predict(module: nn.Module) -> Tensor:
        result = module(input_ids=text, pixel_values=image.to(base_dtype(module)))
        return torch.cat([result.text_embeds, result.image_embeds])

    targets = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "patch_embedding", "visual_projection")
    return _language_case(model, adapter or Adapter(), targets, predict)


def llama_case(adapter: Adapter | None = None, seed: int = 0) -> Case:
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    with seeded(seed):
        model = LlamaForCausalLM(config)
    text = tokens(seed + 10, 60, 2, 9)
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return _language_case(model, adapter or Adapter(), targets, lambda module: module(input_ids=text).logits)


def base_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the frozen weights that are not quantized, which a batch has to be given in."""
    return next(p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point())


def _language_case(
    model: nn.Module, adapter: Adapter, targets: tuple[str, ...], predict: Callable[[nn.Module], Tensor]
) -> Case:
    with seeded(3):
        model = get_peft_model(model, adapter.config(targets), autocast_adapter_dtype=False)
    randomize_adapters(model)
    to_dtypes(model, adapter)
    with torch.no_grad():
        target = normal(12, *predict(model).shape)
    return Case(model, predict, target)


DENOISERS: dict[str, Callable[..., Case]] = {"unet": unet_case, "klein": klein_case}  # of the families
CASES: dict[str, Callable[..., Case]] = {
    "toy": toy_case,
    **DENOISERS,
    "unet_conv": lambda adapter=None: unet_case(replace(adapter or Adapter(), targets=ATTENTION_AND_CONV)),
    "t5": t5_case,
    "clip": clip_case,
    "llama": llama_case,
}
