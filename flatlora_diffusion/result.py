"""The end of a run: the files it leaves, the proof that they hold what was trained, and where they go."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from flatlora_diffusion.adapter import ADAPTER, lora_layers
from flatlora_diffusion.config import RunError
from flatlora_diffusion.hub import push_to_hub
from flatlora_diffusion.kohya import save_kohya
from flatlora_diffusion.lora_file import LORA_FILE, PARTS, expected_tensors, save_lora
from flatlora_diffusion.model_card import write_model_card
from flatlora_diffusion.pictures import read_pictures
from flatlora_diffusion.run_dir import RunDir
from flatlora_diffusion.tokens import save_embeddings
from flatlora_diffusion.train_state import TrainState

logger = logging.getLogger(__name__)


def finish(state: TrainState) -> Path:
    """Save the LoRA, prove it, write the model card, and upload if asked; returns the path of the LoRA file.

    Raises RunError when the file does not hold what was trained, or the upload fails.
    """
    path = state.run.folder / LORA_FILE
    if state.accelerator.is_main_process:
        with averaged(state):
            save_lora(state.sdxl.pipeline, state.run.folder)
            save_embeddings(state.sdxl.pipeline, state.run.folder)
            if state.config.run.output_kohya_format:
                save_kohya(state.sdxl.pipeline, state.run.folder)
            proof = _proof(state, path)
        state.run.add_event({"event": "proof", **proof})
        logger.info("%s", proof_line(proof))
        write_model_card(state.run, state.config, _pictures(state), _trigger(state))
        state.run.add_event({"event": "finished", "step": state.total_steps})
        if state.config.run.push_to_hub:
            logger.info("uploaded to %s", push_to_hub(state.run, state.config))
    state.accelerator.wait_for_everyone()
    return path


@contextmanager
def averaged(state: TrainState) -> Iterator[None]:
    """The exponential moving average in place of the trained weights while this is open; nothing without --use_ema."""
    if state.ema is None:
        yield
        return
    state.ema.store(state.trainable.values())
    state.ema.copy_to(state.trainable.values())
    try:
        yield
    finally:
        state.ema.restore(state.trainable.values())


def update_norms(pipeline: Any) -> dict[str, float]:
    """||sBA||_F over all layers of each part that has a LoRA."""
    norms = {}
    for part in PARTS:
        squares = [_square_norm(layer) for layer in lora_layers(getattr(pipeline, part)).values()]
        if squares:
            norms[part] = sum(squares) ** 0.5
    return norms


def proof_line(proof: dict[str, Any]) -> str:
    """The proof in one sentence for the log."""
    norms = ", ".join(f"{part} {norm:.3g}" for part, norm in proof["update_norms"].items())
    line = f"the saved LoRA equals the trained one; size of its update: {norms}"
    change = proof["image_change"]
    return line if change is None else f"{line}; previews differ from the base's by {change:.1f} of 255 levels"


def _proof(state: TrainState, path: Path) -> dict[str, Any]:
    """Size of the update by part, difference of the previews to the base's; checks the file against the memory."""
    saved = load_file(path)
    expected = expected_tensors(state.sdxl.pipeline)
    if saved.keys() != expected.keys() or any(not torch.equal(saved[key], expected[key]) for key in saved):
        raise RunError(f"{path.name} does not hold what was trained: the disk or the file system is at fault")
    norms = update_norms(state.sdxl.pipeline)
    if not any(norms.values()):
        logger.warning("the LoRA changes nothing: no step has moved it; look at the learning rate")
    return {"update_norms": norms, "image_change": _image_change(state.run, state.total_steps)}


def _pictures(state: TrainState) -> list[tuple[Path, str]]:
    """(file, prompt) of each of the last previews."""
    wanted = enumerate(read_pictures(state.config.run))
    return [(state.run.images / f"step-{state.total_steps}-{index}.png", item.prompt) for index, item in wanted]


def _image_change(run: RunDir, step: int) -> float | None:
    """Mean absolute difference of the last previews to the base's, in levels of 255; None without previews."""
    changes = []
    for base in sorted(run.images.glob("base-*.png")):
        last = run.images / base.name.replace("base", f"step-{step}")
        if last.is_file():
            one, two = (np.asarray(Image.open(file), dtype=np.float32) for file in (base, last))
            changes.append(float(np.abs(one - two).mean()))
    return sum(changes) / len(changes) if changes else None


def _square_norm(layer: Any) -> float:
    """||sBA||_F^2 = s^2 tr((B^T B)(A A^T)) without forming BA."""
    down = layer.lora_A[ADAPTER].weight.detach().double().flatten(1)
    up = layer.lora_B[ADAPTER].weight.detach().double().flatten(1)
    return float(((up.T @ up) * (down @ down.T)).sum()) * layer.scaling[ADAPTER] ** 2


def _trigger(state: TrainState) -> str:
    return ", ".join("".join(names) for names in state.tokens.values()) or (state.config.data.instance_prompt or "")
