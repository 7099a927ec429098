"""The self-check of a new run, before its first step and during the first three; it does not change the run."""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import cached_assets_path
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from flatlora_diffusion.adapter.layers import base_weight
from flatlora_diffusion.config import DEFAULT_SIGMA, TrainConfig
from flatlora_diffusion.families.base import eval_mode
from flatlora_diffusion.families.objective import diffusion_loss
from flatlora_diffusion.method.draw import DRAW_RANK
from flatlora_diffusion.method.flat_lora import FlatLora
from flatlora_diffusion.storage.formatting import count_text, first_line
from flatlora_diffusion.storage.rng import generator
from flatlora_diffusion.storage.versions import PROGRAM, __version__
from flatlora_diffusion.training.state import LossIncrease, TrainState, memory_in_use, seeded_dropout

logger = logging.getLogger(__name__)

STEPS = 3
_GIB = 2**30
_MEMORY_TOLERANCE = 1.15  # times the estimate, which excludes fragmentation
_NOISE_INPUTS = 512  # input columns of a layer on which the noise is measured
_MIN_FP32_INCREASE = 1e-5  # below, the rounding of fp32 hides an increase of the loss
_ROUNDING = 1e-5  # relative difference of kernels that add in any order
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Check:
    """The result of a single check: its key in events.jsonl, the result as text, and measured values.

    `is_of_settings`: a failure is due to the run's settings and not to the device.
    """

    name: str
    is_right: bool
    message: str
    figures: dict[str, float] = field(default_factory=dict)
    is_of_settings: bool = False


def begin_self_check(state: TrainState) -> SelfCheck | None:
    """Run the first part of a new run's self-check; None with `--selfcheck never` and except on the main process.

    `--selfcheck once` runs all checks only on a kind of CUDA device on which this version has not passed yet, and
    otherwise only that of SAM's loss increase, which depends on the run's settings.
    """
    mode, device = state.config.run.selfcheck, state.accelerator.device
    if mode == "never" or not state.accelerator.is_main_process:
        return None
    is_complete = mode == "always" or (device.type == "cuda" and not _passed_file(device).is_file())
    if not (is_complete or state.gradient.ascends):
        return None
    check = SelfCheck(state, is_complete)
    check.begin()
    return check


class SelfCheck:
    """Checks the first steps of a run and logs the results; an error in a check does not end the run."""

    def __init__(self, state: TrainState, is_complete: bool = True) -> None:
        self.checks: list[Check] = []
        self._state, self._is_complete = state, is_complete
        self._frozen_hash = ""
        self._losses: list[float] = []
        self._seconds: list[float] = []
        self._increases: list[LossIncrease] = []

    def begin(self) -> None:
        """Run the checks before the first step."""
        if not self._is_complete:
            return
        self._try(self._remember)
        if self._state.flats and self._state.config.perturb.effective_sigma > 0:
            self._try(self._noise)
            self._try(self._sigma_zero)  # last: it rebuilds the perturbation, which drops cached row norms

    def step_done(self, loss: float, seconds: float) -> None:
        """Run the checks that are due after a step of the run; none are due after the first three."""
        self._losses.append(loss)
        self._seconds.append(seconds)
        done, total = len(self._losses), self._state.total_steps
        if self._state.progress.loss_increase is not None and len(self._increases) < STEPS:
            self._increases.append(self._state.progress.loss_increase)
            if len(self._increases) == STEPS or done == total:
                self._try(self._rise)
        if self._is_complete and done == min(STEPS, total):
            self._try(self._base)
            self._try(self._loss)
            self._try(self._cost)
            self._end()

    def _remember(self) -> Iterator[Check]:
        self._frozen_hash = hash_frozen_weights(self._models())
        yield from ()

    def _noise(self) -> Iterator[Check]:
        flat = self._state.flats[0]
        names = list(flat.layers)
        for name in dict.fromkeys((names[0], names[-1])):
            yield noise_std(self._state, flat, name)

    def _sigma_zero(self) -> Iterator[Check]:
        yield sigma_zero(self._state)

    def _rise(self) -> Iterator[Check]:
        yield from loss_increase(self._increases, self._state.config)

    def _base(self) -> Iterator[Check]:
        is_same = hash_frozen_weights(self._models()) == self._frozen_hash
        steps = count_text(len(self._losses), "step")
        message = f"the base's weights are {'bitwise unchanged' if is_same else 'changed'} after {steps}"
        yield Check("base_weights", is_same, message)

    def _loss(self) -> Iterator[Check]:
        losses = ", ".join(f"{loss:.4f}" for loss in self._losses)
        message = f"the loss of the first {count_text(len(self._losses), 'step')}: {losses}"
        yield Check("loss", all(map(math.isfinite, self._losses)), message, {"last": self._losses[-1]})

    def _cost(self) -> Iterator[Check]:
        device, seconds = self._state.accelerator.device, min(self._seconds)
        peak = memory_in_use(device)
        figures = {"seconds_per_step": seconds, "memory": float(peak)}
        message = f"{seconds:.2f} s for a step, {peak / _GIB:.2f} GiB of {_device_name(device)} memory"
        if device.type != "cuda":
            yield Check("cost", True, message, figures)
            return
        from flatlora_diffusion.memory.estimate import estimate_memory  # slow to import

        estimate = estimate_memory(self._state.config).total
        message += f" at the peak, {estimate / _GIB:.2f} GiB estimated"
        is_right = peak <= _MEMORY_TOLERANCE * estimate
        yield Check("cost", is_right, message, {**figures, "estimate": float(estimate)})

    def _models(self) -> list[nn.Module]:
        base = self._state.base
        return [base.denoiser, *base.text_encoders.values()]

    def _try(self, run_checks: Callable[[], Iterator[Check]]) -> None:
        try:
            for check in run_checks():
                self._log(check)
        except Exception as error:  # the checks only inform
            self._log(Check(run_checks.__name__.strip("_"), False, f"the check failed: {first_line(error)}"))

    def _log(self, check: Check) -> None:
        self.checks.append(check)
        level, mark = (logging.INFO, "right") if check.is_right else (logging.WARNING, "WRONG")
        logger.log(level, "self-check, %s: %s", mark, check.message)
        event = {"event": "selfcheck", "what": check.name, "is_right": check.is_right, "told": check.message}
        self._state.run.add_event({**event, **check.figures})

    def _end(self) -> None:
        if not all(check.is_right or check.is_of_settings for check in self.checks):
            logger.warning(
                "the self-check found an error, and the run goes on: please report these lines with the versions from "
                "`flatlora doctor` before you trust the result; --selfcheck never skips the check"
            )
        elif self._state.accelerator.device.type == "cuda":
            _remember_as_passed(self._state.accelerator.device)


