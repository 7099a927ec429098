"""Updates as factors: approximations of DoRA, and factors in the range of fp16."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from diffusers import UNet2DConditionModel
from lora_by_hand import WithoutFloat64, lora_layers
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from flatlora_diffusion.adapter import delta as lora_update
from flatlora_diffusion.adapter.delta import (
    Update,
    Updates,
    balanced,
    difference,
    lora_updates,
    norm,
    plain_updates,
    truncated_svd,
    update_norms,
)
from flatlora_diffusion.adapter.full import start_full
from flatlora_diffusion.config import AdapterConfig


def adapted(base: Path, **settings: Any) -> Any:
    """A UNet with a LoRA from PEFT's own initialization, and its weights before."""
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    before = {name: value.detach().clone() for name, value in unet.named_parameters()}
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1"] if settings.pop("with_conv", False) else ["to_q", "to_v"]
    inject_adapter_in_model(LoraConfig(target_modules=targets, **settings), unet, "default")
    return unet, before


def move(unet: Any) -> None:
    """Move all factors, as training does."""
    for index, layer in enumerate(lora_layers(unet).values()):
        rng = torch.Generator().manual_seed(index)
        for side in (layer.lora_A, layer.lora_B):
            weight = side["default"].weight
            weight.data += 0.3 * torch.randn(weight.shape, generator=rng)


def full_weight(layer: Any) -> Tensor:
    """The weight that PEFT merges, on a copy of the layer."""
    layer.merge(safe_merge=True)
    merged: Tensor = layer.get_base_layer().weight.detach().clone()
    layer.unmerge()
    return merged


class Pipeline:
    """The three parts; only the UNet has a LoRA."""

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        self.text_encoder = self.text_encoder_2 = torch.nn.Identity()


def plain_of(unet: Any) -> tuple[Updates, float]:
    pipeline = Pipeline(unet)
    return plain_updates(pipeline, lora_updates(pipeline))


def test_a_dora_becomes_a_plain_lora_that_has_what_is_missed_counted(base: Path) -> None:
    unet, before = adapted(base, r=2, lora_alpha=4, use_dora=True, with_conv=True)
    move(unet)
    for layer in lora_layers(unet).values():
        layer.lora_magnitude_vector["default"].weight.data *= 1.3
    updates, missed = plain_of(unet)
    wrong, size = 0.0, 0.0
    kinds = set()
    for name, layer in lora_layers(unet).items():
        update = updates["unet"][name]
        weight = before[f"{name}.weight"]
        kinds.add(weight.ndim)
        change = full_weight(layer) - weight
        folded = (update.scale * update.up.flatten(1) @ update.down.flatten(1)).view_as(weight)
        assert update.down.shape[1:] == weight.shape[1:]
        if min(change.flatten(1).shape) <= 32:  # of full rank, so nothing is cut off
            torch.testing.assert_close(folded, change, rtol=1e-4, atol=1e-5)
        wrong += float((folded - change).square().sum())
        size += float(change.square().sum())
    assert kinds == {2, 4}
    assert missed == pytest.approx((wrong / size) ** 0.5, abs=1e-5)


def test_a_dora_is_folded_on_a_device_without_float64(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet, _ = adapted(base, r=2, lora_alpha=4, use_dora=True)
    move(unet)
    expected, missed = plain_of(unet)
    real = lora_update._dora_change
    monkeypatch.setattr(lora_update, "_dora_change", lambda layer: real(layer).as_subclass(WithoutFloat64))
    plain, plain_error = plain_of(unet)
    assert plain_error == missed
    for name, update in plain["unet"].items():
        assert type(update.up) is Tensor
        assert torch.equal(update.up, expected["unet"][name].up)


def test_full_fine_tuning_is_factored_once_for_all_files(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet, _ = adapted(base, r=2)
    start_full(unet, unet.peft_config["default"], AdapterConfig(adapter="full"), seed=0)
    for layer in lora_layers(unet).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, generator=torch.Generator().manual_seed(0))
    factoring = Mock(wraps=truncated_svd)
    monkeypatch.setattr(lora_update, "truncated_svd", factoring)
    pipeline = Pipeline(unet)
    trained = lora_updates(pipeline)
    plain, missed = plain_updates(pipeline, trained)
    assert factoring.call_count == len(lora_layers(unet))
    assert plain == trained
    assert 0 < missed < 1


def test_a_plain_lora_is_itself(base: Path) -> None:
    unet, _ = adapted(base, r=2, lora_alpha=6)
    move(unet)
    updates, missed = plain_of(unet)
    assert missed == 0
    assert {update.scale for update in updates["unet"].values()} == {3.0}
    for name, layer in lora_layers(unet).items():
        assert torch.equal(updates["unet"][name].up, layer.lora_B["default"].weight)


def test_truncation_is_the_best_there_is_and_repeatable() -> None:
    rng = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(90, 70, generator=rng))[0]
    right = torch.linalg.qr(torch.randn(80, 70, generator=rng))[0]
    change = left * 0.8 ** torch.arange(70) @ right.T
    state = torch.get_rng_state()
    factors = truncated_svd(change, 6)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(factors.up, truncated_svd(change, 6).up)
    values = torch.linalg.svdvals(change)
    best = float(values[6:].norm())
    assert float((change - factors.up @ factors.down).norm()) == pytest.approx(best, rel=1e-3)
    assert float(factors.up.norm()) == pytest.approx(float(factors.down.norm()), rel=1e-4)


@pytest.mark.parametrize("size", [1e-7, 1e-4, 1.0, 1e6])
def test_balanced_factors_survive_fp16(size: float) -> None:
    rng = torch.Generator().manual_seed(0)
    down, up = torch.randn(3, 20, generator=rng), size * torch.randn(10, 3, generator=rng)
    for first, second in ((down, up), (up.T, down.T)):
        one, two = balanced(first, second)
        assert torch.equal(two @ one, second @ first), "a power of two changes no digit"
        stored = two.half().float() @ one.half().float()
        assert float((stored - second @ first).norm() / (second @ first).norm()) < 1e-3
    assert balanced(down, torch.zeros(10, 3))[0] is down


def test_norms_and_differences_without_forming_the_product() -> None:
    rng = torch.Generator().manual_seed(0)
    first = Update(torch.randn(3, 4, 3, 3, generator=rng), torch.randn(7, 3, 1, 1, generator=rng), 2.5)
    second = Update(first.down, first.up * 1.001, 2.5)
    whole = 2.5 * first.up.flatten(1) @ first.down.flatten(1)
    assert norm(first) == pytest.approx(float(whole.norm()), rel=1e-6)
    assert difference(first, second) == pytest.approx(0.001 * float(whole.norm()), rel=1e-3)
    assert difference(first, first) < 1e-6 * norm(first)
    assert update_norms({"unet": {"a": first, "b": first}}) == {"unet": pytest.approx(2**0.5 * norm(first))}
