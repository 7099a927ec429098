"""Noise acts inside `perturb` on active adapters and nowhere else; after detach nothing is left of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_by_hand import lora_layers, merged_weight
from module_surface import surface
from tiny_models import CASES, DENOISERS, Adapter, Case, toy_case
from torch import Tensor, nn

from flatlora_diffusion import FlatLora
from flatlora_diffusion.config import ConfigError

pytestmark = pytest.mark.usefixtures("draw")


def attach(model: nn.Module) -> FlatLora:
    return FlatLora(model, schedule="constant")


def predicted(case: Case) -> Tensor:
    with torch.no_grad():
        return case.predict(case.model)


def test_nothing_happens_outside_perturb() -> None:
    case = toy_case()
    plain = predicted(case)
    flat = attach(case.model)
    assert torch.equal(predicted(case), plain)
    with flat.perturb(step=1):
        assert not torch.equal(predicted(case), plain)
    assert torch.equal(predicted(case), plain)


def test_disabled_adapters_are_not_perturbed() -> None:
    case = toy_case()
    flat = attach(case.model)
    with case.model.disable_adapter():
        plain = predicted(case)
        with flat.perturb(step=1):
            assert torch.equal(predicted(case), plain)
    with flat.perturb(step=1):
        noisy = predicted(case)
        with case.model.disable_adapter():
            assert torch.equal(predicted(case), plain)
        assert torch.equal(predicted(case), noisy)


@pytest.mark.parametrize("denoiser", DENOISERS)
def test_disabled_adapters_of_a_denoiser_are_not_perturbed(denoiser: str) -> None:
    case = DENOISERS[denoiser]()
    flat = attach(case.model)
    case.model.disable_adapters()
    plain = predicted(case)
    with flat.perturb(step=1):
        assert torch.equal(predicted(case), plain)
        case.model.enable_adapters()
        assert not torch.equal(predicted(case), plain)


def test_attaching_to_a_merged_model_is_refused_until_it_is_unmerged() -> None:
    case = toy_case()
    expected = merged_weight(lora_layers(case.model)["wide"]).norm(dim=1)
    case.model.merge_adapter()
    with pytest.raises(ConfigError, match=r"wide \(its adapter is merged into W; unmerge it first\)"):
        attach(case.model)
    case.model.unmerge_adapter()
    flat = attach(case.model)
    torch.testing.assert_close(flat.filter_norms("wide"), expected, rtol=1e-4, atol=0)


def test_merged_adapters_are_not_perturbed() -> None:
    case = toy_case()
    flat = attach(case.model)
    with flat.perturb(step=1):
        noisy = predicted(case)
    case.model.merge_adapter()
    plain = predicted(case)
    with flat.perturb(step=1):
        assert torch.equal(predicted(case), plain)
    case.model.unmerge_adapter()
    with flat.perturb(step=1):
        torch.testing.assert_close(predicted(case), noisy, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merging_inside_perturb_merges_the_weights_without_noise(dora: bool) -> None:
    expected, case = toy_case(Adapter(dora=dora)), toy_case(Adapter(dora=dora))
    expected.model.merge_adapter()
    flat = attach(case.model)
    with flat.perturb(step=1):
        predicted(case)
        case.model.merge_adapter()
    for ours, theirs in zip(case.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_disabled_context_switches_noise_off_and_on_again() -> None:
    case = toy_case()
    plain = predicted(case)
    flat = attach(case.model)
    with flat.perturb(step=1):
        noisy = predicted(case)
        with flat.disabled():
            assert torch.equal(predicted(case), plain)
            with flat.disabled():
                assert torch.equal(predicted(case), plain)
            assert torch.equal(predicted(case), plain)
        assert torch.equal(predicted(case), noisy)
        with pytest.raises(KeyboardInterrupt), flat.disabled():
            raise KeyboardInterrupt
        assert torch.equal(predicted(case), noisy)
    with flat.disabled(), flat.perturb(step=1):
        assert torch.equal(predicted(case), plain)
    with flat.perturb(step=1):
        assert torch.equal(predicted(case), noisy)


@pytest.mark.parametrize("name", CASES)
def test_detach_leaves_nothing_behind(name: str) -> None:
    case = CASES[name]()
    plain = predicted(case)
    keys = list(case.model.state_dict())
    before = surface(case.model)
    flat = attach(case.model)
    assert list(case.model.state_dict()) == keys, "attaching changes what is saved"
    with flat.perturb(step=1):
        assert not torch.equal(predicted(case), plain)
        assert list(case.model.state_dict()) == keys
    flat.detach()
    assert surface(case.model) == before
    assert torch.equal(predicted(case), plain)
    assert list(case.model.state_dict()) == keys


def test_a_second_flat_lora_on_one_model_is_refused() -> None:
    case = toy_case()
    first = attach(case.model)
    with first.perturb(step=1):
        noisy = predicted(case)
    with pytest.raises(ConfigError, match=r"wide.*another FlatLora perturbs it already"):
        attach(case.model)
    with first.perturb(step=1):
        assert torch.equal(predicted(case), noisy)


def test_a_model_can_be_attached_again_after_detach() -> None:
    case = toy_case()
    first = attach(case.model)
    with first.perturb(step=1):
        noisy = predicted(case)
    first.detach()
    second = attach(case.model)
    with second.perturb(step=1):
        assert torch.equal(predicted(case), noisy), "the noise of a detached FlatLora is still added"
    first.detach()
    with second.perturb(step=1):
        assert torch.equal(predicted(case), noisy), "a second detach reached another FlatLora"


def test_a_saved_adapter_holds_no_noise(tmp_path: Any) -> None:
    case = toy_case()
    plain = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    flat = attach(case.model)
    with flat.perturb(step=1):
        predicted(case)
        inside = case.model.state_dict()
        assert inside.keys() == plain.keys()
        assert all(torch.equal(inside[name], plain[name]) for name in plain)
        case.model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
