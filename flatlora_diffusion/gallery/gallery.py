"""`generate`: images of prompts x seeds x LoRAs x strengths as PNG files and as labelled grids, the base first.

A call creates a new folder `output_dir/001`, `002`, ... with

01_a-red-fox_seed-0_00_base.png        prompt, seed, row of the grid; the names are deterministic
01_a-red-fox_seed-0_01_my-lora_0.8.png
grid.png                               rows: base, then LoRA x strength; columns: prompt x seed
grid_01.png, grid_02.png, ...          instead of grid.png for more than 8 columns: each with as many prompts as fit in
                                       8 columns, at least one, with all their seeds
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NoReturn

import torch
from PIL import Image
from tqdm import tqdm

from flatlora_diffusion.config import ConfigError, GenerateConfig
from flatlora_diffusion.data.prompts import read_prompts
from flatlora_diffusion.families.base import Base
from flatlora_diffusion.families.device import DTYPES, check_precision
from flatlora_diffusion.families.drawing import Drawing, ImageSettings, portable_base_name
from flatlora_diffusion.families.registry import drawing_precision, family_of, load_base
from flatlora_diffusion.families.sampling import generate_images
from flatlora_diffusion.gallery.grid import labelled_grid
from flatlora_diffusion.gallery.png_text import UsedLora, bare_name, grid_text, image_text
from flatlora_diffusion.lora_files.loading import lora_scale, loras_loaded
from flatlora_diffusion.lora_files.paths import LoraFile, parse_lora, unique_path_ends
from flatlora_diffusion.storage.atomic_io import atomic_write, check_writable, file_sha256
from flatlora_diffusion.storage.formatting import slug
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir

logger = logging.getLogger(__name__)

MAX_COLUMNS = 8


@dataclass(frozen=True)
class LoraRow:
    """A row of the grid: the base, or LoRA files used together at a strength."""

    index: int
    files: tuple[LoraFile, ...] = ()
    used: tuple[UsedLora, ...] = ()
    strength: float = 0.0

    @property
    def name(self) -> str:
        pairs = zip(self.used, self.files, strict=True)
        return " + ".join(lora.name if file.weight == 1 else f"{lora.name}@{file.weight:g}" for lora, file in pairs)

    @property
    def label(self) -> str:
        return f"{self.name} x {self.strength:g}" if self.files else "Base"

    @property
    def slug(self) -> str:
        return f"{self.index:02}_" + (f"{_slug(self.name, 60)}_{self.strength:g}" if self.files else "base")


@dataclass(frozen=True)
class PromptColumn:
    """A column of the grid: a prompt, its number from 1, and a seed."""

    number: int
    prompt: str
    seed: int

    @property
    def slug(self) -> str:
        return f"{self.number:02}_{_slug(self.prompt, 40)}"


def generate(config: GenerateConfig) -> list[Path]:
    """Generate the images that `config` requests; returns the paths of the grids.

    Raises ConfigError for invalid input, before the first image.
    """
    family_of(config.model).check_sections(config, config.model)
    prompts = _prompts(config)
    rows = _rows(config)
    columns = [PromptColumn(number, prompt, seed) for number, prompt in enumerate(prompts, 1) for seed in config.seeds]
    check_writable(Path(config.output_dir), "output_dir")
    base, config = _load(config)
    _warn_of_truncation(base, [*prompts, config.negative_prompt or ""])
    for files in {row.files: None for row in rows}:  # to report an incompatible file before the first image
        with loras_loaded(base.pipeline, files):
            pass
    folder = _new_folder(Path(config.output_dir))
    images: list[list[Image.Image]] = []
    with tqdm(total=len(rows) * len(columns), unit="image") as bar:
        for files, group in groupby(rows, key=lambda row: row.files):
            with loras_loaded(base.pipeline, files):
                for row in group:
                    with lora_scale(base.pipeline, files, row.strength, config.merge):
                        images.append(_draw_row(base, config, row, columns, folder, bar))
    return list(_save_grids(config, _sampler(base), rows, columns, images, folder))


def _prompts(config: GenerateConfig) -> list[str]:
    prompts = list(config.prompts)
    if config.prompts_file is not None:
        prompts += read_prompts(Path(config.prompts_file))
    if not prompts:
        raise ConfigError("there is no prompt: give --prompts or a --prompts_file that is not empty")
    return list(dict.fromkeys(prompts))


def _rows(config: GenerateConfig) -> list[LoraRow]:
    sets = [parse_lora(text) for text in config.lora]
    paths = list(dict.fromkeys(file.path for files in sets for file in files))
    names = dict(zip(paths, _names(paths), strict=True))
    hashes = {path: file_sha256(path) for path in paths}
    rows = [LoraRow(0)]
    for files in sets:
        for strength in config.strengths:
            used = [UsedLora(names[file.path], file.weight * strength, hashes[file.path]) for file in files]
            rows.append(LoraRow(len(rows), files, tuple(used), strength))
    return rows


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest unique end of each path; the folder's name for the LoRA in a run folder."""
    ends = [path.parent if path.name == LORA_FILE else path.with_suffix("") for path in paths]
    # Not unique for a run folder `a` beside a file `a.safetensors`.
    return unique_path_ends(ends) or unique_path_ends(paths)


