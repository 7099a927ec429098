"""A LoRA of any origin as a file for diffusers or for all other tools: written, read back and compared."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from flatlora_diffusion.adapter.delta import LazyLayers, Update, Updates, update_norms
from flatlora_diffusion.config import ConfigError, ExportConfig, FileLayout, ImportConfig, SaveDtype
from flatlora_diffusion.lora_files.diffusers_file import peft_stream, version_free
from flatlora_diffusion.lora_files.key_mapping import is_small_change
from flatlora_diffusion.lora_files.kohya import completed, kohya_name, kohya_stream
from flatlora_diffusion.lora_files.lost_alpha import lost_alpha
from flatlora_diffusion.lora_files.metadata import KOHYA_FACTS, MODELSPEC, kept_metadata
from flatlora_diffusion.lora_files.names import BaseNames
from flatlora_diffusion.lora_files.paths import lora_file
from flatlora_diffusion.lora_files.reading import ImportedLora, import_lora, layers_of
from flatlora_diffusion.lora_files.safe_reading import CheckedFile, checked_file, listed
from flatlora_diffusion.lora_files.writing import check_updates, save_kohya
from flatlora_diffusion.lora_tools.outputs import check_lora_output, written_to
from flatlora_diffusion.sdxl.device import DTYPES
from flatlora_diffusion.sdxl.family import TINY_FAMILY, Family, family_of
from flatlora_diffusion.sdxl.loading import base_path
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir, file_name
from flatlora_diffusion.storage.tensor_io import contents_of, save_stream

logger = logging.getLogger(__name__)

_OWN_DTYPES: dict[str, SaveDtype] = {"F64": "fp32", "F32": "fp32", "BF16": "bf16"}


class Written(NamedTuple):
    """A file, and the largest relative error of a layer's update in it."""

    path: Path
    error: float


def export_lora(config: ExportConfig) -> list[Written]:
    """Write the file in the layouts asked for. Raises ConfigError for wrong input, RunError for a wrong result."""
    source = lora_file(config.file)
    stem = file_name(config.name) if config.name else source.stem
    wanted: tuple[FileLayout, ...] = ("kohya", "diffusers") if config.layout == "both" else (config.layout,)
    output = None if config.output is None else Path(config.output)
    if output is not None and output.suffix == ".safetensors":
        if len(wanted) > 1:
            raise ConfigError(f"--layout both writes two files, but {output} is one; give a folder as --output")
        paths = {wanted[0]: output}
    else:
        folder = source.parent if output is None else output
        paths = {layout: folder / f"{stem}_{layout}.safetensors" for layout in wanted}
    return _convert(source, paths, config)


def import_file(config: ImportConfig) -> list[Written]:
    """Write the file for diffusers. Raises ConfigError for wrong input, RunError for a wrong result."""
    source = lora_file(config.file)
    path = output_file(config.output, source, f"{source.stem}_diffusers.safetensors")
    return _convert(source, {"diffusers": path}, config)


def output_file(output: str | None, source: Path, name: str) -> Path:
    """The file to write: `output`, or `name` in the folder `output`, or beside the source."""
    if output is None:
        return source.with_name(name)
    path = Path(output)
    return path if path.suffix == ".safetensors" else path / name


def write_lora(
    lora: Updates, base: BaseNames, path: Path, layout: FileLayout, dtype: SaveDtype, metadata: Mapping[str, str]
) -> Written:
    """Write `lora` in one layout, read it back, and compare what it adds to each layer."""
    if not any(update_norms(lora).values()):
        raise ConfigError(f"{path.name} would change nothing: all updates of the LoRA are zero")
    kind = DTYPES[dtype]
    with written_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if layout == "kohya":
            lora = _told(_portable(lora, path), base, path)
            whole = _kohya_metadata(metadata, path, family_of(base.unet))
            save_kohya(path, partial(kohya_stream, lora, base.layers_per_block, kind), whole)
        else:
            tensors = partial(peft_stream, lora, kind)
            whole = {**metadata, "lora_adapter_metadata": json.dumps(_adapter_metadata(lora), sort_keys=True)}
            save_stream(path, tensors, contents_of(tensors()), whole)
    saved = layers_of(checked_file(path), base).updates
    return Written(path, check_updates(path, saved, lora, kind))


