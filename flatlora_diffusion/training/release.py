"""The files of a LoRA that people share: one for diffusers, one for every other tool, each read back and compared."""

from __future__ import annotations

import json
import logging
import shutil
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from flatlora_diffusion.adapter.update import (
    lora_updates,
    magnitudes,
    plain_updates,
    update_norms,
)
from flatlora_diffusion.config import RunError
from flatlora_diffusion.data.dataset import shared_words
from flatlora_diffusion.ground.atomic import write_atomically, write_text_atomically
from flatlora_diffusion.lora_files.diffusers_file import save_lora
from flatlora_diffusion.lora_files.kohya import completed, kohya_stream
from flatlora_diffusion.lora_files.metadata import Training, kohya_metadata, sidecar
from flatlora_diffusion.lora_files.writing import (
    check_finite,
    check_magnitudes,
    check_updates,
    diffusers_updates,
    kohya_updates,
    make_room,
    save_kohya,
)
from flatlora_diffusion.sdxl.base_family import family_of
from flatlora_diffusion.sdxl.device import DTYPES
from flatlora_diffusion.training.state import TrainState

logger = logging.getLogger(__name__)

KOHYA_COPY = "pytorch_lora_weights_kohya.safetensors"


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
    check_finite(trained)
    norms = update_norms(plain)
    if not any(norms.values()):
        _changes_nothing(state, is_end)
    layers = pipeline.unet.config.layers_per_block
    whole = completed(plain, pipeline.unet)
    metadata = kohya_metadata(state.run, state.config, training(state, step), datetime.now(timezone.utc))
    path = folder / f"{state.run.lora_name(run.output_name)}.safetensors"
    make_room(path)
    save_kohya(path, partial(kohya_stream, whole, layers, dtype), metadata)
    if run.output_kohya_format:
        write_atomically(folder / KOHYA_COPY, lambda aside: shutil.copyfile(path, aside))
    for_diffusers = save_lora(pipeline, folder, dtype)
    error = max(
        check_updates(path, kohya_updates(load_file(path), whole, layers), whole, dtype),
        check_updates(for_diffusers, diffusers_updates(load_file(for_diffusers), trained), trained, dtype),
    )
    check_magnitudes(for_diffusers, magnitudes(pipeline))
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


def accompany(state: TrainState, preview: Path | None, notes: tuple[str, ...] = ()) -> None:
    """Write NAME.json and NAME.png, which web UIs show with the file of that name, into the run folder."""
    path = state.run.folder / f"{state.run.lora_name(state.config.run.output_name)}.json"
    text = json.dumps(sidecar(state.config, training(state, state.total_steps), notes), indent=2, ensure_ascii=False)
    write_text_atomically(path, text)
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


def _changes_nothing(state: TrainState, is_end: bool) -> None:
    what = "the LoRA changes nothing: no step has moved it"
    if is_end and state.config.optim.learning_rate:
        raise RunError(f"{what}; look at --learning_rate and --lr_warmup_steps, then resume with more steps")
    logger.warning("%s", what)
