"""The training loop that the VAE, the UNet and the judge share: resumable, EMA, progress bar, cosine learning rate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from flatlora_diffusion.storage.tensor_io import load_optimizer, load_tensors, optimizer_tensors, save_tensors


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; `ema` is the final decay of the averaged weights.

    The learning rate stays up for the fraction `plateau` of the steps and then falls to 2 % along a cosine: what was
    trained on a plateau can be trained on, which a finished cosine cannot.
    """

    steps: int
    learning_rate: float
    warmup: int = 200
    weight_decay: float = 0.01
    ema: float = 0.999
    plateau: float = 0.0
    save_seconds: float = 120.0

    def lr_at(self, step: int) -> float:
        ramp = min(1.0, (step + 1) / self.warmup)
        fallen = max(0.0, step - self.plateau * self.steps) / ((1 - self.plateau) * self.steps)
        return self.learning_rate * ramp * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fallen)))


def adamw(parameters: Iterable[nn.Parameter], schedule: Schedule) -> torch.optim.Optimizer:
    """The optimizer of every network here."""
    return torch.optim.AdamW(
        parameters, lr=schedule.learning_rate, betas=(0.9, 0.99), weight_decay=schedule.weight_decay
    )


def train(
    model: nn.Module,
    loss_at: Callable[[int], Tensor],
    schedule: Schedule,
    state_file: Path,
    optimizers: Sequence[torch.optim.Optimizer] = (),
) -> None:
    """Train `model` on `loss_at(step)`; it ends with the averaged weights. A killed run goes on from `state_file`.

    `optimizers` replace AdamW; together they hold all parameters.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizers = optimizers or [adamw(parameters.values(), schedule)]
    ema = {name: p.detach().clone() for name, p in parameters.items()}
    first = _resume(state_file, parameters, ema, optimizers) if state_file.exists() else 0
    bar = tqdm(range(first, schedule.steps), initial=first, total=schedule.steps, desc=state_file.stem, mininterval=5)
    saved, smooth = time.monotonic(), None
    for step in bar:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = schedule.lr_at(step)
        loss = loss_at(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(schedule.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.values()), list(parameters.values()), 1 - decay)
        value = loss.item()
        smooth = value if smooth is None else 0.99 * smooth + 0.01 * value
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if time.monotonic() - saved > schedule.save_seconds or step + 1 == schedule.steps:
            _save(state_file, parameters, ema, optimizers, step + 1)
            saved = time.monotonic()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(ema[name])


def _save(
    path: Path,
    parameters: dict[str, nn.Parameter],
    ema: dict[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    step: int,
) -> None:
    tensors = {f"model.{name}": p for name, p in parameters.items()} | {f"ema.{name}": p for name, p in ema.items()}
    headers = []
    for place, optimizer in enumerate(optimizers):
        state, header = optimizer_tensors(optimizer)
        tensors |= {f"{place}.{name}": value for name, value in state.items()}
        headers.append(header)
    save_tensors(path, tensors, {"optimizers": headers, "step": step})


def _resume(
    path: Path,
    parameters: dict[str, nn.Parameter],
    ema: dict[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
) -> int:
    tensors, header = load_tensors(path)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"model.{name}"])
            ema[name].copy_(tensors[f"ema.{name}"])
    for place, optimizer in enumerate(optimizers):
        own = {
            name.removeprefix(f"{place}."): value for name, value in tensors.items() if name.startswith(f"{place}.")
        }
        load_optimizer(optimizer, own, header["optimizers"][place])
    return int(header["step"])
