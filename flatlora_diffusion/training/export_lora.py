"""The files of a LoRA that people share: one for diffusers, one for every other tool, each read back and compared.

With them, where there are any, the embeddings of new tokens, and at the end of a run the sidecar that web UIs show and
the merged pipeline of full fine-tuning.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flatlora_diffusion.adapter.delta import lora_updates, magnitudes, plain_updates, update_norms
from flatlora_diffusion.adapter.setup import save_beside
from flatlora_diffusion.config import RunError
from flatlora_diffusion.data.dataset import shared_words
from flatlora_diffusion.lora_files.export_pair import FilePair, verify_pair, write_pair
from flatlora_diffusion.lora_files.kohya import with_required_layers
from flatlora_diffusion.lora_files.metadata import TrainingSummary, conversion_note, kohya_metadata, sidecar
from flatlora_diffusion.lora_files.writing import check_finite
from flatlora_diffusion.sdxl.device import DTYPES
from flatlora_diffusion.storage.run_dir import EMBEDDINGS_FILE, KOHYA_COPY, MERGED
from flatlora_diffusion.training.state import TrainState

logger = logging.getLogger(__name__)


def save_lora(state: TrainState, folder: Path, step: int, is_end: bool = False) -> dict[str, Any]:
    """Plan the files, write them into `folder`, read them back, and return the proof: sizes and the largest error.

    Raises RunError when a file does not hold what was trained, within the rounding of its precision; for a LoRA that
    is not finite; and at the end of a run for one that changes nothing, unless the learning rate is 0. A checkpoint
    may be one: a warm-up can begin with steps of 0, and stopping there would lose the run.
    """
    run, pipeline = state.config.run, state.sdxl.pipeline
    trained, kept = lora_updates(pipeline), magnitudes(pipeline)
    plain, missed = plain_updates(pipeline, trained)
    norms = update_norms(plain)
    check_finite(trained)
    if not any(norms.values()):
        what = "the LoRA changes nothing: no step has moved it"
        if is_end and state.config.optim.learning_rate:
            raise RunError(f"{what}; look at --learning_rate and --lr_warmup_steps, then resume with more steps")
        logger.warning("%s", what)
    facts = replace(facts_of(state, step), conversion_note=conversion_note(state.config.adapter, missed))
    notes = (f"It needs the embeddings in {EMBEDDINGS_FILE}.",) if state.tokens else ()
    beside = sidecar(state.config, facts, notes) if is_end else None
    is_full = state.config.adapter.adapter == "full"
    merged = folder / MERGED if is_end and is_full else None
    metadata = kohya_metadata(state.run, state.config, facts, datetime.now(UTC))
    with state.run.writing():
        save_beside(pipeline, folder, merged)  # before the LoRA, which may need it
        pair = FilePair(
            kohya=folder / f"{state.run.lora_name(run.output_name)}.safetensors",
            copy=folder / KOHYA_COPY if run.output_kohya_format else None,
            sidecar=beside,
            metadata=metadata,
            plain=with_required_layers(plain, pipeline.unet),
            trained=trained,
            magnitudes=kept,
            layers_per_block=pipeline.unet.config.layers_per_block,
            dtype=DTYPES[run.save_dtype],
        )
        write_pair(pair, pipeline)
        files = [pair.kohya.name, pair.diffusers.name]
        proof = {"update_norms": norms, "files": files, "largest_error": verify_pair(pair)}
    if missed and not (is_full and merged is None):  # a checkpoint has all of it in its state
        what, kept_in = ("full fine-tuning", MERGED) if is_full else ("DoRA", pair.diffusers.name)
        logger.warning(
            "%s is kept exactly in %s only; %s is a plain LoRA that misses %.1f %% of its effect",
            what,
            kept_in,
            pair.kohya.name,
            100 * missed,
        )
        proof["missed_by_plain_lora"] = missed
    return proof


def facts_of(state: TrainState, step: int) -> TrainingSummary:
    """What metadata, sidecar and card say of the run after `step` steps.

    What calls the LoRA are the new tokens of pivotal tuning, or the prompt of all images, or what captions share.
    """
    noise, batches = state.sdxl.scheduler.config, state.batches
    tokens = ", ".join("".join(names) for names in state.tokens.values())
    prompt = state.config.data.instance_prompt
    return TrainingSummary(
        base=state.base,
        family=state.sdxl.family,
        trigger=tokens or prompt or shared_words([sample.caption for sample in batches.samples]),
        step=step,
        epoch=batches.epoch_after(step - 1),
        images=len(batches.samples),
        class_images=len(batches.class_samples),
        predicts_v=noise.prediction_type == "v_prediction",
        zero_terminal_snr=bool(noise.get("rescale_betas_zero_snr")),
        average=state.progress.average,
    )
