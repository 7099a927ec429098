"""`FlatLora.follow`: a loop that knows nothing of eps trains what one with `perturb` trains, or is told why not."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import KIND, ended
from lora_by_hand import lora_layers
from one_process_ddp import in_ddp
from safetensors.torch import load_file, save_file
from tiny_models import Adapter, Case, llama_case, toy_case
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flatlora_diffusion import FlatLora
from flatlora_diffusion.config import ConfigError

pytestmark = pytest.mark.usefixtures("draw")
SETTINGS: dict[str, Any] = {"sigma": 0.3, "schedule": "cosine", "total_steps": 4, "seed": 5}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), lr=0.05)


def train(case: Case, optimizer: Any, steps: int, micro_batches: int = 1, model: nn.Module | None = None) -> None:
    """A loop that knows nothing of eps."""
    case.model.train()
    for _ in range(steps):
        for _ in range(micro_batches):
            case.loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_by_hand(case: Case, steps: int, micro_batches: int = 1, start: int = 0) -> None:
    flat, optimizer = FlatLora(case.model, **SETTINGS), adam(case.model)
    case.model.train()
    for step in range(start, start + steps):
        with flat.perturb(step):
            for _ in range(micro_batches):
                case.loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    flat.detach()


def followed(case: Case) -> tuple[FlatLora, torch.optim.Optimizer]:
    flat, optimizer = FlatLora(case.model, **SETTINGS), adam(case.model)
    flat.follow(optimizer)
    return flat, optimizer


def weights(case: Case) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in case.model.parameters()]


def are_equal(first: Case, second: Case) -> bool:
    return all(map(torch.equal, weights(first), weights(second)))


@pytest.mark.parametrize(
    "make", [toy_case, llama_case, lambda: toy_case(Adapter(dora=True))], ids=["toy", "llama", "dora"]
)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_following_an_optimizer_equals_calling_perturb(make: Callable[[], Case], micro_batches: int) -> None:
    expected, case, plain = make(), make(), make()
    train_by_hand(expected, 3, micro_batches)
    train(plain, adam(plain.model), 3, micro_batches)
    _, optimizer = followed(case)
    train(case, optimizer, 3, micro_batches)
    assert are_equal(case, expected)
    assert not are_equal(case, plain), "nothing was perturbed"


def test_an_optimizer_created_later_is_found_by_its_parameters() -> None:
    expected, case, other = toy_case(), toy_case(), nn.Linear(2, 2)
    train_by_hand(expected, 3)
    flat = FlatLora(case.model, **SETTINGS)
    flat.follow()
    unrelated = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(2)).sum().backward()
    unrelated.step()
    assert flat.step == 0
    train(case, adam(case.model), 3)
    assert are_equal(case, expected)


def test_evaluation_between_forward_and_step_sees_no_noise() -> None:
    case = toy_case()
    plain = case.predict(case.model.eval()).detach()
    flat, optimizer = followed(case)
    train(case, optimizer, 2)
    case.loss().backward()
    noisy = case.predict(case.model).detach()
    case.model.eval()
    quiet = case.predict(case.model).detach()
    flat.detach()
    assert torch.equal(case.predict(case.model), quiet)
    assert not torch.equal(noisy, quiet)
    assert not torch.equal(plain, quiet), "nothing was trained"


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_computes_the_same(reentrant: bool) -> None:
    def trained(checkpointed: bool) -> Case:
        case = llama_case()
        if checkpointed:
            case.model.enable_input_require_grads()
            case.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        _, optimizer = followed(case)
        train(case, optimizer, 2)
        return case

    for ours, theirs in zip(weights(trained(True)), weights(trained(False)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_following_in_mixed_precision_equals_calling_perturb() -> None:
    expected, case = toy_case(), toy_case()
    with torch.autocast("cpu", torch.bfloat16):
        train_by_hand(expected, 3)
    _, optimizer = followed(case)
    with torch.autocast("cpu", torch.bfloat16):
        train(case, optimizer, 3)
    assert are_equal(case, expected)


def test_a_step_skipped_by_the_scaler_is_not_counted() -> None:
    case = toy_case()
    flat, optimizer = followed(case)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    case.model.train()
    for factor, steps in ((1.0, 1), (float("inf"), 1), (1.0, 2)):
        scaler.scale(case.loss() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert flat.step == steps


def test_accelerates_optimizer_is_followed_through_accumulation() -> None:
    from accelerate import Accelerator

    expected, case = toy_case(), toy_case()
    train_by_hand(expected, 2, micro_batches=2)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    flat = FlatLora(case.model, **SETTINGS)
    model, optimizer = accelerator.prepare(case.model, adam(case.model))
    flat.follow(optimizer)
    model.train()
    for _ in range(4):
        with accelerator.accumulate(model):
            case.loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert flat.step == 2
    assert are_equal(case, expected)


def test_a_model_inside_ddp_trains_the_same() -> None:
    expected, case = toy_case(), toy_case()
    train_by_hand(expected, 3)
    _, optimizer = followed(case)
    with in_ddp(case.model) as model:
        train(case, optimizer, 3, model=model)
    assert are_equal(case, expected)


def _one_of_two(rank: int, folder: Path) -> None:
    """A process of two, each with one image of the batch; what it has trained goes into `folder`."""
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    case = toy_case()
    mine = Case(case.model, lambda model: case.predict(model)[rank : rank + 1], case.target[rank : rank + 1])
    _, optimizer = followed(mine)
    model = DistributedDataParallel(case.model)  # not freed before the process ends: see one_process_ddp.py
    train(mine, optimizer, 3, model=model)
    save_file({str(place): value for place, value in enumerate(weights(mine))}, folder / f"{rank}.safetensors")
    os._exit(0)  # not through pytest's own ends


def test_two_processes_of_ddp_see_the_same_eps(tmp_path: Path) -> None:
    context: Any = multiprocessing.get_context(KIND)
    pair = [context.Process(target=_one_of_two, args=(rank, tmp_path)) for rank in range(2)]
    for process in pair:
        process.start()
    assert [ended(process) for process in pair] == [0, 0]
    expected, other = toy_case(), toy_case()
    train_by_hand(expected, 3)
    train(other, adam(other.model), 3)
    whole = weights(expected)
    for rank in range(2):
        tensors = load_file(tmp_path / f"{rank}.safetensors")
        for place, weight in enumerate(whole):
            torch.testing.assert_close(tensors[str(place)], weight, rtol=1e-4, atol=1e-5)
    apart = max(float((weight - two).abs().max()) for weight, two in zip(whole, weights(other), strict=True))
    assert apart > 1e-3, "eps changed nothing"


def test_a_resumed_run_continues_at_its_step() -> None:
    expected, case = toy_case(), toy_case()
    _, optimizer = followed(expected)
    train(expected, optimizer, 4)
    first, optimizer = followed(case)
    train(case, optimizer, 2)
    state = json.loads(json.dumps(first.state_dict()))
    first.detach()
    second = FlatLora(case.model)
    second.load_state_dict(state)
    second.follow(optimizer)
    train(case, optimizer, 2)
    assert second.step == 4
    assert are_equal(case, expected)


def test_without_sigma_following_is_bit_equal_to_plain_lora() -> None:
    plain, case = toy_case(), toy_case()
    train(plain, adam(plain.model), 2)
    optimizer = adam(case.model)
    FlatLora(case.model, sigma=0.0).follow(optimizer)
    train(case, optimizer, 2)
    assert are_equal(case, plain)


def test_detach_ends_it() -> None:
    case = toy_case()
    flat, optimizer = followed(case)
    train(case, optimizer, 1)
    flat.detach()
    train(case, optimizer, 1)
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(RuntimeError, match="detached"):
        flat.follow(optimizer)


@pytest.mark.parametrize("wrong", ["other", "W", "no optimizer", "twice", "sharded"])
def test_an_optimizer_that_cannot_be_followed_is_an_error(wrong: str) -> None:
    case = toy_case()
    flat, optimizer = FlatLora(case.model, **SETTINGS), adam(case.model)
    match wrong:
        case "other":
            optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
            message = r"none of the 12 trainable parameters"
        case "W":
            optimizer.add_param_group({"params": [lora_layers(case.model)["wide"].get_base_layer().weight]})
            message = r"W of wide"
        case "no optimizer":
            optimizer, message = object(), r"torch.optim.Optimizer, not object"  # type: ignore[assignment]
        case "twice":
            flat.follow(optimizer)
            message = r"already follows"
        case _:
            trainable(case.model)[0].ds_id = 1  # type: ignore[attr-defined]
            message = r"strided is sharded"
    with pytest.raises(ConfigError, match=message):
        flat.follow(optimizer)


def test_a_loop_that_never_enters_training_mode_is_warned_of() -> None:
    case = toy_case()
    _, optimizer = followed(case)
    case.model.eval()
    case.loss().backward()
    with pytest.raises(ConfigError, match=r"step 0 .*training mode"):
        optimizer.step()


def test_perturb_and_follow_are_not_mixed() -> None:
    flat, _ = followed(toy_case())
    with pytest.raises(RuntimeError, match=r"follow\(\).*perturb\(\)"), flat.perturb(1):
        pass
