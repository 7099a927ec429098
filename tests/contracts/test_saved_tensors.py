"""Nothing of the size of a weight is kept: not for backward, not beside it, not between steps."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from lora_by_hand import lora_layers
from peft import get_peft_model
from tiny_models import ATTENTION, DENOISERS, Adapter, Case, normal, randomize_adapters, seeded, toy_case
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from flatlora_diffusion import FlatLora
from flatlora_diffusion.method import row_norms

pytestmark = pytest.mark.usefixtures("draw", "no_free_bytes")

WIDTHS = (48, 64, 40, 56, 72, 44, 60)
TARGETS = tuple(str(index) for index in range(0, 2 * len(WIDTHS) - 2, 2))


@pytest.fixture
def no_free_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers here are so small that norms would be taken of all at once."""
    monkeypatch.setattr(row_norms, "FREE", 0)


def stack_case(adapter: Adapter | None = None) -> Case:
    """Six linear layers with far more weights than activations: anything as large as a weight stands out."""
    adapter = adapter or Adapter()
    with seeded(0):
        pairs = itertools.pairwise(WIDTHS)
        layers = [module for width, after in pairs for module in (nn.Linear(width, after), nn.Tanh())]
        model = get_peft_model(nn.Sequential(*layers), adapter.config(TARGETS), autocast_adapter_dtype=False)
    randomize_adapters(model)
    model.to(adapter.dtype)
    inputs = normal(1, 5, WIDTHS[0]).to(adapter.dtype)
    return Case(model, lambda module: module(inputs), normal(2, 5, WIDTHS[-1]))


def conv_case(adapter: Adapter | None = None) -> Case:
    """Three convolutions on a 3 x 3 image: 4,608 weights and more against at most 576 activations."""
    adapter = adapter or Adapter()
    with seeded(0):
        layers = [nn.Conv2d(24, 32, 3, padding=1), nn.Tanh(), nn.Conv2d(32, 28, 3, padding=1), nn.Tanh()]
        layers.append(nn.Conv2d(28, 20, 3, padding=1))
        model = get_peft_model(nn.Sequential(*layers), adapter.config(("0", "2", "4")), autocast_adapter_dtype=False)
    randomize_adapters(model)
    model.to(adapter.dtype)
    inputs = normal(1, 2, 24, 3, 3).to(adapter.dtype)
    return Case(model, lambda module: module(inputs), normal(2, 2, 20, 3, 3))


def alike_case(adapter: Adapter | None = None) -> Case:
    """Twelve linear layers of one shape: norms that are taken of several at once must not pile up."""
    adapter = adapter or Adapter()
    with seeded(0):
        layers = [module for _ in range(12) for module in (nn.Linear(64, 64), nn.Tanh())]
        names = tuple(str(index) for index in range(0, 24, 2))
        model = get_peft_model(nn.Sequential(*layers), adapter.config(names), autocast_adapter_dtype=False)
    randomize_adapters(model)
    model.to(adapter.dtype)
    inputs = normal(1, 5, 64).to(adapter.dtype)
    return Case(model, lambda module: module(inputs), normal(2, 5, 64))


BIG = {"linear": stack_case, "conv": conv_case, "alike": alike_case}


def factor_bytes(model: nn.Module, adapter: Adapter | None = None) -> int:
    """What low-rank draws keep of all layers: 4 numbers a row and an input, in half precision and as computed with."""
    adapter = adapter or Adapter()
    numbers = sum(4 * sum(weight.flatten(1).shape) for weight in base_weights(model))
    return numbers * (2 + 4 * (adapter.dtype == torch.float32))


def base_weights(model: nn.Module) -> list[Tensor]:
    return [layer.get_base_layer().weight for layer in lora_layers(model).values()]


def weight_sizes(model: nn.Module) -> list[int]:
    return [weight.numel() for weight in base_weights(model)]


def parameter_storages(model: nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in model.parameters()}


def saved_for_backward(
    case: Case, compute: torch.dtype | None, perturb: AbstractContextManager[None] | None = None
) -> list[Tensor]:
    """Every tensor autograd keeps from opening `perturb` to the loss, except the parameters themselves."""
    parameters = parameter_storages(case.model)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), perturb or nullcontext():
        with torch.autocast("cpu", compute or torch.bfloat16, enabled=compute is not None):
            prediction = case.predict(case.model)
        nn.functional.mse_loss(prediction.float(), case.target).backward()
    return saved


@pytest.mark.parametrize("kind", BIG)
@pytest.mark.parametrize(
    ("adapter", "compute"),
    [
        pytest.param(Adapter(), None, id="fp32"),
        pytest.param(Adapter(dtype=torch.bfloat16), None, id="bf16"),
        pytest.param(Adapter(dtype=torch.float16), None, id="fp16"),
        pytest.param(Adapter(), torch.bfloat16, id="autocast"),
        pytest.param(Adapter(dora=True), None, id="dora"),
    ],
)
def test_backward_saves_no_weight_sized_tensor_beyond_plain_lora(
    kind: str, adapter: Adapter, compute: torch.dtype | None, draw: str
) -> None:
    """In pieces too, less than one weight; low-rank draws may keep 4 numbers a row and an input."""
    case = BIG[kind](adapter)
    smallest = min(weight_sizes(case.model))
    allowed = factor_bytes(case.model, adapter) if draw == "low_rank" else 0
    plain = saved_for_backward(case, compute)
    flat = FlatLora(case.model, schedule="constant")
    ours = saved_for_backward(case, compute, flat.perturb(step=0))

    def large(saved: list[Tensor]) -> Counter[int]:
        """How many different buffers of each size of a weight or more; the same buffer saved twice costs nothing."""
        buffers = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in saved}
        return Counter(
            storage.nbytes() for storage in buffers.values() if storage.nbytes() >= smallest * adapter.dtype.itemsize
        )

    assert sum((large(ours) - large(plain)).elements()) <= allowed
    extra = sum(tensor.nbytes for tensor in ours) - sum(tensor.nbytes for tensor in plain)
    assert extra < smallest * adapter.dtype.itemsize + allowed, f"{extra} bytes more than plain LoRA, in pieces"


