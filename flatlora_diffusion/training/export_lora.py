"""Write the LoRA files to share, for diffusers and for other tools, and verify them by reading them back.

With new tokens their embeddings are written too; at the end of a run also the sidecar for web UIs and the merged
pipeline of full fine-tuning.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flatlora_diffusion.adapter.delta import lora_updates, magnitudes, plain_updates, update_norms
from flatlora_diffusion.adapter.full import save_merged
from flatlora_diffusion.adapter.new_tokens import save_embeddings
from flatlora_diffusion.config import RunError
from flatlora_diffusion.data.dataset import shared_words
from flatlora_diffusion.families.device import DTYPES
from flatlora_diffusion.lora_files.export_pair import FilePair, verify_pair, write_pair
from flatlora_diffusion.lora_files.kohya import with_required_layers
from flatlora_diffusion.lora_files.metadata import TrainingSummary, conversion_note, kohya_metadata, sidecar
from flatlora_diffusion.lora_files.writing import check_finite
from flatlora_diffusion.storage.run_dir import EMBEDDINGS_FILE, KOHYA_COPY, MERGED
from flatlora_diffusion.training.state import TrainState

logger = logging.getLogger(__name__)


def save_lora(state: TrainState, folder: Path, step: int, is_end: bool = False) -> dict[str, Any]:
    """Write the LoRA files after `step` steps into the folder of the run (`is_end`) or a checkpoint, and verify them.

    Returns:
        The proof for events.jsonl: files, norms of the update, largest error.

    Raises:
        RunError: a file differs from the trained LoRA by more than the rounding of its precision, the LoRA is not
            finite, or the result is zero although the learning rate is not. A checkpoint may be zero: the first steps
            of a warm-up can be.
    """
    run, pipeline = state.config.run, state.base.pipeline
    trained, dora_magnitudes = lora_updates(pipeline), magnitudes(pipeline)
    plain, missed = plain_updates(pipeline, trained)
    norms = update_norms(plain)
    check_finite(trained)
    if not any(norms.values()):
        message = "the LoRA is zero: no step has changed it"
        if is_end and state.config.optim.learning_rate:
            raise RunError(f"{message}; {_remedy_of_zero(state)}, then resume with more steps")
        logger.warning("%s", message)
    facts = replace(training_facts(state, step), conversion_note=conversion_note(state.config.adapter, missed))
    notes = (f"It needs the embeddings in {EMBEDDINGS_FILE}.",) if state.tokens else ()
    side = sidecar(state.config, facts, notes) if is_end else None
    is_full = state.config.adapter.adapter == "full"
    merged = folder / MERGED if is_end and is_full else None
    metadata = kohya_metadata(state.run, state.config, facts, datetime.now(UTC))
    with state.run.writing():
        if merged is not None:
            save_merged(pipeline, merged)
        save_embeddings(pipeline, folder)  # before the LoRA, which may need them
        pair = FilePair(
            kohya=folder / f"{state.run.lora_name(run.output_name)}.safetensors",
            copy=folder / KOHYA_COPY if run.output_kohya_format else None,
            sidecar=side,
            metadata=metadata,
            plain=with_required_layers(plain, state.base.denoiser),
            trained=trained,
            magnitudes=dora_magnitudes,
            layers_per_block=state.base.denoiser.config.get("layers_per_block"),
            dtype=DTYPES[run.save_dtype],
        )
        write_pair(pair, pipeline)
        files = [pair.kohya.name, pair.diffusers.name]
        proof = {"update_norms": norms, "files": files, "largest_error": verify_pair(pair)}
    if missed and not (is_full and merged is None):  # a checkpoint's state file is exact
        title, exact_file = ("full fine-tuning", MERGED) if is_full else ("DoRA", pair.diffusers.name)
        logger.warning(
            "only %s has the exact %s; %s is a plain LoRA that misses %.1f %% of its effect",
            exact_file,
            title,
            pair.kohya.name,
            100 * missed,
        )
        proof["missed_by_plain_lora"] = missed
    return proof


def training_facts(state: TrainState, step: int) -> TrainingSummary:
    """The facts of the run after `step` steps, for metadata, sidecar and card.

    The trigger is the new tokens, the instance prompt, or the words that all captions share.
    """
    base, batches = state.base, state.batches
    tokens = ", ".join("".join(names) for names in state.tokens.values())
    prompt = state.config.data.instance_prompt
    return TrainingSummary(
        base=state.base_name,
        labels=base.labels,
        trigger=tokens or prompt or shared_words([sample.caption for sample in batches.samples]),
        step=step,
        epoch=batches.epoch_after(step - 1),
        images=len(batches.samples),
        class_images=len(batches.class_samples),
        predicts_v=base.predicts_v,
        zero_terminal_snr=base.has_zero_terminal_snr,
        average=state.progress.average,
    )


def _remedy_of_zero(state: TrainState) -> str:
    """What to do if no step has changed the LoRA."""
    skipped, scale = state.progress.skipped_steps, state.progress.loss_scale
    if skipped:
        return f"the gradients of the last {skipped} steps overflow in fp16, down to a loss scale of {scale:g}"
    return "check --learning_rate and --lr_warmup_steps"
