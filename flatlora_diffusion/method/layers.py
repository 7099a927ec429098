"""Adapted layers: the LoRA layers of a model, the factors of their update s B A, and the hooks on their forward.

Private parts of PEFT used here: the attributes `lora_A`, `lora_B`, `scaling`, `lora_variant` and `lora_dropout` of
`LoraLayer`; the fields behind its properties `disable_adapters`, `merged` and `active_adapters`; the form
base(x) + s B(A(x)) of its forward; the classes of the DoRA variants; and that AdaLoRA's `SVDLinear` adds
alpha / (r + 1e-5) B (A * E) with r its initial rank and parameters in place of modules. Of bitsandbytes: `SCB`, the
row scales of an int8 layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from operator import is_
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.adalora.layer import AdaLoraLayer, SVDLinear
from peft.tuners.lora.layer import Conv2d, LoraLayer, ParamWrapper
from peft.tuners.lora.variants import DoraConv2dVariant, DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.method.noise import Convolution, apply_layer, compute_dtype, layer_with_weight

_WRAPPERS = ("base_model.model.", "module.")
_ROWS = 512  # rows of W converted to fp32 at a time


class HookedForward(partial[Tensor]):
    """The replaced forward of a module; its type marks the module as hooked."""


class ForwardHook:
    """Replaces the forward of a module and restores it; `forward` is the original."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._outer: Callable[..., Tensor] | None = module.__dict__.get("forward")  # set by a library that wraps it
        self._replacement: Callable[..., Tensor] | None = None
        self.forward: Callable[..., Tensor] = module.forward

    def attach(self, forward: Callable[..., Tensor]) -> None:
        self._replacement = HookedForward(forward)
        self._module.forward = self._replacement

    def restore(self) -> None:
        """Undo `attach`. If another library has wrapped the module since, the replaced forward stays inside it."""
        if self._replacement is None or not self.is_outermost:
            return
        del self._module.forward
        if self._outer is not None:
            self._module.forward = self._outer

    @property
    def is_unwrapped(self) -> bool:
        """Whether the module had its own forward before `attach`."""
        return self._outer is None

    @property
    def is_outermost(self) -> bool:
        """Whether no other library has wrapped the module since `attach`."""
        return self._module.__dict__.get("forward") is self._replacement


class FactorPair(NamedTuple):
    """A (r, ...) and B (m, r, ...) of a layer and its scale s."""

    down: nn.Parameter
    up: nn.Parameter
    scale: float


def factor_pairs(models: Iterable[nn.Module]) -> list[FactorPair]:
    """Return the trained A and B of every LoRA layer of `models`."""
    layers: list[Any] = [layer for model in models for layer in model.modules() if isinstance(layer, LoraLayer)]
    pairs = []
    for layer in layers:
        adapter = first_adapter(layer)
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        pairs.append(FactorPair(down, up, scale_of(layer, adapter)))
    return pairs


def first_adapter(layer: Any) -> str:
    """Return the name of the first adapter of `layer`, which is the trained adapter."""
    return str(next(iter(layer.lora_A)))


def has_known_factors(layer: Any) -> bool:
    """Whether `factors_of` can read the factors of `layer`."""
    if isinstance(layer, AdaLoraLayer):
        return isinstance(layer, SVDLinear) and not layer.fan_in_fan_out and bool(layer.lora_A)
    return isinstance(layer.lora_A, nn.ModuleDict) and bool(layer.lora_A)


def adds_in_place(layer: Any) -> bool:
    """Whether PEFT adds the update in place to the output of the base layer, which must then not be a view."""
    return isinstance(layer, AdaLoraLayer)


