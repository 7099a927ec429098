"""What the penalty on the change of the weights is: the norm of W' - W, formed by hand, for each kind of adapter."""

from __future__ import annotations

import torch
from lora_by_hand import lora_layers, merged_weight
from tiny_adapters import adalora_case, full_case
from tiny_models import toy_case, unet_case
from torch import Tensor

from flatlora_diffusion.adapter.layers import ADAPTER
from flatlora_diffusion.adapter.svd_start import anchor
from flatlora_diffusion.adapter.weight_change import squared_change


def total(changes: list[Tensor]) -> Tensor:
    return torch.stack([change.square().sum() for change in changes]).sum()


def test_it_is_the_squared_norm_of_what_was_added() -> None:
    for model in (toy_case().model, adalora_case().model, full_case()[0].model):
        by_hand = [layer.get_delta_weight(ADAPTER) for layer in lora_layers(model).values()]
        torch.testing.assert_close(squared_change(model), total(by_hand))


def test_where_a_lora_started_does_not_count() -> None:
    model = unet_case().model
    anchor(model, model.peft_config[ADAPTER])
    assert float(squared_change(model)) < 1e-4
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B[ADAPTER].weight += 0.1
    by_hand = [merged_weight(layer) - layer.get_base_layer().weight for layer in lora_layers(model).values()]
    torch.testing.assert_close(squared_change(model), total(by_hand), rtol=1e-4, atol=1e-4)
