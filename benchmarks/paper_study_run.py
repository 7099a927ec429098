"""One run of a study: a pretrained encoder with an adapter and a linear head, trained and measured.

Knows neither texts nor images: a `Bench` has the examples and makes the model. Runs of one seed share the first
weights, the batches and, step by step, the encoder's dropout.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.paper_study_adapters import Adapter, adapted, noise_of
from benchmarks.paper_study_settings import Settings
from flatlora_diffusion import FlatLora
from flatlora_diffusion.ground.seeds import derive_seed, generator
from flatlora_diffusion.method.rivals.ascent import LoraSam, Sam
from flatlora_diffusion.method.rivals.slopes import SlopeReader, norm, read_slopes
from flatlora_diffusion.method.settings import Settings as NoiseSettings
from flatlora_diffusion.method.step_gradient import StepGradient

BATCH = 16
RISE_SIGMA, RISE_DRAWS, RISE_ROWS = 0.1, 2, 100
TRAIN_ROWS = 100  # of the training's examples, that are measured
SLOPE_BATCHES = 4  # of which LoRA-GA reads the gradient at its start
SLOWER_A = 16  # how much slower A learns than B with LoRA+
FASTER_HEAD = 10  # how much faster the new head learns than the pretrained weights, where these are trained themselves


class Rows(Protocol):
    """Examples: `labels` (rows,), of chosen rows what the model takes and their labels, and parts to measure in."""

    @property
    def labels(self) -> Tensor: ...

    def rows(self, chosen: Tensor) -> tuple[tuple[Tensor, ...], Tensor]: ...

    def parts(self, most: int | None) -> Sequence[Tensor]: ...


class Classifier(nn.Module):
    """An encoder, of which a row of features is made for each example, and a linear head."""

    encoder: Any
    head: nn.Linear


class Bench(Protocol):
    """A task, and what is trained on it. `targets` matches the paths of the layers that are adapted in the encoder.

    The tests are validation, test and, further, the shifted ones. All learning rates that are tried are multiplied by
    `lr_factor`, so that LoRA's best is one that all arms try.
    """

    @property
    def train(self) -> Rows: ...

    @property
    def tests(self) -> Mapping[str, Rows]: ...

    @property
    def targets(self) -> str: ...

    @property
    def lr_factor(self) -> float: ...

    def model(self) -> Classifier: ...


def run(bench: Bench, settings: Settings, seed: int, only_validation: bool = False) -> dict[str, Any]:
    """Train once; accuracy and loss on each test, the loss's rise under eps at W', and the CPU's seconds."""
    started = time.process_time()
    done = train(bench, settings, seed)
    model = done.adapter.model.eval()
    names = ["validation"] if only_validation else list(bench.tests)
    result: dict[str, Any] = {name: _measure(model, bench.tests[name]) for name in names}
    if not only_validation:
        result["rise"] = _rise(done.adapter, bench.tests["test"])
        result["train"] = _measure(model, bench.train, TRAIN_ROWS)
    whole = time.process_time() - started
    return {**result, "last_loss": done.last_loss, "seconds": done.seconds, "whole_seconds": whole}


class Trained(NamedTuple):
    """A trained model, its last loss and the CPU's seconds of training."""

    adapter: Adapter
    last_loss: float
    seconds: float


def train(bench: Bench, settings: Settings, seed: int) -> Trained:
    """The model of a run; the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = bench.model()
        started = time.process_time()
        adapter = _adapted(model, bench, settings, seed)
        loss = _train(adapter, bench.train, settings, seed)
        return Trained(adapter, loss, time.process_time() - started)


def first_slopes(bench: Bench, settings: Settings, seed: int, steps: int) -> list[tuple[float, float]]:
    """The loss and ||dL/dW|| of the encoder's adapted layers, of each of a run's first batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = bench.model()
        adapter, found = _adapted(model, bench, settings, seed), []
        model.train()
        reader = SlopeReader([model.encoder])
        for batch in _batches(adapter, bench.train, steps, seed):
            with reader.reading() as slopes:
                loss = batch.backward()
            found.append((float(loss), float(norm(slopes.values()))))
            model.zero_grad()
        reader.detach()
        return found


def sizes(bench: Bench) -> dict[str, int]:
    """How many classes a task has, and how many examples each split."""
    splits = {"train": bench.train, **bench.tests}
    classes = 1 + max(int(rows.labels.max()) for rows in splits.values())
    return {"class_count": classes, **{name: len(rows.labels) for name, rows in splits.items()}}


def loss_of(model: Any, data: Rows, most: int) -> Tensor:
    """The mean loss of the first examples."""
    return F.cross_entropy(*_answers(model, data, most))


class _Batch:
    """One batch of step `step`: each pass through the model has the same dropout."""

    slot = 0

    def __init__(self, adapter: Adapter, rows: tuple[tuple[Tensor, ...], Tensor], seed: int) -> None:
        self._adapter, (self._inputs, self._labels), self._seed = adapter, rows, seed

    def backward(self, weight: float = 1.0, is_shared: bool = True) -> Tensor:
        torch.manual_seed(self._seed)
        loss = F.cross_entropy(self._adapter.model(*self._inputs), self._labels)
        (weight * (loss + self._adapter.penalty())).backward()
        return loss.detach()


