"""Context managers that load LoRA files into a pipeline, at any strength, unmerged or merged into the weights.

On exit the pipeline is restored bit for bit.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from flatlora_diffusion.adapter.layers import lora_layers, parts_of
from flatlora_diffusion.adapter.new_tokens import FILE_KEYS
from flatlora_diffusion.config import TEXT_PARTS, ConfigError
from flatlora_diffusion.lora_files.diffusers_file import magnitude_tensors, peft_tensors
from flatlora_diffusion.lora_files.names import BaseNames, pipeline_names
from flatlora_diffusion.lora_files.paths import LoraFile
from flatlora_diffusion.lora_files.reading import load_for_base
from flatlora_diffusion.lora_files.safe_reading import CheckedFile, read_header
from flatlora_diffusion.storage.formatting import first_line
from flatlora_diffusion.storage.run_dir import EMBEDDINGS_FILE, LORA_FILE

logger = logging.getLogger(__name__)

# Key in the embeddings file, text encoder and tokenizer.
_EMBEDDINGS = tuple((FILE_KEYS[part], part, part.replace("text_encoder", "tokenizer")) for part in TEXT_PARTS)


@contextmanager
def loras_loaded(pipeline: Any, files: Sequence[LoraFile]) -> Iterator[None]:
    """Load `files` into the pipeline, with the embeddings of new tokens that lie beside them.

    Raises:
        ConfigError: A file cannot be read or adapts no layer of this base.
    """
    with ExitStack() as undo:
        undo.callback(pipeline.unload_lora_weights)
        names = pipeline_names(pipeline)
        for index, file in enumerate(files):
            _load(pipeline, read_header(file.path), names, _adapter(index))
        for path in dict.fromkeys(_embedding_file(file.path) for file in files):
            if path is not None:
                undo.enter_context(_embeddings_loaded(pipeline, path))
        for part in parts_of(pipeline):  # new layers start in training mode, and a file may configure dropout
            getattr(pipeline, part).eval()
        yield


@contextmanager
def lora_scale(pipeline: Any, files: Sequence[LoraFile], strength: float, merge: bool) -> Iterator[None]:
    """Apply loaded LoRAs at `strength` times their weights, in UNet and text encoders; 0 is exactly the base.

    Args:
        files: The files that `loras_loaded` has loaded.
        merge: Add the LoRAs to the base's weights instead of computing them beside.
    """
    if strength == 0:
        pipeline.disable_lora()
        try:
            yield
        finally:
            pipeline.enable_lora()
        return
    adapters = [_adapter(index) for index in range(len(files))]
    pipeline.set_adapters(adapters, [file.weight * strength for file in files])
    if not merge:
        yield
        return
    models = [getattr(pipeline, part) for part in parts_of(pipeline)]
    weights = [layer.get_base_layer().weight for model in models for layer in lora_layers(model).values()]
    originals = [weight.detach().clone() for weight in weights]
    try:
        pipeline.fuse_lora(adapter_names=adapters)
        yield
    finally:
        pipeline.unfuse_lora()
        for weight, original in zip(weights, originals, strict=True):  # subtracting has left rounding errors
            weight.data.copy_(original)


def embedding_files(path: Path) -> list[Path]:
    """Find the files that may hold the new tokens' embeddings of a LoRA file.

    That is `NAME_emb.safetensors` beside `NAME.safetensors`; for a file in a folder of its own, every
    `*_emb.safetensors` there; for a run's export, the file of the run.
    """
    named = path.with_name(f"{path.stem}_emb.safetensors")
    if named.is_file():
        return [named]
    if path.name == LORA_FILE:
        return sorted(path.parent.glob("*_emb.safetensors"))
    of_run = path.with_name(EMBEDDINGS_FILE)
    # A run's file for other tools names the new tokens in its metadata.
    is_of_run = of_run.is_file() and "<s0>" in read_header(path).metadata.get("modelspec.trigger_phrase", "")
    return [of_run] if is_of_run else []


def _adapter(index: int) -> str:
    return f"lora_{index}"


def _load(pipeline: Any, file: CheckedFile, names: BaseNames, adapter: str) -> None:
    lora = load_for_base(file, names)
    # diffusers would apply the file's most common alpha to all layers. PEFT casts to the base's dtype.
    dtype = getattr(pipeline, names.family.denoiser).dtype
    tensors = peft_tensors(lora.updates, dtype) | magnitude_tensors(lora.magnitudes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several LoRAs are intended
        pipeline.load_lora_weights(tensors, adapter_name=adapter)


def _embedding_file(path: Path) -> Path | None:
    beside = embedding_files(path)
    if len(beside) > 1:
        raise ConfigError(
            f"lora={str(path)!r} has {len(beside)} files *_emb.safetensors beside it; keep one, or rename it to "
            f"{path.stem}_emb.safetensors"
        )
    return beside[0] if beside else None


@contextmanager
def _embeddings_loaded(pipeline: Any, path: Path) -> Iterator[None]:
    """Add the tokens `<s0>`, `<s1>`, ... with the embeddings of `path` to both text encoders."""
    try:
        embeddings = load_file(path)
        rows = [embeddings[key] for key, _, _ in _EMBEDDINGS]
    except (SafetensorError, KeyError) as error:
        raise ConfigError(f"lora: {path} has no embeddings clip_l and clip_g: {first_line(error)}") from error
    tokens = [f"<s{index}>" for index in range(len(rows[0]))]
    with ExitStack() as undo:
        for row, (name, part, key) in zip(rows, _EMBEDDINGS, strict=True):
            width = getattr(pipeline, part).get_input_embeddings().embedding_dim
            if row.shape[1:] != (width,):
                raise ConfigError(
                    f"lora: {path} has {name} embeddings of shape {tuple(row.shape)}; this base needs (N, {width})"
                )
            undo.enter_context(_extendable_vocabulary(pipeline, part, key))
            try:
                with torch.random.fork_rng():  # transformers initializes new rows at random before they are set
                    pipeline.load_textual_inversion(
                        row, token=tokens, text_encoder=getattr(pipeline, part), tokenizer=getattr(pipeline, key)
                    )
            except ValueError as error:
                raise ConfigError(f"lora: the embeddings {path} cannot be used: {first_line(error)}") from error
        logger.info("%s: use these tokens in prompts: %s", path.name, "".join(tokens))
        yield


@contextmanager
def _extendable_vocabulary(pipeline: Any, part: str, key: str) -> Iterator[None]:
    """Allow new tokens in a tokenizer and its text encoder's embedding table; restore both on exit."""
    tokenizer, encoder = getattr(pipeline, key), getattr(pipeline, part)
    table = encoder.get_input_embeddings()
    rows = table.weight.data
    setattr(pipeline, key, copy.deepcopy(tokenizer))
    try:
        yield
    finally:
        setattr(pipeline, key, tokenizer)
        table.weight.data = rows  # transformers extended this table in place
        table.num_embeddings = encoder.config.vocab_size = len(rows)
