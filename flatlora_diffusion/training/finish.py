"""The end of a run: save and verify the result, then previews, model card and upload."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from flatlora_diffusion.storage.atomic_io import atomic_write, write_text
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir
from flatlora_diffusion.training.export_lora import save_lora, training_facts
from flatlora_diffusion.training.hub import push_to_hub
from flatlora_diffusion.training.model_card import write_model_card
from flatlora_diffusion.training.preview_prompts import Picture, read_pictures
from flatlora_diffusion.training.previews import Previews, drawing_of
from flatlora_diffusion.training.state import TrainState, ema_weights

logger = logging.getLogger(__name__)


def save_result(state: TrainState) -> Path:
    """Save the LoRA with its sidecar, verify the files, finish the run and return the LoRA file for diffusers.

    Raises RunError if a file differs from the trained LoRA, or the LoRA is zero.
    """
    if state.accelerator.is_main_process:
        run = state.run
        with ema_weights(state):
            proof = save_lora(state, run.folder, state.end, is_end=True)
        run.add_event({"event": "proof", **proof})
        run.add_event({"event": "finished", "step": state.end})
        logger.info(
            "%s equal the trained LoRA, largest error %.1e of a layer's update; norms of the update: %s",
            " and ".join(proof["files"]),
            proof["largest_error"],
            ", ".join(f"{part} {norm:.3g}" for part, norm in proof["update_norms"].items()),
        )
    state.accelerator.wait_for_everyone()
    return state.run.folder / LORA_FILE


def present(state: TrainState, previews: Previews) -> None:
    """Make the last previews, the model card and the upload of a finished run.

    Failures of previews and card are warnings. Raises RunError if the upload fails.
    """
    try:
        with ema_weights(state):
            previews.make(f"step-{state.end}", state.end)
    except Exception as error:
        logger.warning("the LoRA is saved, but its last previews could not be made: %s", error)
    try:
        _write_card(state)
    except Exception as error:
        logger.warning("the LoRA is saved, but its model card could not be written: %s", error)
    else:
        if state.config.run.push_to_hub:
            logger.info("uploaded to %s", push_to_hub(state.run, state.config))


def _write_card(state: TrainState) -> None:
    run, config, change = state.run, state.config, _image_change(state.run, state.end)
    requested = read_pictures(config.run)
    pictures = _last_previews(run, requested, state.end)
    if change is not None:
        run.add_event({"event": "image_change", "levels": change})
        logger.info("the previews differ from the base's by %.1f of 255 levels", change)
    facts = training_facts(state, state.end)
    if facts.predicts_v:  # other tools may not find this out from the base
        config = config.replace(prediction_type="v_prediction", zero_terminal_snr=facts.zero_terminal_snr)
    write_model_card(run, config, pictures, facts)
    if pictures:  # web UIs show the picture with the LoRA file of the same name
        name = run.lora_name(config.run.output_name)
        with atomic_write(run.folder / f"{name}.png") as temporary:
            shutil.copyfile(pictures[0][0], temporary)
        # Workflow files that reproduce the first preview in ComfyUI and A1111.
        drawing = drawing_of(state, requested[0], state.end)
        for ending, text in ({} if drawing is None else drawing.files()).items():
            write_text(run.folder / f"{name}{ending}", text)


def _last_previews(run: RunDir, requested: Sequence[Picture], step: int) -> list[tuple[Path, str]]:
    """(file, prompt) of each of the last previews that exists."""
    files = [(run.images / f"step-{step}-{index}.png", item.prompt) for index, item in enumerate(requested)]
    return [(file, prompt) for file, prompt in files if file.is_file()]


def _image_change(run: RunDir, step: int) -> float | None:
    """Mean absolute difference of the last previews from the base's, in levels of 255; None without previews."""
    changes = []
    for base in sorted(run.images.glob("base-*.png")):
        last = run.images / base.name.replace("base", f"step-{step}")
        if last.is_file():
            before, after = (np.asarray(Image.open(file), dtype=np.float32) for file in (base, last))
            changes.append(float(np.abs(before - after).mean()))
    return sum(changes) / len(changes) if changes else None
