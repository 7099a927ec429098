"""The seam to PEFT: which layers of a model carry LoRA, what W' = W + sBA is made of, their interception.

Private touches of PEFT, with those of `branch.py` all: the attributes `lora_A`, `lora_B`, `scaling`, `lora_variant`
and `lora_dropout` of `LoraLayer`, what is behind its properties `disable_adapters`, `merged` and `active_adapters`,
that it computes base(x) + s B(A(x)), and the classes of the DoRA variants. Of bitsandbytes: `SCB`, the scales of an
int8 layer's rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from operator import is_
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Conv2d, LoraLayer, ParamWrapper
from peft.tuners.lora.variants import DoraConv2dVariant, DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.method.branch import factors_of, has_branch, rank_of, scale_of
from flatlora_diffusion.method.forward_hooks import Interception, Seam
from flatlora_diffusion.method.noise import Convolution, applied, compute_dtype, layer_at

_WRAPPERS = ("base_model.model.", "module.")
_ROWS = 512  # rows of W that are turned into fp32 at a time


class AdaptedLayer:
    """One LoRA layer with its frozen base: m filters of n inputs, `shape` (m, n) or (m, in, kh, kw)."""

    def __init__(self, name: str, tuner: LoraLayer) -> None:
        self.name = name
        self.tuner = tuner
        self._known_adapters = list(tuner.lora_A.values())
        self.base: Any = tuner.get_base_layer()
        self.convolution = _geometry(self.base)
        if self.convolution is None:
            self.shape: tuple[int, ...] = (self.base.out_features, self.base.in_features)
        else:
            self.shape = (self.base.out_channels, self.base.in_channels, *self.base.kernel_size)
        self.inputs = int(torch.Size(self.shape[1:]).numel())
        with torch.no_grad():
            # The frozen W never changes, so they are taken once; a GPU has a better use for 2.7 MB of SDXL's.
            self.base_square_norms = _off_gpu(_whole(self.square_norms()))
        self.whole, self.below = Seam(tuner), Seam(self.base)
        self.plain_pairs = {name: pair for name in tuner.lora_A if (pair := _plain_pair(tuner, name)) is not None}

    def has_other_adapters(self) -> bool:
        """Whether an adapter came or went since the layer was found."""
        now = list(self.tuner.lora_A.values())
        return len(now) != len(self._known_adapters) or not all(map(is_, now, self._known_adapters))

    def is_active(self) -> bool:
        """Whether an unmerged adapter takes part in the forward."""
        return not (self.tuner.disable_adapters or self.tuner.merged) and bool(self._adapters())

    def branch(self) -> tuple[Tensor, Tensor, float] | None:
        """A, B and s where the layer computes W x + s B(A x) with them, and all of it at once would miss nothing.

        None for several adapters, for factors of which a process has only a part, and for modules with hooks. It is
        asked in every pass, so it reads what PEFT's properties read.
        """
        tuner = self.tuner
        if tuner._disable_adapters or tuner.merged_adapters:
            return None
        active: Any = tuner._active_adapter
        if type(active) is not str:
            if len(active) != 1:
                return None
            active = active[0]
        pair = self.plain_pairs.get(active)
        if pair is None or _has_hooks(self.base):
            return None
        if not torch.compiler.is_compiling() and not self.below.is_ours:  # a comparison that cannot be compiled
            return None
        first, second = pair
        if "forward" in first.__dict__ or "forward" in second.__dict__ or _has_hooks(first) or _has_hooks(second):
            return None
        down, up = first._parameters["weight"], second._parameters["weight"]
        is_whole = type(down) is nn.Parameter is type(up)
        return (down, up, tuner.scaling[active]) if is_whole else None

    def plain_base(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None] | None:
        """W and bias of a linear layer that is no more than they are and computes in `dtype`; else None."""
        base = self.base
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        if type(base) is not nn.Linear or type(weight) is not nn.Parameter or not self.below.is_bare:
            return None
        if weight.dtype != dtype or weight.requires_grad or (bias is not None and bias.requires_grad):
            return None
        return weight, bias

    def with_added(self, added: Callable[[Tensor], Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """W x + added(x), the latter of x in the dtype that the layer computes in; W x alone while its LoRA is off."""
        output: Tensor = self.below.forward(x, *args, **kwargs)
        if not self.is_active():
            return output
        # Quantized layers return the dtype of x, which under autocast may be a LayerNorm's fp32.
        return output + added(x.to(compute_dtype(x.device, output.dtype))).to(output.dtype)

    def product(self, down: Tensor, up: Tensor, x: Tensor) -> Tensor:
        """B A x, of A (k, n) and B (m, k)."""
        hidden = applied(x, down.reshape(-1, *self.shape[1:]), None, self.convolution)
        return F.linear(hidden, up) if self.convolution is None else F.conv2d(hidden, up[:, :, None, None])

    def fixed_product(self, down: Tensor, up: Tensor, x: Tensor) -> Tensor:
        """`product` of factors that nothing trains: a convolution then keeps no x for its backward."""
        if self.convolution is None:
            return self.product(down, up, x)
        hidden = layer_at(x, lambda: down.reshape(-1, *self.shape[1:]), self.convolution)
        return layer_at(hidden, lambda: up[:, :, None, None], Convolution())

    def is_fusable(self) -> bool:
        """Whether W + eps can be formed in one fp32 buffer: a plain frozen fp32 layer that nobody else intercepts."""
        weight = self.base.weight
        return (
            self.below.is_bare
            and type(self.base) in (nn.Linear, nn.Conv2d)
            and type(weight) is nn.Parameter
            and weight.dtype == torch.float32
            and not weight.requires_grad
        )

    def square_norms(self) -> Tensor:
        """||W_i||^2 of the base layer as it is now, (m,) fp32. A quantized W is dequantized, a layer at a time."""
        steps = int8_steps(self.base)
        if steps is not None:  # PEFT's dequantization would make all of W fp32
            return _square_norms(self.base.weight.data).mul_(steps.square())
        return _square_norms(dequantize_module_weight(self.base).reshape(self.shape[0], -1))

    def _adapters(self) -> list[str]:
        return [adapter for adapter in self.tuner.active_adapters if adapter in self.tuner.lora_A]

    @property
    def rank(self) -> int:
        """R, the sum of the active adapters' ranks."""
        return sum(rank_of(self.tuner, adapter) for adapter in self._adapters())

    @property
    def scale(self) -> float:
        """The s that `factors` leaves out: the active adapter's, or 1 when there are several."""
        adapters = self._adapters()
        return scale_of(self.tuner, adapters[0]) if len(adapters) == 1 else 1.0

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, n) and B (m, R) in fp32; of several active adapters, side by side with each s in its B."""
        adapters, tuner = self._adapters(), self.tuner
        pairs = [factors_of(tuner, adapter) for adapter in adapters]
        downs = [_matrix(_whole(down)) for down, _ in pairs]
        ups = [_matrix(_whole(up)) for _, up in pairs]
        if len(adapters) == 1:
            return downs[0], ups[0]
        if not adapters:
            empty = partial(torch.zeros, device=self.base.weight.device)
            return empty(0, self.inputs), empty(self.shape[0], 0)
        scaled = [up * scale_of(tuner, adapter) for adapter, up in zip(adapters, ups, strict=True)]
        return torch.cat(downs), torch.cat(scaled, dim=1)

    def weight_times(self, down: Tensor, out: Tensor) -> None:
        """W A^T into `out` (m, R). A quantized W is never dequantized for it: its forward is run on the rows of A."""
        weight, bias = self.base.weight, self.base.bias
        if type(weight) in (nn.Parameter, Tensor):
            torch.mm(_matrix(weight), down.mT, out=out)
        elif is_sharded(weight):
            out.copy_(_sharded_product(_matrix(weight), down.mT))
        elif bias is None:
            out.copy_(self.below.forward(down).float().T)
        else:  # bitsandbytes casts the bias in place to the dtype of its inputs, so they come in the bias's
            out.copy_((self.below.forward(down.to(bias.dtype)).float() - bias.float()).T)


def find_adapted_layers(model: nn.Module) -> list[AdaptedLayer]:
    """Every LoRA layer of `model`. Raises ConfigError for none, and for adapted layers that cannot be perturbed."""
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
        raise ConfigError(f"adapted layers share a name once wrappers are left out of it: {', '.join(twice)}")
    if not layers:
        raise ConfigError("Flat-LoRA found no LoRA layer in the model; add an adapter first")
    return layers


def int8_steps(base: Any) -> Tensor | None:
    """The step between integers in each row of an int8 layer of bitsandbytes, (m,) fp32; None for any other layer.

    PEFT's dequantization takes these scales away from such a layer on a CPU.
    """
    if type(base.weight).__name__ != "Int8Params":
        return None
    scales: Tensor = base.weight.SCB if base.state.SCB is None else base.state.SCB
    return scales.float() / 127


def layer_name(path: str) -> str:
    """A module path without the wrappers of PEFT and DDP (in front) or of torch.compile (anywhere)."""
    path = path.replace("_orig_mod.", "")
    while path.startswith(_WRAPPERS):
        path = path.removeprefix("module.").removeprefix("base_model.model.")
    return path


def _why_refused(layer: Any) -> str | None:
    """The reason why eps cannot act on `layer` as Eq. 7 asks, or None."""
    kind = type(layer).__name__
    if not isinstance(layer, LoraLayer):
        return f"{type(layer).__module__.split('.')[-2]} {kind} is not LoRA"
    base = layer.get_base_layer()
    is_plain = has_branch(layer) and not isinstance(layer, ParamWrapper)
    if not is_plain or not isinstance(base, nn.Linear | nn.Conv2d):
        return f"{kind} around {type(base).__name__} is not handled yet"
    if layer.merged:
        return "its adapter is merged into W; unmerge it first"
    if isinstance(base, nn.Conv2d) and (reason := _why_unmergeable(layer, base)):
        return reason
    if isinstance(base.forward, Interception):
        return "another FlatLora perturbs it already; detach that one first"
    for adapter, variant in layer.lora_variant.items():
        if not isinstance(variant, DoraLinearVariant | DoraConv2dVariant):
            return f"{type(variant).__name__} is not handled yet"
        if not isinstance(layer.lora_dropout[adapter], nn.Identity):
            return "DoRA with lora_dropout > 0 would let eps escape its rescaling; set lora_dropout=0"
    return None


def _why_unmergeable(layer: Any, base: nn.Conv2d) -> str | None:
    """The reason why PEFT could not merge the adapter of a convolution as W + sBA, or None."""
    if base.groups > 1:
        return f"groups={base.groups}; only groups=1 can be merged"
    if set(base.dilation) != {1}:
        return f"dilation={base.dilation}; PEFT does not dilate A, so it cannot be merged"
    if base.padding_mode != "zeros" or isinstance(base.padding, str) or not isinstance(layer, Conv2d):
        return f"padding {base.padding!r} with mode {base.padding_mode!r} is not handled"
    return None


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has a part of it only, as FSDP2 leaves it."""
    return hasattr(tensor, "device_mesh")