def read_lora_file(path: str, base: str | None) -> ImportedLora:
    """The LoRA of a file or of a run's folder, with a warning for what is in it that no layer has."""
    file = checked_file(lora_file(path))
    try:
        lora = import_lora(file, base)
    except ConfigError as error:
        plain = _plain_copy(file)
        if plain is None:
            raise
        raise ConfigError(f"{error}; use {plain}, the plain LoRA made of it") from error
    said = lost_alpha(lora)
    if said:
        logger.warning("%s", said)
    small = [key for key in lora.unknown if is_small_change(file, key)]
    if small:
        logger.warning(
            "%d change(s) of biases and norms are left out, which no LoRA for other tools can hold: %s",
            len(small),
            listed(small),
        )
    unknown = [key for key in lora.unknown if key not in small]
    if unknown:
        logger.warning(
            "%d key(s) belong to no layer of %s and are left out: %s",
            len(unknown),
            lora.base.base,
            listed(unknown, 20),
        )
    return lora


def read_for(source: Path, base: str | None) -> list[Path]:
    """What may be read for a LoRA file: itself, the file beside it that knows a lost alpha, and the base."""
    return [source, source.with_name(LORA_FILE), *([] if base is None else [Path(base_path(base))])]


def own_dtype(lora: ImportedLora) -> SaveDtype:
    """The precision of the file's first layer, fp16 for those that we do not write."""
    return _OWN_DTYPES.get(lora.layers[0].dtype, "fp16")


def _convert(source: Path, paths: Mapping[FileLayout, Path], config: ExportConfig | ImportConfig) -> list[Written]:
    for path in paths.values():
        check_lora_output(path, config.overwrite, read_for(source, config.base))
    lora = read_lora_file(str(source), config.base)
    given = config.name if isinstance(config, ExportConfig) else None
    name = given or lora.file.metadata.get("ss_output_name")
    family = family_of(lora.base.unet)
    metadata = kept_metadata(lora.file.metadata, file_name(name) if name else source.stem, family)
    dtype = config.dtype or own_dtype(lora)
    return [write_lora(lora.updates, lora.base, path, layout, dtype, metadata) for layout, path in paths.items()]


def _plain_copy(file: CheckedFile) -> Path | None:
    """The file for other tools beside a DoRA of a run or of a checkpoint of one; None for any other file."""
    folder = file.path.parent
    run = RunDir(folder.parent if folder.name.startswith("checkpoint-") else folder)
    is_dora = any(key.endswith("lora_magnitude_vector") for key in file.entries)
    if not is_dora or not (run.config_file.is_file() and run.events_file.is_file()):
        return None
    plain = folder / f"{run.lora_name(run.config().get('output_name'))}.safetensors"
    return plain if plain.is_file() and plain != file.path else None


def _portable(lora: Updates, path: Path) -> Updates:
    """The layers that have a name in kohya's layout, with a warning for the others."""
    kept: dict[str, Mapping[str, Update]] = {}
    without = []
    for part, layers in lora.items():
        named = [module for module in layers if _has_kohya_name(part, module)]
        without += [f"{part}.{module}" for module in layers if module not in named]
        if named:
            kept[part] = LazyLayers(named, layers.__getitem__)
    if without:
        logger.warning(
            "%s lacks %d layer(s) that have no name which all tools know: %s", path.name, len(without), listed(without)
        )
    if not kept:
        raise ConfigError(f"{path.name} would be empty: no layer of the LoRA has a name in kohya's layout")
    return kept


def _has_kohya_name(part: str, module: str) -> bool:
    try:
        kohya_name(part, module)
    except KeyError:
        return False
    return True


def _told(lora: Updates, base: BaseNames, path: Path) -> Updates:
    """`lora` with the layers that other tools look for, with a warning where the UNet gets its only ones."""
    whole = completed(lora, base.unet)
    added = whole.get("unet", {})
    if added and "unet" not in lora:
        logger.warning(
            "%s is for text encoders only; it gets %d UNet layers of zeros, which change nothing: by them InvokeAI "
            "and Draw Things see that it is for SDXL",
            path.name,
            len(added),
        )
    return whole


def _kohya_metadata(metadata: Mapping[str, str], path: Path, family: Family) -> dict[str, str]:
    """`metadata` with what every kohya file says; with a warning for a base that no other tool has."""
    if family == TINY_FAMILY:
        logger.warning("%s is for %s, which no other tool has", path.name, family.name)
    # Where the old file does not say it; some web UIs take a file without the first for one of another family.
    defaults = {"ss_base_model_version": family.version, "modelspec.sai_model_spec": MODELSPEC}
    return {**defaults, **metadata, **KOHYA_FACTS, "modelspec.architecture": family.architecture}


def _adapter_metadata(lora: Updates) -> dict[str, Any]:
    """The settings with which diffusers restores `peft_tensors`: only those that every peft knows."""
    settings: dict[str, Any] = {}
    for part, layers in lora.items():
        rank = max(len(update.down) for update in layers.values())
        paths = sorted(version_free(module) for module in layers)
        settings |= {f"{part}.r": rank, f"{part}.lora_alpha": rank, f"{part}.target_modules": paths}
    return settings
