"""A model that FSDP2 has sharded over two processes, base and LoRA alike, gives the gradients of one process."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import torch
from forked import KIND, ended
from peft import LoraConfig, get_peft_model
from tiny_models import normal, seeded
from torch import Tensor, distributed, nn

from flatlora_diffusion import FlatLora


def net() -> nn.Module:
    with seeded(0):
        base = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 7))  # 7 filters do not halve
        return get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))


def loss_of(model: nn.Module, rank: int) -> Tensor:
    output: Tensor = model(normal(rank, 5, 12))
    return output.square().sum()


def gradients_of_both(rank: int, store: str) -> dict[str, Tensor]:
    """The mean of the gradients of two processes, of which this is one."""
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", store=distributed.FileStore(store, 2), rank=rank, world_size=2)
    try:
        model = net()
        fully_shard(model, mesh=distributed.init_device_mesh("cpu", (2,)))
        flat = FlatLora(model, schedule="constant", draw="low_rank")
        with flat.perturb(step=1):
            loss_of(model, rank).backward()
        parameters = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        return {name: gradient.full_tensor() for name, gradient in parameters.items()}  # type: ignore[union-attr]
    finally:
        distributed.destroy_process_group()


def test_two_processes_with_a_sharded_base_have_the_gradients_of_one(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    context: Any = multiprocessing.get_context(KIND)
    other = context.Process(target=gradients_of_both, args=(1, store))
    other.start()
    try:
        found = gradients_of_both(0, store)
        assert ended(other) == 0
    finally:
        other.kill()
    alone = net()
    flat = FlatLora(alone, schedule="constant", draw="low_rank")
    with flat.perturb(step=1):
        ((loss_of(alone, 0) + loss_of(alone, 1)) / 2).backward()
    for name, parameter in alone.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad)
