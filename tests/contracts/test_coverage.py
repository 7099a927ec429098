"""Every adapted layer is perturbed or refused by name, and nothing else happens to the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lora_by_hand import lora_layers
from module_surface import surface
from peft import LoHaConfig, LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora.config import KasaConfig
from peft.tuners.lora.layer import LoraLayer
from tiny_models import CASES, TOY_TARGETS, Adapter, Case, add_second_adapter, toy_case
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flatlora_diffusion import FlatLora
from flatlora_diffusion.config import ConfigError

pytestmark = pytest.mark.usefixtures("draw")


def attach(model: nn.Module) -> FlatLora:
    return FlatLora(model, schedule="constant")


def predicted(case: Case) -> Tensor:
    with torch.no_grad():
        return case.predict(case.model)


@pytest.mark.parametrize("name", CASES)
def test_every_adapted_layer_is_perturbed(name: str) -> None:
    """Each layer's own output changes: the layer is run alone on the input it got in a plain forward."""
    case = CASES[name]()
    expected = lora_layers(case.model)
    inputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, key=key: inputs.update({key: args[0]}))
        for key, layer in expected.items()
    ]
    predicted(case)
    for hook in hooks:
        hook.remove()
    flat = attach(case.model)
    assert dict(flat.layers) == expected
    with torch.no_grad():
        for key, layer in expected.items():
            plain = layer(inputs[key])
            with flat.perturb(step=1):
                assert not torch.equal(layer(inputs[key]), plain), key


class Wrapped(nn.Module):
    """As DistributedDataParallel does it: the model under the name `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [Wrapped, torch.compile, nn.DataParallel], ids=["module", "compile", "data parallel"])
def test_wrappers_change_neither_names_nor_noise(wrap: Callable[[nn.Module], nn.Module]) -> None:
    expected = attach(toy_case().model)
    wrapped = attach(wrap(toy_case().model))
    assert list(wrapped.layers) == list(expected.layers)
    assert "wide" in wrapped.layers
    for name in expected.layers:
        assert torch.equal(wrapped.noise(name, step=2), expected.noise(name, step=2))


class Everything(nn.Module):
    """One layer that can be perturbed next to one of each kind that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Linear(8, 8)
        self.table = nn.Embedding(10, 8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.dilated = nn.Conv2d(8, 8, 3, dilation=2)
        self.sequence = nn.Conv1d(8, 8, 3)
        self.volume = nn.Conv3d(2, 4, 3)
        self.heads = nn.MultiheadAttention(8, 2)
        self.transposed = Conv1D(8, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.good(inputs)


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(r=2, **settings)


REFUSED: dict[str, tuple[Callable[[], PeftConfig], str]] = {
    "grouped convolution": (lambda: lora(target_modules=["good", "grouped"]), "grouped"),
    "dilated convolution": (lambda: lora(target_modules=["good", "dilated"]), "dilated"),
    "embedding": (lambda: lora(target_modules=["good", "table"]), "table"),
    "1d convolution": (lambda: lora(target_modules=["good", "sequence"]), "sequence"),
    "3d convolution": (lambda: lora(target_modules=["good", "volume"]), "volume"),
    "multi-head attention": (lambda: lora(target_modules=["good", "heads"]), "heads"),
    "transposed weight": (lambda: lora(target_modules=["good", "transposed"], fan_in_fan_out=True), "transposed"),
    "dora with dropout": (lambda: lora(target_modules=["good"], use_dora=True, lora_dropout=0.1), "good"),
    "alora": (
        lambda: lora(target_modules=["good"], alora_invocation_tokens=[1]),
        "good",
    ),
    "kasa": (lambda: lora(target_modules=["good"], kasa_config=KasaConfig()), "good"),
    "loha": (lambda: LoHaConfig(r=2, target_modules=["good"]), "good"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_layer_that_cannot_be_perturbed_is_refused_by_name(kind: str) -> None:
    config, name = REFUSED[kind]
    model = get_peft_model(Everything(), config())
    before = surface(model)
    with pytest.raises(ConfigError, match=name):
        attach(model)
    assert surface(model) == before, "a refused model was changed"


def test_a_lora_next_to_another_tuner_is_refused() -> None:
    """One adapted layer is LoRA, one is not: perturbing only the first would be a silent skip."""
    model = toy_case().model
    loha = get_peft_model(Everything(), LoHaConfig(r=2, target_modules=["good"]))
    both = nn.ModuleDict({"fine": model, "strange": loha})
    with pytest.raises(ConfigError, match=r"strange.*good"):
        attach(both)


def test_two_layers_never_share_a_name() -> None:
    """`module.` is dropped from names; a model that uses the word itself must not lose a layer to its namesake."""
    base = nn.Sequential(nn.Linear(4, 4))
    base.add_module("module", nn.Sequential(nn.Linear(4, 4)))
    model = get_peft_model(base, lora(target_modules=["0"]))
    assert sum(1 for module in model.modules() if isinstance(module, LoraLayer)) == 2
    with pytest.raises(ConfigError, match=r"adapted layers .* 0 "):
        attach(model)


def test_an_adapter_added_after_attaching_is_an_error() -> None:
    case = toy_case(Adapter(targets=("wide",)))
    flat = attach(case.model)
    add_second_adapter(case, ("narrow",))
    with (
        torch.no_grad(),
        pytest.raises(ConfigError, match="adapters were added or removed"),
        flat.perturb(step=1),
    ):
        case.predict(case.model)


@pytest.mark.parametrize("wrap", [lambda model: model, nn.Sequential], ids=["the model", "a wrapper"])
@pytest.mark.parametrize("late", [Adapter(), Adapter(dora=True, dropout=0.5)], ids=["lora", "dora with dropout"])
def test_an_adapter_added_to_the_same_layers_after_attaching_is_an_error(wrap: Any, late: Adapter) -> None:
    """It would escape the checks that the layers went through when they were attached."""
    case = toy_case()
    flat = attach(wrap(case.model))
    for step in range(2):
        with flat.perturb(step=step):
            predicted(case)
    case.model.add_adapter("late", late.config(TOY_TARGETS))
    case.model.base_model.set_adapter(["default", "late"])
    with pytest.raises(ConfigError, match="adapters were added or removed"):
        flat.perturb(step=2).__enter__()


def test_an_adapter_recreated_under_its_old_name_is_an_error() -> None:
    case = toy_case(Adapter(targets=("wide",)))
    flat = attach(case.model)
    with flat.perturb(step=1):
        predicted(case)
    case.model.delete_adapter("default")
    case.model.add_adapter("default", Adapter().config(("narrow",)))
    case.model.set_adapter("default")
    with pytest.raises(ConfigError, match="adapters were added or removed"), flat.perturb(step=1):
        pass


def test_an_adapter_removed_from_the_model_is_an_error() -> None:
    case = CASES["unet"]()
    flat = attach(case.model)
    case.model.unload_lora()
    with pytest.raises(ConfigError, match="adapters were added or removed"), flat.perturb(step=1):
        pass


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Sequential()], ids=["no adapter", "empty"])
def test_a_model_without_lora_layers_is_an_error(model: nn.Module) -> None:
    with pytest.raises(ConfigError):
        attach(model)