def factors_of(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """Return A and B of an adapter; for AdaLoRA diag(E) A and B, with E = 0 at pruned ranks."""
    if isinstance(layer, AdaLoraLayer):
        return layer.lora_A[adapter] * layer.lora_E[adapter], layer.lora_B[adapter]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def scale_of(layer: Any, adapter: str) -> float:
    """Return the scale s of an adapter."""
    scaling = float(layer.scaling[adapter])
    return scaling / (layer.r[adapter] + 1e-5) if isinstance(layer, AdaLoraLayer) else scaling


def square_norm(down: Tensor, up: Tensor) -> Tensor:
    """Return ||B A||_F^2 = tr((B^T B)(A A^T)) of A (r, n) and B (m, r), without forming B A."""
    return ((up.mT @ up) * (down @ down.mT)).sum()


def rank_of(layer: Any, adapter: str) -> int:
    """Return the rank of an adapter, including the ranks that AdaLoRA has pruned."""
    down = layer.lora_A[adapter]
    return int(getattr(down, "weight", down).shape[0])


class AdaptedLayer:
    """A PEFT LoRA layer and its frozen base layer with m filters of n inputs each.

    Attributes:
        name: module path without wrappers.
        tuner: PEFT's layer.
        base: the frozen layer.
        shape: shape of W, (m, n) or (m, in, kh, kw).
        inputs: n.
        convolution: geometry of a convolution, None for a linear layer.
        base_square_norms: ||W_i||^2 of the frozen W, (m,) fp32 in host memory.
        layer_hook, base_hook: hooks on the forward of `tuner` and of `base`.
        fusable_factors: by adapter, the modules A and B where PEFT computes base(x) + s B(A(x)) and nothing else.
    """

    def __init__(self, name: str, tuner: LoraLayer) -> None:
        self.name = name
        self.tuner = tuner
        self._adapters_at_start = list(tuner.lora_A.values())
        self.base: Any = tuner.get_base_layer()
        self.convolution = _geometry(self.base)
        if self.convolution is None:
            self.shape: tuple[int, ...] = (self.base.out_features, self.base.in_features)
        else:
            self.shape = (self.base.out_channels, self.base.in_channels, *self.base.kernel_size)
        self.inputs = int(torch.Size(self.shape[1:]).numel())
        with torch.no_grad():
            # W is frozen, so its norms are computed once; on the CPU they save 2.7 MB of GPU memory for SDXL.
            self.base_square_norms = _off_gpu(_unsharded(self.square_norms()))
        self.layer_hook, self.base_hook = ForwardHook(tuner), ForwardHook(self.base)
        self.fusable_factors = {
            adapter: pair for adapter in tuner.lora_A if (pair := _fusable_factors(tuner, adapter)) is not None
        }

    def adapters_changed(self) -> bool:
        """Whether an adapter was added or removed since the layer was found."""
        now = list(self.tuner.lora_A.values())
        return len(now) != len(self._adapters_at_start) or not all(map(is_, now, self._adapters_at_start))

    def is_active(self) -> bool:
        """Whether an unmerged adapter is enabled."""
        return not (self.tuner.disable_adapters or self.tuner.merged) and bool(self._adapters())

    def fusable_branch(self) -> tuple[Tensor, Tensor, float] | None:
        """Return A, B and s if W x + s B(A x) can be computed in one operation.

        None for several active adapters, sharded factors and modules with hooks.
        """
        # Called in every forward, so it reads the fields behind PEFT's slow properties.
        tuner = self.tuner
        if tuner._disable_adapters or tuner.merged_adapters:
            return None
        active: Any = tuner._active_adapter
        if type(active) is not str:
            if len(active) != 1:
                return None
            active = active[0]
        pair = self.fusable_factors.get(active)
        if pair is None or _has_hooks(self.base):
            return None
        if not torch.compiler.is_compiling() and not self.base_hook.is_outermost:  # cannot be compiled
            return None
        first, second = pair
        if "forward" in first.__dict__ or "forward" in second.__dict__ or _has_hooks(first) or _has_hooks(second):
            return None
        down, up = first._parameters["weight"], second._parameters["weight"]
        is_whole = type(down) is nn.Parameter is type(up)
        return (down, up, tuner.scaling[active]) if is_whole else None

    def plain_weight_and_bias(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None] | None:
        """Return W and bias of a plain frozen layer that computes in `dtype`; None for any other layer."""
        base = self.base
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        if type(base) not in (nn.Linear, nn.Conv2d) or type(weight) is not nn.Parameter:
            return None
        if not self.base_hook.is_unwrapped:
            return None
        if weight.dtype != dtype or weight.requires_grad or (bias is not None and bias.requires_grad):
            return None
        return weight, bias

    def add_to_base_output(self, term: Callable[[Tensor], Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return W x + term(x) with x in the compute dtype; W x alone while the LoRA is disabled."""
        output: Tensor = self.base_hook.forward(x, *args, **kwargs)
        if not self.is_active():
            return output
        # Quantized layers return the dtype of x, which can be the fp32 of a LayerNorm under autocast.
        return output + term(x.to(compute_dtype(x.device, output.dtype))).to(output.dtype)

    def apply_factors(self, down: Tensor, up: Tensor, x: Tensor) -> Tensor:
        """Return B A x for A (k, n) and B (m, k)."""
        hidden = apply_layer(x, down.reshape(-1, *self.shape[1:]), None, self.convolution)
        return F.linear(hidden, up) if self.convolution is None else F.conv2d(hidden, up[:, :, None, None])

    def apply_frozen_factors(self, down: Tensor, up: Tensor, x: Tensor) -> Tensor:
        """Return B A x for constant A and B; a convolution then saves no x for backward."""
        if self.convolution is None:
            return self.apply_factors(down, up, x)
        hidden = layer_with_weight(x, lambda: down.reshape(-1, *self.shape[1:]), self.convolution)
        return layer_with_weight(hidden, lambda: up[:, :, None, None], Convolution())

    def is_fusable(self) -> bool:
        """Whether W + eps can be formed in one fp32 buffer: a plain frozen fp32 layer that no other library wraps."""
        weight = self.base.weight
        return (
            self.base_hook.is_unwrapped
            and type(self.base) in (nn.Linear, nn.Conv2d)
            and type(weight) is nn.Parameter
            and weight.dtype == torch.float32
            and not weight.requires_grad
        )

    def square_norms(self) -> Tensor:
        """Return ||W_i||^2 of the base layer, (m,) fp32; a quantized W is dequantized for it."""
        steps = int8_steps(self.base)
        if steps is not None:  # PEFT's dequantization would convert all of W to fp32
            return _square_norms(self.base.weight.data).mul_(steps.square())
        return _square_norms(dequantize_module_weight(self.base).reshape(self.shape[0], -1))

    def _adapters(self) -> list[str]:
        return [adapter for adapter in self.tuner.active_adapters if adapter in self.tuner.lora_A]

    @property
    def rank(self) -> int:
        """R, the sum of the ranks of the active adapters."""
        return sum(rank_of(self.tuner, adapter) for adapter in self._adapters())

    @property
    def scale(self) -> float:
        """The scale that `factors` does not include: s of the only active adapter, or 1 for several."""
        adapters = self._adapters()
        return scale_of(self.tuner, adapters[0]) if len(adapters) == 1 else 1.0

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (R, n) and B (m, R) in fp32; several active adapters are concatenated, each B times its s."""
        adapters, tuner = self._adapters(), self.tuner
        pairs = [factors_of(tuner, adapter) for adapter in adapters]
        downs = [_matrix(_unsharded(down)) for down, _ in pairs]
        ups = [_matrix(_unsharded(up)) for _, up in pairs]
        if len(adapters) == 1:
            return downs[0], ups[0]
        if not adapters:
            empty = partial(torch.zeros, device=self.base.weight.device)
            return empty(0, self.inputs), empty(self.shape[0], 0)
        scaled = [up * scale_of(tuner, adapter) for adapter, up in zip(adapters, ups, strict=True)]
        return torch.cat(downs), torch.cat(scaled, dim=1)

    def base_matmul(self, down: Tensor, out: Tensor) -> None:
        """Write W A^T to `out` (m, R). A quantized layer is not dequantized: its forward runs on the rows of A."""
        weight, bias = self.base.weight, self.base.bias
        if type(weight) in (nn.Parameter, Tensor):
            torch.mm(_matrix(weight), down.mT, out=out)
        elif is_sharded(weight):
            out.copy_(_sharded_product(_matrix(weight), down.mT))
        elif bias is None:
            out.copy_(self.base_hook.forward(down).float().T)
        else:  # bitsandbytes casts its bias in place to the dtype of the input, so the input has the bias's dtype
            out.copy_((self.base_hook.forward(down.to(bias.dtype)).float() - bias.float()).T)


def find_adapted_layers(model: nn.Module) -> list[AdaptedLayer]:
    """Return every LoRA layer of `model`.

    Raises:
        ConfigError: no LoRA layer, or adapted layers that cannot be perturbed (named).
    """
    layers, refused = [], []
    for path, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        name = layer_name(path)
        reason = _why_refused(module)
        if reason is None:
            layers.append(AdaptedLayer(name, module))
        else:
            refused.append(f"{name} ({reason})")
    if refused:
        raise ConfigError(f"Flat-LoRA cannot perturb {len(refused)} adapted layer(s): {', '.join(refused)}")
    twice = [name for name, count in Counter(layer.name for layer in layers).items() if count > 1]
    if twice:
        raise ConfigError(
            f"adapted layers share the names {', '.join(twice)} without their wrappers; rename modules of the model"
        )
    if not layers:
        raise ConfigError("Flat-LoRA found no LoRA layer in the model; add an adapter first")
    return layers


def int8_steps(base: Any) -> Tensor | None:
    """Return the quantization step of each row of a bitsandbytes int8 layer, (m,) fp32; None for any other layer.

    PEFT's dequantization would remove these scales from a layer on a CPU.
    """
    if type(base.weight).__name__ != "Int8Params":
        return None
    scales: Tensor = base.weight.SCB if base.state.SCB is None else base.state.SCB
    return scales.float() / 127


def layer_name(path: str) -> str:
    """Return a module path without the prefixes of PEFT, DDP and torch.compile."""
    path = path.replace("_orig_mod.", "")
    while path.startswith(_WRAPPERS):
        path = path.removeprefix("module.").removeprefix("base_model.model.")
    return path


def _why_refused(layer: Any) -> str | None:
    """Return the reason why `layer` cannot be perturbed, or None."""
    kind = type(layer).__name__
    if not isinstance(layer, LoraLayer):
        return f"{type(layer).__module__.split('.')[-2]} {kind} is not LoRA"
    base = layer.get_base_layer()
    is_plain = has_known_factors(layer) and not isinstance(layer, ParamWrapper)
    if not is_plain or not isinstance(base, nn.Linear | nn.Conv2d):
        return f"{kind} around {type(base).__name__} is not handled yet"
    if layer.merged:
        return "its adapter is merged into W; unmerge it first"
    if isinstance(base, nn.Conv2d) and (reason := _why_unmergeable(layer, base)):
        return reason
    if isinstance(base.forward, HookedForward):
        return "another FlatLora perturbs it already; call its detach() first"
    for adapter, variant in layer.lora_variant.items():
        if not isinstance(variant, DoraLinearVariant | DoraConv2dVariant):
            return f"{type(variant).__name__} is not handled yet"
        if not isinstance(layer.lora_dropout[adapter], nn.Identity):
            return "DoRA with lora_dropout > 0 does not rescale eps; set lora_dropout=0"
    return None


def _why_unmergeable(layer: Any, base: nn.Conv2d) -> str | None:
    """Return the reason why the adapter of a convolution cannot be merged as W + sBA, or None."""
    if base.groups > 1:
        return f"groups={base.groups}; only groups=1 can be merged"
    if set(base.dilation) != {1}:
        return f"dilation={base.dilation}; PEFT does not dilate A, so it cannot be merged"
    if base.padding_mode != "zeros" or isinstance(base.padding, str) or not isinstance(layer, Conv2d):
        return f"padding {base.padding!r} with mode {base.padding_mode!r} is not handled"
    return None


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor, sharded by FSDP2 or tensor parallelism."""
    return hasattr(tensor, "device_mesh")


def _sharded_product(weight: Any, columns: Tensor) -> Tensor:
    """Return the full W C of a sharded W; only the result is communicated."""
    from torch.distributed.tensor import DTensor, Replicate  # not in every build of PyTorch

    everywhere = [Replicate()] * weight.device_mesh.ndim
    product: Tensor = _unsharded(weight @ DTensor.from_local(columns, weight.device_mesh, everywhere))
    return product


def _unsharded(tensor: Any) -> Any:
    """Return the full tensor of a sharded tensor, any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def _off_gpu(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.cpu()


def _matrix(weight: Tensor) -> Tensor:
    """Return a weight as (m, n) fp32."""
    # Most weights are, and then no operator is called.
    return weight if weight.ndim == 2 and weight.dtype == torch.float32 else weight.flatten(1).float()


def _square_norms(weight: Tensor) -> Tensor:
    """Return the squared norms of the rows of `weight` (m, n), fp32."""
    return torch.cat([torch.linalg.vector_norm(rows.float(), dim=1).square() for rows in weight.split(_ROWS)])


def _fusable_factors(tuner: LoraLayer, adapter: str) -> tuple[Any, Any] | None:
    """Return the modules A and B if PEFT computes base(x) + s B(A(x)): no dropout, no DoRA, no bias."""
    pair: tuple[Any, Any] = (tuner.lora_A[adapter], tuner.lora_B[adapter])
    kind = nn.Conv2d if isinstance(tuner.get_base_layer(), nn.Conv2d) else nn.Linear
    is_plain = isinstance(tuner.lora_dropout[adapter], nn.Identity) and adapter not in tuner.lora_variant
    if not is_plain or any(type(module) is not kind or "forward" in module.__dict__ for module in pair):
        return None
    return None if pair[1].bias is not None else pair


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _geometry(base: nn.Module) -> Convolution | None:
    if not isinstance(base, nn.Conv2d):
        return None
    assert not isinstance(base.padding, str), "refused when the layers were found"
    return Convolution(base.stride, base.padding)
