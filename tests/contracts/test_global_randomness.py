"""Random state outside the perturbation is neither read nor written, so both methods see the same everything else."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tiny_models import Adapter, toy_case
from torch import Tensor

from flatlora_diffusion import FlatLora

pytestmark = pytest.mark.usefixtures("draw")


def test_the_global_generators_are_neither_written_nor_read() -> None:
    case = toy_case()

    def states() -> tuple[Tensor, tuple[object, ...], object]:
        name, keys, *rest = np.random.get_state()
        return torch.get_rng_state(), (name, tuple(keys), *rest), random.getstate()

    def use(flat: FlatLora) -> list[Tensor]:
        with flat.perturb(step=3, slot=1):
            loss = case.loss()
            loss.backward()
        with flat.disabled(), flat.perturb(step=4, sigma=0.3):
            case.loss()
        drawn = [flat.noise(name, step=3, slot=1) for name in flat.layers]
        norms = [flat.filter_norms(name) for name in flat.layers]
        flat.load_state_dict(flat.state_dict())
        flat.detach()
        return [loss.detach(), *drawn, *norms]

    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = states()
        for noise in ("filter", "iid"):
            results.append(use(FlatLora(case.model, schedule="constant", noise=noise)))
        after = states()
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
    for first, second in zip(results[:2], results[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "a global generator was read"


def test_dropout_draws_the_same_masks_with_and_without_noise() -> None:
    case = toy_case(Adapter(dropout=0.5))
    case.model.train()
    flat = FlatLora(case.model, schedule="constant")
    torch.manual_seed(5)
    case.loss().backward()
    plain = torch.get_rng_state()
    torch.manual_seed(5)
    with flat.perturb(step=0):
        case.loss().backward()
    assert torch.equal(torch.get_rng_state(), plain)