def _adapted(model: Classifier, bench: Bench, settings: Settings, seed: int) -> Adapter:
    def slopes(adapter: Adapter) -> list[Tensor]:
        """dL/dW of each adapted layer, at the start."""
        model.train()
        batches = list(_batches(adapter, bench.train, SLOPE_BATCHES, seed))
        found = [slope / len(batches) for slope in read_slopes([model.encoder], batches)]
        model.zero_grad()
        return found

    return adapted(model, bench.targets, settings, seed, slopes)


def _train(adapter: Adapter, data: Rows, settings: Settings, seed: int) -> float:
    optimizer = torch.optim.AdamW(_groups(adapter, settings), lr=settings.lr, weight_decay=settings.weight_decay)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    gradient = _gradient(adapter, settings)
    noise = _noise(adapter, settings, seed)
    adapter.model.train()
    loss = torch.zeros(())
    for step, batch in enumerate(_batches(adapter, data, settings.steps, seed)):
        with nullcontext() if noise is None else noise.perturb(step):
            (loss,) = gradient.take(step, [batch])
        nn.utils.clip_grad_norm_(adapter.parameters, 1.0)
        optimizer.step()
        rates.step()
        adapter.after_step(step)
        optimizer.zero_grad()
    gradient.detach()
    if noise is not None:
        noise.detach()
    return float(loss)


def _groups(adapter: Adapter, settings: Settings) -> list[dict[str, Any]]:
    """All that is trained: at the learning rate, and what the variant lets learn faster or slower."""
    factors = {name: 1.0 for name in adapter.trainable}
    if settings.variant == "lora+":
        factors |= {name: 1 / SLOWER_A for name in factors if ".lora_A." in name}
    if settings.variant == "full":
        factors |= {name: FASTER_HEAD for name in factors if name.startswith("head.")}
    return [
        {
            "params": [adapter.trainable[name] for name in factors if factors[name] == factor],
            "lr": factor * settings.lr,
        }
        for factor in sorted(set(factors.values()))
    ]


def _gradient(adapter: Adapter, settings: Settings) -> StepGradient:
    if settings.rho == 0:
        return StepGradient()
    if settings.sam == "weights":
        return Sam([adapter.model.encoder], adapter.parameters, settings.rho)
    factors = [one for name, one in adapter.trainable.items() if ".lora_A." in name or ".lora_B." in name]
    return LoraSam(adapter.parameters, factors, settings.rho)


def _noise(adapter: Adapter, settings: Settings, seed: int) -> FlatLora | None:
    if settings.sigma == 0:
        return None
    sigma, schedule, draw = settings.sigma, settings.schedule, settings.draw
    return noise_of(
        adapter, NoiseSettings(sigma, schedule, settings.steps, seed, settings.noise, "encoder", draw, norm_every=1)
    )


def _batches(adapter: Adapter, data: Rows, steps: int, seed: int) -> Iterator[_Batch]:
    """Passes over all rows, each in its own order."""
    rows = len(data.labels)
    order = torch.empty(0, dtype=torch.int64)
    epoch = 0
    for step in range(steps):
        while len(order) < min(BATCH, rows):
            rng = generator("cpu", seed, "paper_study order", epoch)
            order = torch.cat([order, torch.randperm(rows, generator=rng)])
            epoch += 1
        yield _Batch(adapter, data.rows(order[:BATCH]), derive_seed(seed, "dropout", step))
        order = order[BATCH:]


@torch.inference_mode()
def _measure(model: Classifier, data: Rows, most: int | None = None) -> dict[str, float]:
    """Accuracy and loss on the examples, or on the first of them."""
    logits, labels = _answers(model, data, most)
    return {
        "accuracy": float((logits.argmax(1) == labels).float().mean()),
        "loss": float(F.cross_entropy(logits, labels)),
    }


def _answers(model: Any, data: Rows, most: int | None) -> tuple[Tensor, Tensor]:
    """Logits (rows, classes) and labels (rows,)."""
    parts = [data.rows(part) for part in data.parts(most)]
    return torch.cat([model(*inputs) for inputs, _ in parts]), torch.cat([labels for _, labels in parts])


def _rise(adapter: Adapter, data: Rows) -> float:
    """Mean loss under eps of Eq. 7 less the loss at W'."""
    noise = noise_of(adapter, NoiseSettings(RISE_SIGMA, "constant", 1, 0, "filter", "rise", "full", norm_every=1))
    losses = []
    for draw in range(RISE_DRAWS + 1):
        with noise.perturb(0, slot=draw) if draw else nullcontext():
            losses.append(_measure(adapter.model, data, RISE_ROWS)["loss"])
    noise.detach()
    return sum(losses[1:]) / RISE_DRAWS - losses[0]
