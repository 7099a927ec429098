"""LoRA files in a pipeline for the length of a `with`: several at once, any strength, beside the weights or in them.

Afterwards the pipeline is as it was, bit for bit.
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
from peft.tuners.lora.layer import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file

from flatlora_diffusion.adapter.delta import PARTS
from flatlora_diffusion.adapter.layers import lora_layers
from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.lora_files.diffusers_file import magnitude_tensors, peft_tensors
from flatlora_diffusion.lora_files.names import BaseNames, loaded_names
from flatlora_diffusion.lora_files.paths import LoraFile
from flatlora_diffusion.lora_files.reading import lora_of_base
from flatlora_diffusion.lora_files.safe_reading import CheckedFile, checked_file
from flatlora_diffusion.storage.formatting import first_line
from flatlora_diffusion.storage.run_dir import EMBEDDINGS_FILE, LORA_FILE

logger = logging.getLogger(__name__)

# Key in the file, text encoder and tokenizer of pivotal tuning's embeddings.
_EMBEDDINGS = (("clip_l", "text_encoder", "tokenizer"), ("clip_g", "text_encoder_2", "tokenizer_2"))


@contextmanager
def loaded(pipeline: Any, files: Sequence[LoraFile]) -> Iterator[None]:
    """All `files` in the pipeline, with the embeddings of new tokens that lie beside them.

    Raises ConfigError, naming the file, for one that cannot be read or that adapts nothing of this base.
    """
    with ExitStack() as undo:
        undo.callback(pipeline.unload_lora_weights)
        names = loaded_names(pipeline)
        for index, file in enumerate(files):
            _load(pipeline, checked_file(file.path), names, _adapter(index))
        for path in dict.fromkeys(_embeddings_of(file.path) for file in files):
            if path is not None:
                undo.enter_context(_with_embeddings(pipeline, path))
        for part in PARTS:  # a file may bring a dropout, and new layers start in training mode
            getattr(pipeline, part).eval()
        yield


@contextmanager
def at_strength(pipeline: Any, files: Sequence[LoraFile], strength: float, merge: bool) -> Iterator[None]:
    """`loaded` files at `strength` times their weights, in UNet and text encoders; 0 is exactly the base.

    With `merge` they are added to the weights; copies of these are put back, because subtracting leaves rounding.
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
    weights = [layer.get_base_layer().weight for layer in _layers(pipeline)]
    kept = [weight.detach().clone() for weight in weights]
    try:
        pipeline.fuse_lora(adapter_names=adapters)
        yield
    finally:
        pipeline.unfuse_lora()
        for weight, before in zip(weights, kept, strict=True):
            weight.data.copy_(before)


def embeddings_beside(path: Path) -> list[Path]:
    """The files that may hold the new tokens of a LoRA file: `NAME_emb.safetensors` of `NAME.safetensors`, or else
    those of a folder that holds one LoRA, or that of the run in whose folder the file is.
    """
    own = path.with_name(f"{path.stem}_emb.safetensors")
    if own.is_file():
        return [own]
    if path.name == LORA_FILE:
        return sorted(path.parent.glob("*_emb.safetensors"))
    of_run = path.with_name(EMBEDDINGS_FILE)
    # A run's file for other tools names the new tokens in its metadata, wherever it is.
    is_of_run = of_run.is_file() and "<s0>" in checked_file(path).metadata.get("modelspec.trigger_phrase", "")
    return [of_run] if is_of_run else []


def _adapter(index: int) -> str:
    return f"lora_{index}"


def _layers(pipeline: Any) -> list[LoraLayer]:
    return [layer for part in PARTS for layer in lora_layers(getattr(pipeline, part)).values()]


def _load(pipeline: Any, file: CheckedFile, names: BaseNames, adapter: str) -> None:
    lora = lora_of_base(file, names)
    # Not the file itself, of which diffusers gives all layers the commonest alpha. PEFT casts to the base's dtype.
    tensors = peft_tensors(lora.updates, pipeline.unet.dtype) | magnitude_tensors(lora.magnitudes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several at once are what is wanted
        pipeline.load_lora_weights(tensors, adapter_name=adapter)


def _embeddings_of(path: Path) -> Path | None:
    beside = embeddings_beside(path)
    if len(beside) > 1:
        raise ConfigError(
            f"lora: beside {path} are {len(beside)} files *_emb.safetensors; leave one, or name it {path.stem}_emb"
            ".safetensors"
        )
    return beside[0] if beside else None


@contextmanager
def _with_embeddings(pipeline: Any, path: Path) -> Iterator[None]:
    """The tokens `<s0>`, `<s1>`, ... with the embeddings of `path` in both text encoders."""
    try:
        embeddings = load_file(path)
        rows = [embeddings[key] for key, _, _ in _EMBEDDINGS]
    except (SafetensorError, KeyError) as error:
        raise ConfigError(f"lora: {path} holds no embeddings clip_l and clip_g: {first_line(error)}") from error
    tokens = [f"<s{index}>" for index in range(len(rows[0]))]
    with ExitStack() as undo:
        for row, (name, part, key) in zip(rows, _EMBEDDINGS, strict=True):
            width = getattr(pipeline, part).get_input_embeddings().embedding_dim
            if row.shape[1:] != (width,):
                raise ConfigError(f"lora: {path} has {name} embeddings of shape {tuple(row.shape)}, not (N, {width})")
            undo.enter_context(_with_tokens(pipeline, part, key))
            try:
                with torch.random.fork_rng():  # new rows are drawn before they are set
                    pipeline.load_textual_inversion(
                        row, token=tokens, text_encoder=getattr(pipeline, part), tokenizer=getattr(pipeline, key)
                    )
            except ValueError as error:
                raise ConfigError(f"lora: the embeddings {path} cannot be used: {first_line(error)}") from error
        logger.info("%s: for use in the prompts: %s", path.name, "".join(tokens))
        yield


@contextmanager
def _with_tokens(pipeline: Any, part: str, key: str) -> Iterator[None]:
    """A tokenizer and an embedding table that may be extended; those from before are put back."""
    tokenizer, encoder = getattr(pipeline, key), getattr(pipeline, part)
    table = encoder.get_input_embeddings()
    rows = table.weight.data
    setattr(pipeline, key, copy.deepcopy(tokenizer))
    try:
        yield
    finally:
        setattr(pipeline, key, tokenizer)
        table.weight.data = rows  # transformers has put longer ones into the same table
        table.num_embeddings = encoder.config.vocab_size = len(rows)