def hash_frozen_weights(models: Iterable[nn.Module]) -> str:
    """A hash of all frozen weights, from the sum of each weight's bits on its own device.

    Quantized weights of torchao, a tensor subclass without such bits, are skipped.
    """
    digest = hashlib.sha256()
    for model in models:
        for parameter in model.parameters():
            weight = parameter.data
            if not parameter.requires_grad and type(weight) is Tensor:
                bits = weight.contiguous().view(_INTEGERS[weight.element_size()])
                digest.update(str(int(bits.sum(dtype=torch.int64))).encode())
    return digest.hexdigest()[:16]


def sigma_zero(state: TrainState) -> Check:
    """Check that loss and gradients at sigma 0 equal those of the plain LoRA without `FlatLora`.

    The difference of two passes without `FlatLora` is the tolerance for kernels that are not deterministic.
    """
    state.gradient.detach()
    try:
        plain = [_loss_and_gradients(state, []) for _ in range(2)]
    finally:  # the run goes on after an error
        state.rebuild_gradient()
    difference = _relative_difference(plain[0], _loss_and_gradients(state, state.flats))
    noise_floor = _relative_difference(*plain)
    message = f"loss and gradients at sigma 0 equal the plain LoRA's: largest relative difference {difference:.1e}"
    return Check(
        "sigma_zero",
        difference <= max(3 * noise_floor, _ROUNDING),
        message,
        {"difference": difference, "of_two_plain_passes": noise_floor},
    )


def noise_std(state: TrainState, flat: FlatLora, name: str) -> Check:
    """Check that eps, by its effect on layer `name`, has the std of Eq. 7 (arXiv:2409.14396) at the default sigma."""
    layer = flat.layers[name]
    with torch.no_grad(), eval_mode(layer), state.accelerator.autocast():
        eps = _effective_noise(flat, name)
        expected = _expected_std(layer, is_iid=flat.config.noise == "iid")
    ratio = float((eps.float() / expected[:, None]).square().mean().sqrt())
    rows, inputs = eps.shape
    samples = rows * inputs if flat.config.draw != "low_rank" else DRAW_RANK / (1 / rows + 1 / inputs)
    allowed = 0.01 + 5 / math.sqrt(2 * samples)  # half precision's rounding, and five standard deviations
    message = f"eps of {flat.config.prefix}.{name} has {ratio:.3f} times the std of Eq. 7, 1 +- {allowed:.3f} expected"
    return Check("noise_std", abs(ratio - 1) <= allowed, message, {"ratio": ratio, "allowed": allowed})