def _load(config: GenerateConfig) -> tuple[Base, GenerateConfig]:
    """Load the base; returns it and the config with the base's defaults of precision, size, steps and guidance."""
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    precision = config.mixed_precision or drawing_precision(config.model)
    check_precision("mixed_precision", precision, device)
    base = load_base(config.model, device, DTYPES[precision])
    if config.model.offload and has_gpu:
        base.pipeline.enable_model_cpu_offload()
    resolution = base.checked_resolution(config.resolution)
    asked = ImageSettings(resolution, config.num_inference_steps, config.guidance_scale)
    guidance = base.guidance_of(asked)
    if guidance <= 1 and (config.negative_prompt is not None or (config.guidance_scale or 0) > guidance):
        name = "guidance_scale" if config.negative_prompt is None else "negative_prompt"
        raise ConfigError(
            f"{name}={getattr(config, name)!r} has no effect on this base, which is distilled to draw without "
            f"guidance; leave out --{name}"
        )
    return base, dataclasses.replace(
        config,
        mixed_precision=precision,
        resolution=resolution,
        num_inference_steps=base.steps_of(asked),
        guidance_scale=guidance,
    )


def _warn_of_truncation(base: Base, prompts: Sequence[str]) -> None:
    for prompt in prompts:
        if base.count_tokens(prompt) > base.max_tokens:
            logger.warning(
                "the prompt %r has more than %d tokens: the text after them is ignored; shorten it",
                prompt,
                base.max_tokens,
            )


def _new_folder(parent: Path) -> Path:
    """Create the first of `parent/001`, `002`, ... that does not exist."""
    number = 1
    while (parent / f"{number:03}").exists():
        number += 1
    folder = parent / f"{number:03}"
    folder.mkdir(parents=True)
    return folder


def _draw_row(
    base: Base,
    config: GenerateConfig,
    row: LoraRow,
    columns: Sequence[PromptColumn],
    folder: Path,
    bar: tqdm[NoReturn],
) -> list[Image.Image]:
    """Generate the images of a row, and save them batch by batch."""
    images: list[Image.Image] = []
    for start in range(0, len(columns), config.batch_size):
        part = columns[start : start + config.batch_size]
        generated = generate_images(
            base,
            [column.prompt for column in part],
            [column.seed for column in part],
            _settings(base, config),
            config.batch_size,
        )
        for column, image in zip(part, generated, strict=True):
            drawing = _drawing(base, config, row, column)
            text = image_text(config, _sampler(base), column.prompt, column.seed, row.used, drawing)
            with atomic_write(folder / f"{column.slug}_seed-{column.seed}_{row.slug}.png") as temporary:
                image.save(temporary, format="PNG", pnginfo=text)
        images += generated
        bar.update(len(generated))
    return images


def _drawing(base: Base, config: GenerateConfig, row: LoraRow, column: PromptColumn) -> Drawing | None:
    """Describe the image for other tools; None if they cannot reproduce it."""
    pairs = zip(row.used, row.files, strict=True)
    return base.describe_image(
        column.prompt,
        column.seed,
        _settings(base, config),
        portable_base_name(bare_name(config.model.pretrained_model_name_or_path)),
        tuple((_export_name(file.path), lora.strength) for lora, file in pairs),
    )


def _settings(base: Base, config: GenerateConfig) -> ImageSettings:
    return ImageSettings(
        config.resolution or base.resolution,
        config.num_inference_steps,
        config.guidance_scale,
        config.negative_prompt,
        config.guidance_rescale,
    )


def _export_name(path: Path) -> str:
    """Return the name of a LoRA in other tools; of a run's LoRA the name of its file for them."""
    run = RunDir(path.parent)
    if path.name != LORA_FILE:
        return path.stem
    return run.lora_name(run.config().get("output_name") if run.config_file.is_file() else None)


def _save_grids(
    config: GenerateConfig,
    sampler: str,
    rows: Sequence[LoraRow],
    columns: Sequence[PromptColumn],
    images: Sequence[Sequence[Image.Image]],
    folder: Path,
) -> Iterator[Path]:
    count = len(config.seeds)
    step = count * max(1, MAX_COLUMNS // count)
    for number, start in enumerate(range(0, len(columns), step), 1):
        part = columns[start : start + step]
        prompts = list(dict.fromkeys(column.prompt for column in part))
        labels = [_column_label(column, len(prompts), count) for column in part]
        caption = f"{config.num_inference_steps} steps, guidance {config.guidance_scale:g}"
        caption += f", seed {config.seeds[0]}" if count == 1 else ""
        caption = f"{prompts[0]}\n{caption}" if len(prompts) == 1 and count > 1 else caption
        cells = [row[start : start + step] for row in images]
        cell = min(max(192, config.resolution or 0), 320)
        grid = labelled_grid(cells, [row.label for row in rows], labels, cell, caption)
        path = folder / ("grid.png" if len(part) == len(columns) else f"grid_{number:02}.png")
        settings = {
            "prompts": prompts,
            "seeds": config.seeds,
            "rows": [[dataclasses.asdict(lora) for lora in row.used] for row in rows],
        }
        with atomic_write(path) as temporary:
            grid.save(temporary, format="PNG", pnginfo=grid_text(config, sampler, settings))
        yield path


def _column_label(column: PromptColumn, prompts: int, seeds: int) -> str:
    if seeds == 1:
        return column.prompt
    return f"seed {column.seed}" if prompts == 1 else f"{column.prompt}\nseed {column.seed}"


def _sampler(base: Base) -> str:
    return type(base.pipeline.scheduler).__name__


def _slug(text: str, length: int) -> str:
    """Return `text` as part of a file name of at most `length` characters."""
    return slug(text, allowed="+")[:length].strip("-.") or "x"
