"""What can be measured of a run on its own device, each with what it has to be."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from flatlora_diffusion.adapter.layers import base_weight
from flatlora_diffusion.config import DEFAULT_SIGMA, TrainConfig
from flatlora_diffusion.method.flat_lora import FlatLora
from flatlora_diffusion.method.low_rank_draw import DRAW_RANK
from flatlora_diffusion.sdxl.objective import diffusion_loss, sample_noise
from flatlora_diffusion.sdxl.sampling import eval_mode
from flatlora_diffusion.storage.rng import generator
from flatlora_diffusion.training.state import Rise, TrainState, dropout_draws

_INPUTS = 512  # of a layer, that the noise is measured on
_HIDDEN_RISE = 1e-5
_ROUNDING = 1e-5  # relative; what kernels that add in any order may differ by
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: its key in events.jsonl, whether it is as it has to be, and how it is told.

    is_of_settings: whether what is wrong is what the run was told to do, and not the device.
    """

    what: str
    is_right: bool
    told: str
    figures: dict[str, float] = field(default_factory=dict)
    is_of_settings: bool = False


def bits_of_frozen(models: Iterable[nn.Module]) -> str:
    """A hash of the bits of all frozen weights, by a sum of each on its own device: nothing large is moved.

    torchao's weights, a tensor class of their own, have no such bits and are passed over.
    """
    found = hashlib.sha256()
    for model in models:
        for weight in (one.data for one in model.parameters() if not one.requires_grad and type(one.data) is Tensor):
            bits = weight.contiguous().view(_BITS[weight.element_size()])
            found.update(str(int(bits.sum(dtype=torch.int64))).encode())
    return found.hexdigest()[:16]


def sigma_zero(state: TrainState) -> Check:
    """Whether loss and gradients of the first micro-batch at sigma 0 are those of the plain LoRA, without `FlatLora`.

    Two passes of the plain one tell what the device's own kernels differ by.
    """
    state.gradient.detach()
    try:
        plain = [_loss_and_gradients(state, []) for _ in range(2)]
    finally:  # the run goes on, whatever fails here
        state.begin_gradient()
    off = _distance(plain[0], _loss_and_gradients(state, state.flats))
    floor = _distance(*plain)
    is_right = off <= max(3 * floor, _ROUNDING)
    told = f"at sigma 0 loss and gradients are those of the plain LoRA: largest relative difference {off:.1e}"
    return Check("sigma_zero", is_right, told, {"difference": off, "of_two_plain_passes": floor})


def noise_std(state: TrainState, flat: FlatLora, name: str) -> Check:
    """Whether eps, as it acts on layer `name`, has the std of Eq. 7 (arXiv:2409.14396), at the default sigma."""
    layer = flat.layers[name]
    with torch.no_grad(), eval_mode(layer), state.accelerator.autocast():
        eps = _acting_noise(flat, name)
        expected = _expected_std(layer, is_iid=flat.config.noise == "iid")
    ratio = float((eps.float() / expected[:, None]).square().mean().sqrt())
    rows, inputs = eps.shape
    numbers = rows * inputs if flat.config.draw != "low_rank" else DRAW_RANK / (1 / rows + 1 / inputs)
    allowed = 0.01 + 5 / math.sqrt(2 * numbers)  # five standard deviations of the ratio, and the rounding of halves
    told = f"eps of {flat.config.prefix}.{name} has {ratio:.3f} times the std of Eq. 7, 1 +- {allowed:.3f} expected"
    return Check("noise_std", abs(ratio - 1) <= allowed, told, {"ratio": ratio, "allowed": allowed})


def ascent_rise(rises: Sequence[Rise], config: TrainConfig) -> Iterator[Check]:
    """Whether the ascent of SAM lifts the loss of these steps by half of what it does to first order, or more.

    The loss is curved, so that it rises further, unless half precision rounds eps away beside W. Nothing is told of a
    rise that the rounding of fp32 hides.
    """
    precision = config.optim.mixed_precision
    found, expected = (math.fsum(getattr(one, name) for one in rises) / len(rises) for name in ("found", "expected"))
    if precision == "no" and expected < _HIDDEN_RISE:
        return
    is_right, is_rounded = found >= expected / 2, precision != "no"
    told = f"ascending by rho lifts the loss by {found:.2%}, {expected:.2%} to first order"
    if not is_right and is_rounded:
        told += f": {precision} rounds most of it away; give a larger --rho, or another --mixed_precision"
    yield Check("rise", is_right, told, {"found": found, "expected": expected}, is_of_settings=is_rounded)


def _acting_noise(flat: FlatLora, name: str) -> Tensor:
    """Columns of eps (m, some of n), as the difference that it makes to the layer's output for unit inputs.

    A DoRA rescales the output, and a convolution has no such inputs: theirs is drawn without a forward.
    """
    layer = flat.layers[name]
    assert isinstance(layer, LoraLayer)
    base = layer.get_base_layer()
    if layer.lora_variant or not isinstance(base, nn.Linear):
        return flat.noise(name, 0, sigma=DEFAULT_SIGMA).flatten(1)
    weight = base.weight
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    inputs = torch.eye(base.in_features, device=weight.device, dtype=dtype)[None, :_INPUTS]  # of one example
    with flat.perturb(0, sigma=DEFAULT_SIGMA):
        with flat.disabled():
            without = layer(inputs).float()
        return (layer(inputs).float() - without)[0].mT


def _expected_std(layer: nn.Module, is_iid: bool) -> Tensor:
    """sigma / sqrt(n) ||W'_i|| of each row (m,), by W and PEFT's own BA in fp32."""
    assert isinstance(layer, LoraLayer)
    merged = base_weight(layer.get_base_layer()).flatten(1)
    for adapter in layer.active_adapters:
        merged = merged + layer.get_delta_weight(adapter).float().flatten(1)
    squares = merged.square().sum(dim=1)
    if is_iid:
        squares = squares.mean().expand_as(squares)
    return DEFAULT_SIGMA * (squares / merged.shape[1]).sqrt()


def _loss_and_gradients(state: TrainState, flats: Iterable[FlatLora]) -> list[Tensor]:
    """Those of the first micro-batch; nothing of the run is moved by it. `flats` perturb it with sigma 0."""
    slot = state.accelerator.process_index
    batch = state.batches.batch(0, slot)
    rng = generator(batch.latents.device, state.batches.seed, "diffusion", 0, slot)
    noise, timesteps = sample_noise(state.objective, batch.latents, rng)
    model = state.accelerator.unwrap_model(state.model)  # one process does this alone
    with dropout_draws(state, 0, slot), ExitStack() as stack:
        for flat in flats:
            stack.enter_context(flat.perturb(0, slot, sigma=0.0))
        loss = diffusion_loss(model, state.objective, batch, noise, timesteps)
        gradients = torch.autograd.grad(loss, list(state.trainable.values()), allow_unused=True)
    return [loss.detach(), *(one.detach() for one in gradients if one is not None)]


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference of two sets of tensors, over the largest value."""
    largest = max(float(value.abs().max()) for value in one)
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)) / (largest or 1.0)
