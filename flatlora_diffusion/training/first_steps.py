"""The self-check of a new run: before its first step, and over its first three; none of it changes the run."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from huggingface_hub import cached_assets_path
from torch import nn

from flatlora_diffusion.storage.versions import PROGRAM, __version__
from flatlora_diffusion.training.first_steps_measures import Check, ascent_rise, bits_of_frozen, noise_std, sigma_zero
from flatlora_diffusion.training.state import Rise, TrainState, memory_in_use

logger = logging.getLogger(__name__)

STEPS = 3
_GIB = 2**30
_MORE = 1.15  # times the estimate of memory: the allocator's gaps are not in it


def self_check(state: TrainState) -> SelfCheck | None:
    """The self-check of a new run on its first process, its first part done; None with `--selfcheck never`.

    With `--selfcheck once` it is whole on a CUDA device that this version has not been found right on; else it only
    looks whether an ascent lifts the loss, which depends on the run's own settings.
    """
    wanted, device = state.config.run.selfcheck, state.accelerator.device
    if wanted == "never" or not state.accelerator.is_main_process:
        return None
    is_whole = wanted == "always" or (device.type == "cuda" and not _mark(device).is_file())
    if not (is_whole or state.gradient.ascends):
        return None
    check = SelfCheck(state, is_whole)
    check.begin()
    return check


class SelfCheck:
    """What the first steps show, told as they go on; a check that cannot be made is told, too, and ends nothing."""

    def __init__(self, state: TrainState, is_whole: bool = True) -> None:
        self.checks: list[Check] = []
        self._state, self._is_whole = state, is_whole
        self._bits = ""
        self._losses: list[float] = []
        self._seconds: list[float] = []
        self._rises: list[Rise] = []

    def begin(self) -> None:
        """Before the first step."""
        if not self._is_whole:
            return
        self._try(self._remember)
        if self._state.flats and self._state.config.perturb.effective_sigma > 0:
            self._try(self._noise)
            self._try(self._sigma_zero)  # the last: it makes the perturbation anew, without norms taken too early

    def step_done(self, loss: float, seconds: float) -> None:
        """After each step of the run; past the third, of those that ascended too, there is nothing to do."""
        self._losses.append(loss)
        self._seconds.append(seconds)
        done, total = len(self._losses), self._state.total_steps
        if self._state.progress.rise is not None and len(self._rises) < STEPS:
            self._rises.append(self._state.progress.rise)
            if len(self._rises) == STEPS or done == total:
                self._try(self._rise)
        if self._is_whole and done == min(STEPS, total):
            self._try(self._base)
            self._try(self._loss)
            self._try(self._cost)
            self._end()

    def _remember(self) -> Iterator[Check]:
        self._bits = bits_of_frozen(self._models())
        yield from ()

    def _noise(self) -> Iterator[Check]:
        flat = self._state.flats[0]
        names = list(flat.layers)
        for name in dict.fromkeys((names[0], names[-1])):
            yield noise_std(self._state, flat, name)

    def _sigma_zero(self) -> Iterator[Check]:
        yield sigma_zero(self._state)

    def _rise(self) -> Iterator[Check]:
        yield from ascent_rise(self._rises, self._state.config)

    def _base(self) -> Iterator[Check]:
        now, steps = bits_of_frozen(self._models()), len(self._losses)
        is_same = now == self._bits
        told = f"the base's weights are {'the same bits as' if is_same else 'others than'} before {_steps(steps)}"
        yield Check("base_weights", is_same, told)

    def _loss(self) -> Iterator[Check]:
        told = f"the loss of the first {_steps(len(self._losses))}: {', '.join(f'{one:.4f}' for one in self._losses)}"
        yield Check("loss", all(map(math.isfinite, self._losses)), told, {"last": self._losses[-1]})

    def _cost(self) -> Iterator[Check]:
        device, seconds = self._state.accelerator.device, min(self._seconds)
        peak = memory_in_use(device)
        figures = {"seconds_per_step": seconds, "memory": float(peak)}
        told = f"{seconds:.2f} s for a step, {peak / _GIB:.2f} GiB of {_kind(device)} memory"
        if device.type != "cuda":
            yield Check("cost", True, told, figures)
            return
        from flatlora_diffusion.memory.estimate import estimate_memory  # slow to import

        estimate = estimate_memory(self._state.config).total
        told += f" at the peak, {estimate / _GIB:.2f} GiB estimated"
        yield Check("cost", peak <= _MORE * estimate, told, {**figures, "estimate": float(estimate)})

    def _models(self) -> list[nn.Module]:
        pipeline = self._state.sdxl.pipeline
        return [pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2]

    def _try(self, look: Callable[[], Iterator[Check]]) -> None:
        try:
            for check in look():
                self._tell(check)
        except Exception as error:  # it is told for information alone
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._tell(Check(look.__name__.strip("_"), False, f"this could not be looked at: {reason}"))

    def _tell(self, check: Check) -> None:
        self.checks.append(check)
        level, mark = (logging.INFO, "right") if check.is_right else (logging.WARNING, "WRONG")
        logger.log(level, "self-check, %s: %s", mark, check.told)
        event = {"event": "selfcheck", "what": check.what, "is_right": check.is_right, "told": check.told}
        self._state.run.add_event({**event, **check.figures})

    def _end(self) -> None:
        if not all(check.is_right or check.is_of_settings for check in self.checks):
            logger.warning(
                "the self-check found something wrong, and the run goes on: please report these lines, with the "
                "versions from `flatlora doctor`, before you trust its result; --selfcheck never leaves it out"
            )
        elif self._state.accelerator.device.type == "cuda":
            _remember_as_right(self._state.accelerator.device)


def _mark(device: torch.device) -> Path:
    """The file that says that this version was found right on this kind of device."""
    name = f"{__version__}_torch-{torch.__version__}_{_kind(device)}"
    return cached_assets_path(PROGRAM, subfolder="selfcheck") / re.sub(r"[^\w.+-]+", "-", name)


def _remember_as_right(device: torch.device) -> None:
    try:
        _mark(device).touch()
    except OSError as error:
        logger.info("the next run checks itself again: %s", error)


def _kind(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this process's"


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"
