"""One run of `paper_language`: an encoder with LoRA and a linear head, trained on a task and measured."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from benchmarks.paper_language_tasks import Pairs, Task
from flatlora_diffusion import FlatLora
from flatlora_diffusion.config import DrawKind, NoiseKind, SigmaSchedule
from flatlora_diffusion.ground.seeds import generator

BATCH = 32
TOKENS = 32
ALPHA = 16
RISE_SIGMA, RISE_DRAWS, RISE_TEXTS = 0.1, 4, 300


@dataclass(frozen=True)
class Settings:
    """What one run is trained with; all but these is alike."""

    lr: float = 1e-3
    steps: int = 120
    rank: int = 8
    variant: Literal["lora", "dora", "pissa"] = "lora"
    sigma: float = 0.0
    schedule: SigmaSchedule = "cosine"
    draw: DrawKind = "full"
    noise: NoiseKind = "filter"
    weight_decay: float = 0.0
    dropout: float = 0.0
    rho: float = 0.0  # of SAM on A and B


class Classifier(nn.Module):
    """The mean of an encoder's last states, and a linear head."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)  # type: ignore[union-attr, arg-type]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        return self.head((states * weights).sum(1) / weights.sum(1))


@dataclass(frozen=True)
class Encoded:
    """Token ids and mask (rows, tokens), class numbers (rows,)."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def rows(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Some rows, cut to the longest of them."""
        mask = self.mask[chosen]
        longest = int(mask.sum(1).max())
        return self.ids[chosen, :longest], mask[:, :longest], self.labels[chosen]


class Bench:
    """A task in tokens, and the folder of the encoder."""

    def __init__(self, task: Task, model: Path) -> None:
        self.model, self.classes = model, task.classes
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self.train = self._encoded(task.train)
        tests = {"validation": task.validation, "test": task.test, **task.shifts}
        self.tests = {name: self._encoded(pairs) for name, pairs in tests.items()}

    def _encoded(self, pairs: Pairs) -> Encoded:
        known = [(text, self.classes.index(label)) for text, label in pairs if label in self.classes]
        tokens = self._tokenizer(
            [text for text, _ in known], truncation=True, max_length=TOKENS, padding=True, return_tensors="pt"
        )
        return Encoded(tokens["input_ids"], tokens["attention_mask"], torch.tensor([number for _, number in known]))


def run(bench: Bench, settings: Settings, seed: int, only_validation: bool = False) -> dict[str, Any]:
    """Train once; accuracy and loss on each test, the loss's rise under eps at W', and the seconds.

    Runs of one seed share the first weights, the batches and the encoder's own dropout.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(bench, settings)
        started = time.perf_counter()
        loss = _train(model, bench.train, settings, seed)
        seconds = time.perf_counter() - started
    model.eval()
    names = ["validation"] if only_validation else list(bench.tests)
    result: dict[str, Any] = {name: _measure(model, bench.tests[name]) for name in names}
    if not only_validation:
        result["rise"] = _rise(model, bench.tests["test"])
        result["train"] = _measure(model, bench.train)
    return {**result, "last_loss": loss, "seconds": seconds}


def _model(bench: Bench, settings: Settings) -> Classifier:
    model = Classifier(AutoModel.from_pretrained(bench.model), len(bench.classes))
    model.encoder.requires_grad_(False)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=ALPHA,
        lora_dropout=settings.dropout,
        use_dora=settings.variant == "dora",
        init_lora_weights="pissa" if settings.variant == "pissa" else True,
        target_modules=r".*encoder\.layer.*\.(query|key|value|dense)",
    )
    inject_adapter_in_model(config, model)
    model.head.requires_grad_(True)
    return model


def _train(model: Classifier, data: Encoded, settings: Settings, seed: int) -> float:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    flat = None
    if settings.sigma > 0:
        flat = FlatLora(
            model, settings.sigma, settings.schedule, settings.steps, seed, settings.noise, draw=settings.draw
        )
        flat.follow(optimizer)
    sam = _sam(parameters, settings.rho) if settings.rho > 0 else None
    model.train()
    loss = torch.zeros(())
    for chosen in _batches(len(data.labels), settings.steps, seed):
        ids, mask, labels = data.rows(chosen)
        loss = F.cross_entropy(model(ids, mask), labels)
        loss.backward()
        if sam is not None:  # up, the gradient there, and back
            sam.first_step(zero_grad=True)
            F.cross_entropy(model(ids, mask), labels).backward()
            sam.second_step()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
    if flat is not None:
        flat.detach()
    return float(loss.detach())


def _sam(parameters: list[nn.Parameter], rho: float) -> Any:
    """pytorch-optimizer's SAM, of which ascent and return are used: its base optimizer moves nothing."""
    from pytorch_optimizer import SAM

    return SAM(parameters, torch.optim.SGD, rho=rho, lr=0.0)


def _batches(rows: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Passes over all rows, each in its own order."""
    order = torch.empty(0, dtype=torch.int64)
    epoch = 0
    for _ in range(steps):
        while len(order) < min(BATCH, rows):
            rng = generator("cpu", seed, "paper_language order", epoch)
            order = torch.cat([order, torch.randperm(rows, generator=rng)])
            epoch += 1
        yield order[:BATCH]
        order = order[BATCH:]


@torch.inference_mode()
def _measure(model: Classifier, data: Encoded) -> dict[str, float]:
    logits = torch.cat([model(*data.rows(part)[:2]) for part in torch.arange(len(data.labels)).split(128)])
    return {
        "accuracy": float((logits.argmax(1) == data.labels).float().mean()),
        "loss": float(F.cross_entropy(logits, data.labels)),
    }


def _rise(model: Classifier, data: Encoded) -> float:
    """Mean loss under eps of Eq. 7 less the loss at W'."""
    flat = FlatLora(model, sigma=RISE_SIGMA, schedule="constant", prefix="paper_language rise", draw="full")
    data = Encoded(data.ids[:RISE_TEXTS], data.mask[:RISE_TEXTS], data.labels[:RISE_TEXTS])
    losses = []
    for draw in range(RISE_DRAWS + 1):
        with flat.perturb(0, slot=draw) if draw else nullcontext():
            losses.append(_measure(model, data)["loss"])
    flat.detach()
    return sum(losses[1:]) / RISE_DRAWS - losses[0]
