"""The files of a LoRA that people share: one for diffusers, one for every other tool, each read back and compared."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from flatlora_diffusion.base_family import family_of
from flatlora_diffusion.config import RunError
from flatlora_diffusion.kohya import completed, kohya_name, kohya_stream
from flatlora_diffusion.lora_file import save_lora
from flatlora_diffusion.lora_metadata import LEGACY_END, Training, kohya_metadata, sidecar, with_contents
from flatlora_diffusion.lora_update import (
    Update,
    Updates,
    difference,
    lora_updates,
    magnitudes,
    norm,
    plain_updates,
    update_norms,
)
from flatlora_diffusion.tensor_file import contents_of, save_stream, write_atomically
from flatlora_diffusion.train_state import TrainState

logger = logging.getLogger(__name__)

KOHYA_COPY = "pytorch_lora_weights_kohya.safetensors"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_OURS = "flatlora-diffusion"


def save_release(state: TrainState, folder: Path, step: int, is_end: bool = False) -> dict[str, Any]:
    """Write both files into `folder`, read them back, and return the proof: sizes and the largest relative error.

    Raises RunError when a file does not hold what was trained, within the rounding of its precision; for a LoRA that
    is not finite; and at the end of a run for one that changes nothing, unless the learning rate is 0. A checkpoint
    may be one: a warm-up can begin with steps of 0, and stopping there would lose the run.
    """
    run, pipeline = state.config.run, state.sdxl.pipeline
    dtype = DTYPES[run.save_dtype]
    trained = lora_updates(pipeline)
    plain, missed = plain_updates(pipeline)
    _check_finite(trained)
    norms = update_norms(plain)
    if not any(norms.values()):
        _changes_nothing(state, is_end)
    layers = pipeline.unet.config.layers_per_block
    whole = completed(plain, pipeline.unet)
    metadata = kohya_metadata(state.run, state.config, training(state, step), datetime.now(timezone.utc))
    path = folder / f"{state.run.lora_name(run.output_name)}.safetensors"
    _make_room(path)
    save_kohya(path, partial(kohya_stream, whole, layers, dtype), metadata)
    if run.output_kohya_format:
        write_atomically(folder / KOHYA_COPY, lambda aside: shutil.copyfile(path, aside))
    for_diffusers = save_lora(pipeline, folder, dtype)
    error = max(
        check_updates(path, kohya_updates(load_file(path), whole, layers), whole, dtype),
        check_updates(for_diffusers, _diffusers_updates(load_file(for_diffusers), trained), trained, dtype),
    )
    _check_magnitudes(for_diffusers, magnitudes(pipeline))
    proof = {"update_norms": norms, "files": [path.name, for_diffusers.name], "largest_error": error}
    if missed:
        logger.warning(
            "DoRA is kept exactly in %s only; %s is a plain LoRA that misses %.1f %% of its effect",
            for_diffusers.name,
            path.name,
            100 * missed,
        )
        proof["missed_by_plain_lora"] = missed
    return proof


def save_kohya(path: Path, tensors: Callable[[], Iterable[tuple[str, Tensor]]], metadata: Mapping[str, str]) -> None:
    """Write the tensors of a kohya file one by one; rank, alpha and hashes are added to the metadata."""
    contents = contents_of(tensors(), LEGACY_END)
    save_stream(path, tensors, contents, with_contents(metadata, contents))


def accompany(state: TrainState, preview: Path | None, notes: tuple[str, ...] = ()) -> None:
    """Write NAME.json and NAME.png, which web UIs show with the file of that name, into the run folder."""
    path = state.run.folder / f"{state.run.lora_name(state.config.run.output_name)}.json"
    text = json.dumps(sidecar(state.config, training(state, state.total_steps), notes), indent=2, ensure_ascii=False)
    write_atomically(path, lambda aside: aside.write_text(text + "\n", encoding="utf-8"))
    if preview is not None:
        write_atomically(path.with_suffix(".png"), lambda aside: shutil.copyfile(preview, aside))


def training(state: TrainState, step: int) -> Training:
    """What metadata and sidecar say of the run after `step` steps."""
    return Training(
        family=family_of(state.sdxl.pipeline.unet),
        step=step,
        epoch=state.feed.epoch_after(step - 1),
        images=len(state.feed.samples),
        class_images=len(state.feed.class_samples),
        trigger=trigger_words(state),
        predicts_v=state.sdxl.scheduler.config.prediction_type == "v_prediction",
    )


def trigger_words(state: TrainState) -> str:
    """What calls the LoRA: the new tokens of pivotal tuning, or the prompt of all images, or what captions share."""
    tokens = ", ".join("".join(names) for names in state.tokens.values())
    return tokens or state.config.data.instance_prompt or shared_words([found.caption for found in state.feed.samples])


def shared_words(captions: Sequence[str]) -> str:
    """The words that all captions begin and end with, such as `a TOK icon of, in the style of TOK`.

    Empty for fewer than two captions; an article at the end of the first part is left out.
    """
    words = [caption.split() for caption in captions]
    if len(words) < 2:
        return ""
    first = _shared_start(words)
    last = _shared_start([row[len(first) :][::-1] for row in words])[::-1]
    while first and first[-1].lower() in ("a", "an", "the"):
        first.pop()
    parts = [" ".join(part).strip(" ,.;") for part in (first, last)]
    return ", ".join(part for part in parts if part)


def _shared_start(rows: Sequence[list[str]]) -> list[str]:
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))]


def kohya_updates(tensors: Mapping[str, Tensor], expected: Updates, layers_per_block: int) -> Updates:
    """What a kohya file adds to the layers of `expected`. Raises KeyError for a layer that is not in it."""
    found: dict[str, dict[str, Update]] = {}
    for part, layers in expected.items():
        for module in layers:
            name = kohya_name(part, module, layers_per_block)
            down, up = (tensors[f"{name}.lora_{side}.weight"].float() for side in ("down", "up"))
            found.setdefault(part, {})[module] = Update(down, up, float(tensors[f"{name}.alpha"]) / len(down))
    return found


def check_updates(path: Path, found: Updates, expected: Updates, dtype: torch.dtype) -> float:
    """The largest relative error of a layer's update in a file, ||found - expected|| / ||expected||.

    Raises RunError for an error that rounding to `dtype` does not explain.
    """
    largest = 0.0
    for part, layers in expected.items():
        for module, update in layers.items():
            saved = found[part][module]
            error, size = difference(saved, update), norm(update)
            if not error <= _rounding(saved, dtype):
                raise RunError(
                    f"{path.name} does not hold what was to be saved: {part}.{module} is off by {error:.3g} of "
                    f"{size:.3g}; if the disk is sound, save it as bf16 or fp32"
                )
            largest = max(largest, error / size if size else 0.0)
    return largest


def _rounding(saved: Update, dtype: torch.dtype) -> float:
    """The most by which rounding both factors, each entry to the nearest of its `dtype`, can change their product."""
    unit = torch.finfo(dtype).eps / 2
    down, up = float(saved.down.double().norm()), float(saved.up.double().norm())
    # An entry below the normal range is off by half of the smallest step there is.
    least = torch.finfo(dtype).smallest_normal * unit
    below = least * (math.sqrt(saved.down.numel()) * up + math.sqrt(saved.up.numel()) * down)
    # Double-precision traces tell two products apart to about 1e-8 of their factors' size.
    return ((2.1 * unit + 1e-7) * down * up + 1.1 * below) * saved.scale


def _diffusers_updates(tensors: Mapping[str, Tensor], expected: Updates) -> Updates:
    return {
        part: {
            module: Update(
                tensors[f"{part}.{module}.lora_A.weight"].float(), tensors[f"{part}.{module}.lora_B.weight"].float(), 1
            )
            for module in layers
        }
        for part, layers in expected.items()
    }


def _check_finite(updates: Updates) -> None:
    for part, layers in updates.items():
        for module, update in layers.items():
            if not all(bool(factor.isfinite().all()) for factor in (update.down, update.up)):
                raise RunError(
                    f"the LoRA is not finite at {part}.{module}: go on from an earlier checkpoint with a lower "
                    "--learning_rate"
                )


def _changes_nothing(state: TrainState, is_end: bool) -> None:
    what = "the LoRA changes nothing: no step has moved it"
    if is_end and state.config.optim.learning_rate:
        raise RunError(f"{what}; look at --learning_rate and --lr_warmup_steps, then resume with more steps")
    logger.warning("%s", what)


def _check_magnitudes(path: Path, expected: Mapping[str, Mapping[str, Tensor]]) -> None:
    saved = load_file(path)
    for part, layers in expected.items():
        for module, value in layers.items():
            if not torch.equal(saved[f"{part}.{module}.lora_magnitude_vector"], value):
                raise RunError(f"{path.name} does not hold the magnitudes of {part}.{module}: the disk is at fault")


def _make_room(path: Path) -> None:
    """Give files of the names to be written another name unless this program wrote them."""
    if _is_ours(path):
        return
    for taken in (path, path.with_suffix(".json"), path.with_suffix(".png")):
        if taken.exists():
            number = 1
            while (other := taken.with_name(f"{taken.stem}-earlier-{number}{taken.suffix}")).exists():
                number += 1
            os.rename(taken, other)
            logger.warning("%s was there already and is now %s", taken.name, other.name)


def _is_ours(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return str((file.metadata() or {}).get("ss_training_comment", "")).startswith(_OURS)
    except (OSError, SafetensorError):
        return False