@pytest.mark.parametrize("denoiser", DENOISERS)
def test_a_denoiser_saves_no_weight_shaped_tensor_beyond_plain_lora(denoiser: str) -> None:
    case = DENOISERS[denoiser](Adapter(targets=(*ATTENTION, "conv1", "ff.net.2") if denoiser == "unet" else ()))
    weights = {layer.get_base_layer().weight.shape for layer in lora_layers(case.model).values()}
    shapes = weights | {shape[::-1] for shape in weights} | {torch.Size([s[0], s[1:].numel()]) for s in weights}
    plain = saved_for_backward(case, None)
    flat = FlatLora(case.model, schedule="constant")
    ours = saved_for_backward(case, None, flat.perturb(step=0))
    counted = [Counter(tensor.shape for tensor in saved if tensor.shape in shapes) for saved in (ours, plain)]
    assert not counted[0] - counted[1]


def live_storages() -> dict[int, int]:
    """Bytes of every buffer that some Python object, an autograd context included, keeps alive.

    What a compiler keeps to reason about has no buffer.
    """
    gc.collect()
    kinds = ((item, type(item)) for item in gc.get_objects())
    tensors = [item for item, kind in kinds if issubclass(kind, Tensor) and not issubclass(kind, FakeTensor)]
    buffers = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        buffers[storage.data_ptr()] = storage.nbytes()
    return buffers


@pytest.mark.parametrize("kind", BIG)
def test_no_buffer_of_a_weights_size_outlives_the_forward(kind: str, draw: str) -> None:
    """Catches what is kept beside autograd's own list: attributes of a context, caches, closures."""
    case = BIG[kind]()
    smallest = min(weight_sizes(case.model)) * 4
    flat = FlatLora(case.model, schedule="constant")
    before = live_storages()
    with flat.perturb(step=0):
        loss = case.loss()
        after = live_storages()
        loss.backward()
    saved = [size for pointer, size in after.items() if pointer not in before and size >= smallest]
    assert sum(saved) <= (factor_bytes(case.model) if draw == "low_rank" else 0)


class LargestLive(TorchDispatchMode):
    """Follows the buffers of a weight's size or more that operators return, until they are freed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.threshold = min(weight_sizes(model)) * 2  # bytes: a bf16 buffer of the smallest layer counts
        self.ignored = parameter_storages(model)
        self.followed: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self._follow(value)
        self.followed = {key: item for key, item in self.followed.items() if not item[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.followed.values()))
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes() >= self.threshold and storage.data_ptr() not in self.ignored:
            reference = StorageWeakRef(storage)
            self.followed[reference.cdata] = (reference, storage.nbytes())


@pytest.mark.parametrize("kind", BIG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_one_layer_has_a_buffer_at_a_time(
    kind: str, dtype: torch.dtype, draw: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most eps in fp32 and W + eps of the largest layer at once, in forward and in backward alike.

    Low-rank draws have their factors instead, three times over while they are put together; draws by place the words
    of a fixed number of counters, here fewer than the smallest layer has.
    """
    case = BIG[kind](Adapter(dtype=dtype))
    largest = max(weight_sizes(case.model)) * 4
    flat = FlatLora(case.model, schedule="constant")
    with LargestLive(case.model) as plain:
        case.loss().backward()
    assert plain.peak < largest, "activations are too large for this test to see weights"
    with LargestLive(case.model) as live, flat.perturb(step=0):
        case.loss().backward()
    factors = factor_bytes(case.model, Adapter(dtype=dtype)) if draw == "low_rank" else 0
    assert live.peak <= plain.peak + 2 * largest + 3 * factors


@pytest.mark.parametrize("kind", BIG)
def test_the_state_between_steps_is_a_few_numbers_per_filter(kind: str) -> None:
    case = BIG[kind]()
    filters = sum(len(layer.get_base_layer().weight) for layer in lora_layers(case.model).values())
    before = live_storages()
    flat = FlatLora(case.model, schedule="constant")
    for step in range(3):
        with flat.perturb(step=step):
            case.loss().backward()
        case.model.zero_grad(set_to_none=True)
    assert 4 * filters <= flat.state_bytes <= 16 * filters
    after = live_storages()
    saved = sum(size for pointer, size in after.items() if pointer not in before)
    assert saved <= flat.state_bytes + 1024, f"{saved} bytes are kept, {flat.state_bytes} are reported"


def test_the_state_of_a_toy_is_reported_before_its_first_step() -> None:
    model = toy_case().model
    flat = FlatLora(model)
    assert flat.state_bytes == FlatLora(toy_case(seed=5).model).state_bytes > 0