def loss_increase(increases: Sequence[LossIncrease], config: TrainConfig) -> Iterator[Check]:
    """Check that SAM's perturbation increases the loss by at least half of the first-order estimate.

    A smaller increase means that half precision rounds the perturbation away; curvature only adds to the increase.
    Nothing is reported if the rounding of fp32 hides the increase.
    """
    precision = config.optim.mixed_precision
    measured = math.fsum(increase.measured for increase in increases) / len(increases)
    expected = math.fsum(increase.expected for increase in increases) / len(increases)
    if precision == "no" and expected < _MIN_FP32_INCREASE:
        return
    is_right, is_rounded = measured >= expected / 2, precision != "no"
    message = f"rho increases the loss by {measured:.2%}, {expected:.2%} to first order"
    if not is_right and is_rounded:
        message += f": {precision} rounds most of it away; give a larger --rho, or another --mixed_precision"
    yield Check("rise", is_right, message, {"found": measured, "expected": expected}, is_of_settings=is_rounded)


def _effective_noise(flat: FlatLora, name: str) -> Tensor:
    """Columns of eps (m, at most 512 of n), as the difference in the layer's output for unit inputs.

    Drawn without a forward for DoRA, which rescales the output, and convolutions, which have no unit inputs.
    """
    layer = flat.layers[name]
    assert isinstance(layer, LoraLayer)
    base = layer.get_base_layer()
    if layer.lora_variant or not isinstance(base, nn.Linear):
        return flat.noise(name, 0, sigma=DEFAULT_SIGMA).flatten(1)
    weight = base.weight
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    inputs = torch.eye(base.in_features, device=weight.device, dtype=dtype)[None, :_NOISE_INPUTS]  # a batch of 1
    with flat.perturb(0, sigma=DEFAULT_SIGMA):
        with flat.disabled():
            unperturbed = layer(inputs).float()
        return (layer(inputs).float() - unperturbed)[0].mT


def _expected_std(layer: nn.Module, is_iid: bool) -> Tensor:
    """sigma / sqrt(n) ||W'_i|| of each row (m,), from W and PEFT's own BA in fp32."""
    assert isinstance(layer, LoraLayer)
    merged = base_weight(layer.get_base_layer()).flatten(1)
    for adapter in layer.active_adapters:
        merged = merged + layer.get_delta_weight(adapter).float().flatten(1)
    squares = merged.square().sum(dim=1)
    if is_iid:
        squares = squares.mean().expand_as(squares)
    return DEFAULT_SIGMA * (squares / merged.shape[1]).sqrt()


def _loss_and_gradients(state: TrainState, flats: Iterable[FlatLora]) -> list[Tensor]:
    """Loss and gradients of the first micro-batch, with `flats` at sigma 0; the run is unchanged."""
    slot = state.accelerator.process_index
    batch = state.batches.batch(0, slot)
    rng = generator(batch.latents.device, state.batches.seed, "diffusion", 0, slot)
    noise, timesteps = state.objective.draw(batch.latents, rng)
    model = state.accelerator.unwrap_model(state.model)  # only the main process gets here, so DDP would hang
    with seeded_dropout(state, 0, slot), ExitStack() as stack:
        for flat in flats:
            stack.enter_context(flat.perturb(0, slot, sigma=0.0))
        loss = diffusion_loss(model, state.objective, batch, noise, timesteps)
        gradients = torch.autograd.grad(loss, list(state.trainable.values()), allow_unused=True)
    return [loss.detach(), *(gradient.detach() for gradient in gradients if gradient is not None)]


def _relative_difference(first: list[Tensor], second: list[Tensor]) -> float:
    """The largest difference of two lists of tensors, relative to the largest value."""
    largest = max(float(value.abs().max()) for value in first)
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True)) / (largest or 1.0)


def _passed_file(device: torch.device) -> Path:
    """The file that marks the self-check of this version as passed on this kind of device."""
    name = f"{__version__}_torch-{torch.__version__}_{_device_name(device)}"
    return cached_assets_path(PROGRAM, subfolder="selfcheck") / re.sub(r"[^\w.+-]+", "-", name)


def _remember_as_passed(device: torch.device) -> None:
    try:
        _passed_file(device).touch()
    except OSError as error:
        logger.info("the next run repeats the self-check: %s", error)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this process's"