def _sharded_product(weight: Any, columns: Tensor) -> Tensor:
    """W C whole, of a W that is sharded; only the result travels."""
    from torch.distributed.tensor import DTensor, Replicate  # not in every build of PyTorch

    everywhere = [Replicate()] * weight.device_mesh.ndim
    product: Tensor = _whole(weight @ DTensor.from_local(columns, weight.device_mesh, everywhere))
    return product


def _whole(tensor: Any) -> Any:
    """A tensor of which a process may have a part, as all of it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def _off_gpu(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.cpu()


def _matrix(weight: Tensor) -> Tensor:
    """A weight as (m, n) fp32. What is that already, as a rule, costs no call of an operator."""
    return weight if weight.ndim == 2 and weight.dtype == torch.float32 else weight.flatten(1).float()


def _square_norms(weight: Tensor) -> Tensor:
    """Squared norms of the rows of `weight` (m, n), fp32."""
    return torch.cat([torch.linalg.vector_norm(rows.float(), dim=1).square() for rows in weight.split(_ROWS)])


def _plain_pair(tuner: LoraLayer, adapter: str) -> tuple[Any, Any] | None:
    """A and B where PEFT computes base(x) + s B(A(x)) with them and nothing else: no dropout, no DoRA, no bias."""
    pair: tuple[Any, Any] = (tuner.lora_A[adapter], tuner.lora_B[adapter])
    is_bare = isinstance(tuner.lora_dropout[adapter], nn.Identity) and adapter not in tuner.lora_variant
    if not is_bare or any(type(one) is not nn.Linear or "forward" in one.__dict__ for one in pair):
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
