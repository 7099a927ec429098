"""Converts LoRA files of any layout to diffusers' or kohya's layout, and verifies each written file."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from flatlora_diffusion.adapter.delta import LazyLayers, Update, Updates, update_norms
from flatlora_diffusion.config import ConfigError, ExportConfig, FileLayout, ImportConfig, SaveDtype
from flatlora_diffusion.families.device import DTYPES
from flatlora_diffusion.families.labels import Labels
from flatlora_diffusion.families.paths import base_path
from flatlora_diffusion.lora_files.diffusers_file import iter_peft_tensors, portable_module_path
from flatlora_diffusion.lora_files.key_mapping import is_bias_or_norm
from flatlora_diffusion.lora_files.kohya import kohya_name, kohya_tensors, with_required_layers
from flatlora_diffusion.lora_files.lost_alpha import lost_alpha_warning
from flatlora_diffusion.lora_files.metadata import KOHYA_FACTS, MODELSPEC, portable_metadata
from flatlora_diffusion.lora_files.names import BaseNames
from flatlora_diffusion.lora_files.paths import lora_file, run_of
from flatlora_diffusion.lora_files.reading import ImportedLora, import_lora, parse_layers
from flatlora_diffusion.lora_files.safe_reading import CheckedFile, read_header, shortlist
from flatlora_diffusion.lora_files.writing import check_updates, save_kohya
from flatlora_diffusion.lora_tools.outputs import check_lora_output, write_errors
from flatlora_diffusion.storage.run_dir import LORA_FILE, file_name
from flatlora_diffusion.storage.tensor_io import contents_of, save_stream

logger = logging.getLogger(__name__)

_SOURCE_DTYPES: dict[str, SaveDtype] = {"F64": "fp32", "F32": "fp32", "BF16": "bf16"}


class WrittenFile(NamedTuple):
    """A written file, and the largest relative error of a layer's update in it."""

    path: Path
    error: float


def export_lora(config: ExportConfig) -> list[WrittenFile]:
    """Write the file in each chosen layout.

    Raises:
        ConfigError: The input is wrong.
        RunError: A written file differs from the LoRA.
    """
    source = lora_file(config.file)
    stem = file_name(config.name) if config.name else source.stem
    layouts: tuple[FileLayout, ...] = ("kohya", "diffusers") if config.layout == "both" else (config.layout,)
    output = None if config.output is None else Path(config.output)
    if output is not None and output.suffix == ".safetensors":
        if len(layouts) > 1:
            raise ConfigError(f"output={str(output)!r} is one file, but --layout both writes two; give a folder")
        paths = {layouts[0]: output}
    else:
        folder = source.parent if output is None else output
        paths = {layout: folder / f"{stem}_{layout}.safetensors" for layout in layouts}
    return _convert(source, paths, config)


def import_file(config: ImportConfig) -> list[WrittenFile]:
    """Write the file in diffusers' layout. Raises as `export_lora`."""
    source = lora_file(config.file)
    path = output_file(config.output, source, f"{source.stem}_diffusers.safetensors")
    return _convert(source, {"diffusers": path}, config)


def output_file(output: str | None, source: Path, name: str) -> Path:
    """The path to write: `output`, or `name` in the folder `output`, or `name` beside the source."""
    if output is None:
        return source.with_name(name)
    path = Path(output)
    return path if path.suffix == ".safetensors" else path / name


def write_lora(
    lora: Updates, base: BaseNames, path: Path, layout: FileLayout, dtype: SaveDtype, metadata: Mapping[str, str]
) -> WrittenFile:
    """Write `lora` in one layout, then read the file back and compare the updates. Raises as `export_lora`.

    A base of flow matching has diffusers' layout only, which other tools read too.
    """
    if not any(update_norms(lora).values()):
        raise ConfigError(f"{path.name} would have no effect: all updates of the LoRA are zero; give a trained LoRA")
    kind = DTYPES[dtype]
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if layout == "kohya" and not base.labels.is_flow:
            lora = _complete(_with_kohya_names(lora, path), base, path)
            whole = _kohya_metadata(metadata, path, base.labels)
            save_kohya(path, partial(kohya_tensors, lora, base.denoiser.config.layers_per_block, kind), whole)
        else:
            tensors = partial(iter_peft_tensors, lora, kind)
            whole = {**metadata, "lora_adapter_metadata": json.dumps(_adapter_metadata(lora), sort_keys=True)}
            save_stream(path, tensors, contents_of(tensors()), whole)
    saved = parse_layers(read_header(path), base).updates
    return WrittenFile(path, check_updates(path, saved, lora, kind))


