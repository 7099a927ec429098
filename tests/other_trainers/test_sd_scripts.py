"""The network module for sd-scripts, called through the seam as sd-scripts calls it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from sd_scripts_stand_in import Training, Unet, networks_lora
from tiny_models import normal
from torch import Tensor, nn
from torch.optim import optimizer

from flatlora_diffusion import FlatLora
from flatlora_diffusion.config import ConfigError

IMAGES = [normal(seed, 2, 3, 5, 5) for seed in range(4)]
NAMES = ("conv", "to_q", "to_out")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """sd-scripts' own network module, which the plug-in imports by its name."""
    module = networks_lora()
    monkeypatch.setitem(sys.modules, "networks", module)
    monkeypatch.setitem(sys.modules, "networks.lora", module)
    hooks: Any = optimizer._global_optimizer_post_hooks
    before = dict(hooks)
    yield module
    for key in hooks.keys() - before.keys():  # in sd-scripts they last as long as the process
        del hooks[key]


@pytest.fixture
def plug_in() -> Any:
    return import_module("flatlora_diffusion.other_trainers.sd_scripts")


def trained(module: Any, **arguments: Any) -> Training:
    training = Training(module, IMAGES, **arguments)
    training.train()
    return training


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def by_hand(plain: Any, draw: Any, accumulation: int) -> dict[str, Tensor]:
    """The same training of PEFT layers with `perturb`: A and B of each layer, by its name."""
    start = Training(plain, IMAGES)
    torch.manual_seed(0)
    unet: Any = Unet().requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=list(NAMES)), unet)
    pairs = {}
    for name in NAMES:
        layer, theirs = getattr(unet, name), getattr(start.network, f"lora_unet_{name}")
        layer.lora_A.default.load_state_dict(theirs.lora_down.state_dict())
        layer.lora_B.default.load_state_dict(theirs.lora_up.state_dict())
        pairs[name] = (layer.lora_A.default.weight, layer.lora_B.default.weight)
    flat = FlatLora(Renamed(unet), sigma=0.2, total_steps=4, seed=3, draw=draw)
    parameters = [one for pair in pairs.values() for one in pair]
    adam = torch.optim.AdamW(parameters, lr=0.05)
    for step in range(4):
        with flat.perturb(step):
            for micro in range(accumulation):
                (unet(IMAGES[(step * accumulation + micro) % 4]).square().mean() / accumulation).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad()
    return {
        f"lora_unet_{name}.lora_{kind}.weight": one
        for name in NAMES
        for kind, one in zip(("down", "up"), pairs[name], strict=True)
    }


class Renamed(nn.Module):
    """The layers under the names that they have in sd-scripts, which eps depends on."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        for name in NAMES:
            self.add_module(f"lora_unet_{name}", getattr(unet, name))


@pytest.mark.parametrize("draw", ["full", "low_rank"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_training_equals_the_loop_by_hand(
    plain: Any, plug_in: Any, tmp_path: Path, draw: str, accumulation: int
) -> None:
    arguments = ["sigma=0.2", f"perturb_draw={draw}"]
    training = trained(plug_in, network_args=arguments, gradient_accumulation_steps=accumulation)
    ours, expected = training.weights(tmp_path), by_hand(plain, draw, accumulation)
    unperturbed = trained(plain, gradient_accumulation_steps=accumulation).weights(tmp_path)
    assert not same(ours, unperturbed), "nothing was perturbed"
    for name, weight in expected.items():
        torch.testing.assert_close(ours[name], weight.detach(), rtol=1e-4, atol=1e-5)


def test_without_sigma_it_is_their_training_bit_for_bit(plain: Any, plug_in: Any, tmp_path: Path) -> None:
    ours = trained(plug_in, network_args=["sigma=0"]).weights(tmp_path)
    assert same(ours, trained(plain).weights(tmp_path))


def test_samples_and_validation_see_no_noise(plain: Any, plug_in: Any) -> None:
    training = trained(plug_in, network_args=["sigma=0.5", "sigma_schedule=constant"])
    assert all(map(torch.equal, training.samples, training.validations))
    with torch.no_grad():
        assert torch.equal(training.unet(IMAGES[0]), training.samples[-1])
        training.network.on_step_start(None, None)
        noisy = training.unet(IMAGES[0])
        training.network.set_multiplier(0.0)
        base = training.unet(IMAGES[0])
        training.network.set_multiplier(1.0)
        assert torch.equal(training.unet(IMAGES[0]), noisy)
    assert not torch.equal(noisy, training.samples[-1])
    torch.manual_seed(0)
    torch.testing.assert_close(base, Unet()(IMAGES[0]))


def test_a_resumed_training_goes_on_with_its_step(plug_in: Any, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"network_args": ["sigma=0.3"], "max_train_steps": 8}
    whole = Training(plug_in, IMAGES, **arguments)
    whole.train(8)
    first = Training(plug_in, IMAGES, **arguments)
    first.train(4, save_state=tmp_path / "state")
    second = Training(plug_in, IMAGES, resume=tmp_path / "state", **arguments)
    second.train(4)
    assert same(second.weights(tmp_path), whole.weights(tmp_path))


def test_their_own_arguments_reach_their_network(plug_in: Any) -> None:
    training = Training(plug_in, IMAGES, network_args=["conv_dim=4", "sigma=0.1"])
    assert training.network.others == {"neuron_dropout": None, "dropout": None, "conv_dim": "4"}


def test_ranks_of_a_file_are_taken(plain: Any, plug_in: Any, tmp_path: Path) -> None:
    Training(plain, IMAGES).weights(tmp_path)
    file, unet = str(tmp_path / "saved.safetensors"), Unet()
    network, weights = plug_in.create_network_from_weights(1.0, file, None, [], unet, sigma="0.1")
    assert isinstance(network, plug_in.FlatNetwork)
    network.apply_to([], unet)
    assert network.network.state_dict().keys() == weights.keys()
    merging, _ = plug_in.create_network_from_weights(1.0, file, None, [], unet, for_inference=True)
    assert not isinstance(merging, plug_in.FlatNetwork)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"network_args": ["sigma=much"]}, "sigma='much' must be a number"),
        ({"network_args": ["perturb_seed=1.5"]}, "perturb_seed='1.5' must be a whole number"),
        ({"network_args": ["perturb_draw=dense"]}, "perturb_draw='dense' is not one of full, low_rank"),
        ({"deepspeed": True}, "--deepspeed replaces the optimizer"),
    ],
)
def test_what_it_cannot_do_is_told_in_a_sentence(plug_in: Any, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Training(plug_in, IMAGES, **arguments)
