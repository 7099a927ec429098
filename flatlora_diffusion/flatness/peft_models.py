"""`peft_flatness`: how flat the loss of any model with PEFT adapters is around W', as figures and charts.

Knows no image model: a loss and weights are all it takes. PEFT makes W' itself, in a copy of the model.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from flatlora_diffusion.charts.palette import LOOKS
from flatlora_diffusion.config import ConfigError, LandscapeConfig
from flatlora_diffusion.flatness.functional import Loss, Weights, loss_at, value
from flatlora_diffusion.flatness.landscape import Landscape, landscape
from flatlora_diffusion.flatness.loss_surface import axis
from flatlora_diffusion.flatness.plots import RESULT, check_result_folder, write_landscape
from flatlora_diffusion.method.layers import layer_name
from flatlora_diffusion.storage.atomic_io import check_writable, write_json
from flatlora_diffusion.storage.versions import versions

logger = logging.getLogger(__name__)

ModelLoss = Callable[[Any], Tensor] | Sequence[Mapping[str, Any]]
"""A function of a model, or batches with labels: the mean of `model(**batch).loss`."""

_SAME = 1e-3  # how close the loss at W' has to come to the model's own, which is rounded in another order


def peft_flatness(
    models: Mapping[str, nn.Module],
    loss: ModelLoss,
    folder: Path | str,
    config: LandscapeConfig | None = None,
    facts: Mapping[str, Any] | None = None,
) -> list[Landscape]:
    """The loss around the W' of each of `models` by name, in `folder` as charts and flatness.json, with `facts` in it.

    W' are the merged weights of all adapted layers, as the model computes with them now. All models share draws and
    directions, which are functions of `config.seed`; the first is drawn as LoRA, the second as Flat-LoRA. `loss` gets
    a model in eval mode and has to be the same each time: fixed examples, fixed noise. The models stay as they are,
    bit for bit. Raises ConfigError for what cannot be measured.
    """
    config, folder = config or LandscapeConfig(), Path(folder)
    check_writable(folder, "folder")
    check_result_folder(folder, "folder")
    weights = _check(models)
    parts = _parts(loss)
    figures = [_landscape(name, model, parts, config) for name, model in models.items()]
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "settings": dataclasses.asdict(config),
        "weights": weights,
        "axis": axis(config.extent, config.surface_points),
        "losses": {one.name: one.loss for one in figures},
        "versions": versions(),
        **(facts or {}),
        "figures": [dataclasses.asdict(one) for one in figures],
    }
    write_json(folder / RESULT, result)
    looks = [LOOKS[1 + place % (len(LOOKS) - 1)] for place in range(len(figures))]
    write_landscape(folder, config, figures, looks)
    return figures


def _check(models: Mapping[str, nn.Module]) -> int:
    """The number of weights that are moved, which all models must have in common."""
    if not models:
        raise ConfigError("no model was given; give at least one with its name")
    shapes = {name: _shapes(name, model) for name, model in models.items()}
    first, *others = shapes
    for name in others:
        if shapes[name] != shapes[first]:
            raise ConfigError(f"{name} adapts other layers than {first}; compare models with the same target_modules")
    return sum(shape.numel() for shape in shapes[first].values())


def _shapes(name: str, model: nn.Module) -> dict[str, torch.Size]:
    """The shape of each adapted weight by the name of its layer."""
    shapes = {}
    for path, layer in _adapted(model).items():
        base = layer.get_base_layer()
        if not isinstance(base, nn.Linear | nn.Conv2d):
            kind = type(base).__name__
            raise ConfigError(f"{name} has an adapted {kind}, {path}; only Linear and Conv2d can be measured")
        if base.weight.dtype not in (torch.float32, torch.float64):
            dtype = str(base.weight.dtype).removeprefix("torch.")
            raise ConfigError(
                f"{name} has the weights of {path} in {dtype}, which rounds small steps away; "
                "load the base whole and in fp32, or call model.float()"
            )
        shapes[layer_name(path)] = base.weight.shape
    if not shapes:
        raise ConfigError(f"{name} has no adapted layer; put an adapter of PEFT on the model first")
    return shapes


def _adapted(model: nn.Module) -> dict[str, Any]:
    """The adapted layers by module path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _parts(loss: ModelLoss) -> list[Callable[[Any], Tensor]]:
    if callable(loss):
        return [loss]
    if not loss:
        raise ConfigError("no batch was given; give at least one, or a function of the model")
    return [partial(_batch_loss, batch=batch, count=len(loss)) for batch in loss]


def _batch_loss(model: Any, batch: Mapping[str, Any], count: int) -> Tensor:
    loss: Tensor | None = model(**batch).loss
    if loss is None:
        raise ConfigError(
            f"the model gives no loss for a batch of {', '.join(batch)}; add labels, or give a function of the model"
        )
    return loss / count


def _landscape(
    name: str, model: nn.Module, parts: Sequence[Callable[[Any], Tensor]], config: LandscapeConfig
) -> Landscape:
    start = time.monotonic()
    twin = _twin(model)
    with torch.no_grad():
        own = sum(float(part(twin)) for part in parts)
    loss, weights = _merged(twin, parts)
    clean = value(loss, weights)
    if not math.isclose(own, clean, rel_tol=_SAME, abs_tol=_SAME**2):
        raise ConfigError(
            f"the loss of {name} is {own:.6g}, but {clean:.6g} at its merged weights W'; give a loss that is the same "
            "each time, and adapters that PEFT can merge"
        )
    found = landscape(name, loss, weights, config)
    logger.info("%s: measured in %.0f s", name, time.monotonic() - start)
    return found


def _twin(model: nn.Module) -> nn.Module:
    """A copy in eval mode, which has all tensors in common with `model` but for those of the adapted layers."""
    shared: dict[int, Any] = {id(one): one for one in chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, shared).eval()
    for layer in _adapted(twin).values():
        base = layer.get_base_layer()
        for name, one in list(base.named_parameters(recurse=False)):
            setattr(base, name, nn.Parameter(one.detach().clone(), requires_grad=False))
    return twin


def _merged(twin: nn.Module, parts: Sequence[Callable[[Any], Tensor]]) -> tuple[Loss, Weights]:
    """Merge its adapters into `twin`, which has none then; its loss as a function of W', and W'.

    They go by the layers' names, which are the same however PEFT is wrapped around, and so are the draws.
    """
    paths, weights = {}, {}
    for path, layer in _adapted(twin).items():
        if not (layer.merged or layer.disable_adapters):
            layer.merge()
        base = layer.get_base_layer()
        twin.set_submodule(path, base)
        name = f"{layer_name(path)}.weight"
        paths[name], weights[name] = f"{path}.weight", base.weight.detach()
    return [partial(_by_path, loss_at(twin, part), paths) for part in parts], weights


def _by_path(part: Callable[[Weights], Tensor], paths: Mapping[str, str], weights: Weights) -> Tensor:
    return part({paths[name]: weight for name, weight in weights.items()})
