"""`peft_flatness`: the flatness of the loss of any model with PEFT adapters around W'.

PEFT computes W' in a copy of the model. Knows no image model.
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
from flatlora_diffusion.flatness.landscape import Landscape, axis, landscape
from flatlora_diffusion.flatness.plots import RESULT, check_result_folder, write_landscape
from flatlora_diffusion.method.layers import layer_name
from flatlora_diffusion.storage.atomic_io import check_writable, write_json
from flatlora_diffusion.storage.versions import versions

logger = logging.getLogger(__name__)

ModelLoss = Callable[[Any], Tensor] | Sequence[Mapping[str, Any]]
"""A function of a model, or batches with labels: the mean of `model(**batch).loss`."""

_SAME = 1e-3  # tolerance between the loss at W' and the model's loss, which differ by rounding


def peft_flatness(
    models: Mapping[str, nn.Module],
    loss: ModelLoss,
    folder: Path | str,
    config: LandscapeConfig | None = None,
    facts: Mapping[str, Any] | None = None,
) -> list[Landscape]:
    """Measure the loss around the merged weights W' of each model, and write charts and flatness.json.

    All models share the random draws and directions, which are functions of `config.seed`. The models are not changed.

    Args:
        models: models with PEFT adapters by name; charts show the first as LoRA and the second as Flat-LoRA.
        loss: a deterministic function of a model in eval mode, or batches with labels.
        folder: the output folder.
        config: settings; the defaults if None.
        facts: additional entries of flatness.json.

    Returns:
        The landscape of each model.

    Raises:
        ConfigError: a model, the loss or the folder is not supported.
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
        "losses": {model.name: model.loss for model in figures},
        "versions": versions(),
        **(facts or {}),
        "figures": [dataclasses.asdict(model) for model in figures],
    }
    write_json(folder / RESULT, result)
    looks = [LOOKS[1 + index % (len(LOOKS) - 1)] for index in range(len(figures))]
    write_landscape(folder, config, figures, looks)
    return figures


def _check(models: Mapping[str, nn.Module]) -> int:
    """Return the number of adapted weights, which must be the same for all models."""
    if not models:
        raise ConfigError("no model was given; give at least one with its name")
    shapes = {name: _shapes(name, model) for name, model in models.items()}
    first, *others = shapes
    for name in others:
        if shapes[name] != shapes[first]:
            raise ConfigError(f"{name} adapts other layers than {first}; compare models with the same target_modules")
    return sum(shape.numel() for shape in shapes[first].values())


def _shapes(name: str, model: nn.Module) -> dict[str, torch.Size]:
    shapes = {}
    for path, layer in _adapted(model).items():
        base = layer.get_base_layer()
        if not isinstance(base, nn.Linear | nn.Conv2d):
            kind = type(base).__name__
            raise ConfigError(f"{name} adapts {path}, which is a {kind}; only Linear and Conv2d are supported")
        if base.weight.dtype not in (torch.float32, torch.float64):
            dtype = str(base.weight.dtype).removeprefix("torch.")
            raise ConfigError(
                f"{name} has the weights of {path} in {dtype}, which cannot represent small steps; "
                "load the base in fp32 without quantization, or call model.float()"
            )
        shapes[layer_name(path)] = base.weight.shape
    if not shapes:
        raise ConfigError(f"{name} has no adapted layer; add a PEFT adapter to the model first")
    return shapes


def _adapted(model: nn.Module) -> dict[str, Any]:
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
    copied = _copy_with_own_base(model)
    with torch.no_grad():
        model_loss = sum(float(part(copied)) for part in parts)
    loss, weights = _merged(copied, parts)
    clean = value(loss, weights)
    if not math.isclose(model_loss, clean, rel_tol=_SAME, abs_tol=_SAME**2):
        raise ConfigError(
            f"the loss of {name} is {model_loss:.6g}, but {clean:.6g} at its merged weights W'; give a deterministic "
            "loss, and adapters that PEFT can merge"
        )
    result = landscape(name, loss, weights, config)
    logger.info("%s: measured in %.0f s", name, time.monotonic() - start)
    return result


def _copy_with_own_base(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode that shares all tensors with `model` except those of the adapted base layers."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    copied = copy.deepcopy(model, shared).eval()
    for layer in _adapted(copied).values():
        base = layer.get_base_layer()
        for name, weight in list(base.named_parameters(recurse=False)):
            setattr(base, name, nn.Parameter(weight.detach().clone(), requires_grad=False))
    return copied


def _merged(model: nn.Module, parts: Sequence[Callable[[Any], Tensor]]) -> tuple[Loss, Weights]:
    """Merge the adapters of `model` and remove them; returns its loss as a function of W', and W'.

    Weights have the layers' names, which do not depend on PEFT's wrappers, so that the random draws do not either.
    """
    paths, weights = {}, {}
    for path, layer in _adapted(model).items():
        if not (layer.merged or layer.disable_adapters):
            layer.merge()
        base = layer.get_base_layer()
        model.set_submodule(path, base)
        name = f"{layer_name(path)}.weight"
        paths[name], weights[name] = f"{path}.weight", base.weight.detach()
    return [partial(_by_path, loss_at(model, part), paths) for part in parts], weights


def _by_path(part: Callable[[Weights], Tensor], paths: Mapping[str, str], weights: Weights) -> Tensor:
    return part({paths[name]: weight for name, weight in weights.items()})