def read_lora_file(path: str, base: str | None) -> ImportedLora:
    """Read the LoRA of a file or run folder; warn about a lost alpha and about keys of no layer."""
    file = read_header(lora_file(path))
    try:
        lora = import_lora(file, base)
    except ConfigError as error:
        exported = _exported_lora(file)
        if exported is None:
            raise
        raise ConfigError(f"{error}; use {exported}, its plain LoRA") from error
    if warning := lost_alpha_warning(lora):
        logger.warning("%s", warning)
    biases = [key for key in lora.unknown if is_bias_or_norm(file, key)]
    if biases:
        logger.warning(
            "Ignoring %d change(s) of biases and norms, which a portable LoRA cannot contain: %s",
            len(biases),
            shortlist(biases),
        )
    unknown = [key for key in lora.unknown if key not in biases]
    if unknown:
        logger.warning(
            "Ignoring %d key(s) that belong to no layer of %s: %s",
            len(unknown),
            lora.base.base,
            shortlist(unknown, 20),
        )
    return lora


def input_paths(source: Path, base: str | None) -> list[Path]:
    """Paths that converting a LoRA file may read: the file, the file beside it with a lost alpha, and the base."""
    return [source, source.with_name(LORA_FILE), *([] if base is None else [Path(base_path(base))])]


def source_dtype(lora: ImportedLora) -> SaveDtype:
    """The precision of the file's first layer; fp16 if that cannot be written."""
    return _SOURCE_DTYPES.get(lora.layers[0].dtype, "fp16")


def _convert(source: Path, paths: Mapping[FileLayout, Path], config: ExportConfig | ImportConfig) -> list[WrittenFile]:
    for path in paths.values():
        check_lora_output(path, config.overwrite, input_paths(source, config.base))
    lora = read_lora_file(str(source), config.base)
    if "kohya" in paths and lora.base.labels.is_flow:
        raise ConfigError(
            f"--layout kohya does not fit {lora.base.labels.name}, whose LoRAs are one file for all tools; "
            "give --layout diffusers"
        )
    name = (isinstance(config, ExportConfig) and config.name) or lora.file.metadata.get("ss_output_name")
    labels = lora.base.labels
    metadata = portable_metadata(lora.file.metadata, file_name(name) if name else source.stem, labels)
    dtype = config.dtype or source_dtype(lora)
    return [write_lora(lora.updates, lora.base, path, layout, dtype, metadata) for layout, path in paths.items()]


def _exported_lora(file: CheckedFile) -> Path | None:
    """The plain LoRA for other tools beside the DoRA of a run or checkpoint; None for any other file."""
    run = run_of(file.path)
    if run is None or not any(key.endswith("lora_magnitude_vector") for key in file.entries):
        return None
    plain = file.path.with_name(f"{run.lora_name(run.config().get('output_name'))}.safetensors")
    return plain if plain.is_file() and plain != file.path else None


def _with_kohya_names(lora: Updates, path: Path) -> Updates:
    """Select the layers that have a name in kohya's layout; warn about the others."""
    selected: dict[str, Mapping[str, Update]] = {}
    unnamed = []
    for part, layers in lora.items():
        named = [module for module in layers if _has_kohya_name(part, module)]
        unnamed += [f"{part}.{module}" for module in layers if module not in named]
        if named:
            selected[part] = LazyLayers(named, layers.__getitem__)
    if unnamed:
        logger.warning(
            "%s lacks %d layer(s) without a name in kohya's layout: %s", path.name, len(unnamed), shortlist(unnamed)
        )
    if not selected:
        raise ConfigError(
            f"{path.name} would be empty: no layer of the LoRA has a name in kohya's layout; use --layout diffusers"
        )
    return selected


def _has_kohya_name(part: str, module: str) -> bool:
    try:
        kohya_name(part, module)
    except KeyError:
        return False
    return True


def _complete(lora: Updates, base: BaseNames, path: Path) -> Updates:
    """Add the layers that other tools require; warn if these are the UNet's only layers."""
    whole = with_required_layers(lora, base.denoiser)
    added = whole.get("unet", {})
    if added and "unet" not in lora:
        logger.warning(
            "%s has no UNet layers; adding %d of zeros, by which InvokeAI and Draw Things recognize SDXL",
            path.name,
            len(added),
        )
    return whole


def _kohya_metadata(metadata: Mapping[str, str], path: Path, labels: Labels) -> dict[str, str]:
    """Add the keys of every kohya file to `metadata`; warn if the base is unknown to other tools."""
    if labels.is_demo:
        logger.warning("%s is for %s, which other tools do not have", path.name, labels.name)
    # Without the first key some web UIs assume another model family.
    defaults = {"ss_base_model_version": labels.version, "modelspec.sai_model_spec": MODELSPEC}
    own = {"modelspec.architecture": labels.architecture, "modelspec.implementation": labels.implementation}
    return {**defaults, **metadata, **KOHYA_FACTS, **own}


def _adapter_metadata(lora: Updates) -> dict[str, Any]:
    """The LoraConfig fields that diffusers needs to restore the tensors, limited to fields known to every peft."""
    settings: dict[str, Any] = {}
    for part, layers in lora.items():
        rank = max(len(update.down) for update in layers.values())
        paths = sorted(portable_module_path(module) for module in layers)
        settings |= {f"{part}.r": rank, f"{part}.lora_alpha": rank, f"{part}.target_modules": paths}
    return settings
