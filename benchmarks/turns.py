"""Steps of several arms, taken in turns in one process: their seconds, their memory and their launches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

WARMUP = 3

# Operators that only look at a tensor in another way, or ask for memory.
_WITHOUT_WORK = {
    f"aten::{name}"
    for name in (
        "alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided", "expand", "flatten", "mT",
        "narrow", "new_empty", "new_empty_strided", "numpy_T", "permute", "reshape", "resolve_conj", "resolve_neg",
        "result_type", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "to", "transpose", "unbind",
        "unflatten", "unsqueeze", "view", "_reshape_alias", "_unsafe_view", "as_strided_", "contiguous", "detach_",
        "expand_as", "item", "_local_scalar_dense", "lift_fresh", "matrix_H", "movedim", "resize_",
        "set_", "type_as", "unfold", "unsafe_split", "view_as", "is_nonzero", "adjoint", 
    )
}  # fmt: skip

Step = Callable[[int], float]  # does optimizer step i and returns its loss


def compare(arms: dict[str, Step], budget: float) -> dict[str, Any]:
    """Seconds of each arm's steps, taken in turns for about `budget` seconds, and bytes and launches of one more step.

    Ratios are those of each turn: of `lora` to `plain` if there is such an arm, of all others to `lora`.
    """
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    turn = 0
    while turn < WARMUP + 2 or time.perf_counter() - started < budget:
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            seconds[name].append(timed(arms[name], turn))
        turn += 1
    measured = {name: values[WARMUP:] for name, values in seconds.items()}
    pairs = [("lora", "plain")] if "plain" in arms else []
    pairs += [(name, "lora") for name in names if name not in ("plain", "lora")]
    return {
        "turns": turn - WARMUP,
        "seconds": {name: statistics.quantiles(values, n=4) for name, values in measured.items()},
        **{f"{one} / {other}": ratio_quartiles(measured[one], measured[other]) for one, other in pairs},
        "peak_bytes": {name: peak_bytes(step, turn) for name, step in arms.items()},
        "launches": {name: launches(step, turn + 1) for name, step in arms.items()},
    }


def timed(step: Step, index: int) -> float:
    synchronize()
    started = time.perf_counter()
    step(index)
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(step: Step, index: int) -> int:
    """The most that the step holds beyond what was allocated before it."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(index)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(index)
    # The allocations one by one, which no public call gives.
    events: list[Any] = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def ratio_quartiles(above: list[float], below: list[float]) -> list[float]:
    return statistics.quantiles([one / other for one, other in zip(above, below, strict=True)], n=4)


def launches(step: Step, index: int) -> int:
    """How many PyTorch operators of the step work on numbers, which on a GPU are its launches, or nearly."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(index)
    return launches_in(profile.events())


def launches_in(events: Any) -> int:
    """The same of what a profiler has seen already."""
    return sum(_within(event) for event in events if event.cpu_parent is None)


def _within(event: Any) -> int:
    """The operators in the event that work on numbers themselves, or else the event, if it is one."""
    inner = sum(map(_within, event.cpu_children))
    return inner or int(event.name.startswith("aten::") and event.name not in _WITHOUT_WORK)
