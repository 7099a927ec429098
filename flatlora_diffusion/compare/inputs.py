"""Reads the inputs of a comparison (image sets, prompts, scoring models) and builds its evaluator."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

from flatlora_diffusion.compare.arms import PlannedRun
from flatlora_diffusion.compare.evaluator import (
    FORGETTING,
    HELDOUT,
    TRAIN,
    PromptSets,
    RunEvaluator,
    ScoringModels,
    names_of,
)
from flatlora_diffusion.compare.losses import UNGROUPED, ImageSet, LossEvaluator, groups_of
from flatlora_diffusion.compare.pictures import PictureGenerator
from flatlora_diffusion.config import INCLUDED_BASES, SAMPLES, CompareConfig, ConfigError, TrainConfig
from flatlora_diffusion.data.dataset import Sample, load_samples
from flatlora_diffusion.data.images import HELDOUT_FOLDER, load_image
from flatlora_diffusion.data.prompts import read_prompts
from flatlora_diffusion.data.sources import check_folders_apart, check_not_trained_on, load_heldout, load_training_set
from flatlora_diffusion.evaluation.encoders import JUDGE, centre_square, load_encoder
from flatlora_diffusion.evaluation.judge import load_judge
from flatlora_diffusion.evaluation.perceptual import load_lpips
from flatlora_diffusion.families.base import Base
from flatlora_diffusion.families.device import DTYPES
from flatlora_diffusion.families.registry import family_of, load_base
from flatlora_diffusion.storage.separate_folders import check_separate

DRAWS = {TRAIN: 4, HELDOUT: 2, FORGETTING: 2}  # (noise, timestep) pairs of each image
SAMPLE_ICONS, FLAT_ICONS = SAMPLES / "icons_3d", SAMPLES / "icons_flat"


@dataclass(frozen=True)
class Inputs:
    """The inputs that are read before the first training."""

    summary: str
    sets: dict[str, ImageSet]
    prompts: PromptSets
    heldout: Path
    scoring_models: ScoringModels


def read_inputs(config: TrainConfig, options: CompareConfig) -> Inputs:
    """Read the images and prompts that the arms are measured with.

    Raises:
        ConfigError: Inputs are missing, held-out images are trained on, or --output_dir overlaps with images.
    """
    for name, is_set, reason in (
        (
            "train_text_encoder_ti",
            config.tokens.train_text_encoder_ti,
            "the base does not know new tokens in captions",
        ),
        ("push_to_hub", config.run.push_to_hub, "every arm and control would be uploaded"),
    ):
        if is_set:
            raise ConfigError(f"{name} cannot be used in a comparison: {reason}; omit it")
    heldout = _heldout_folder(config, options)
    folders = {HELDOUT: heldout}
    forgetting = options.forgetting_dir or (FLAT_ICONS if _uses_sample_icons(config) else None)
    if forgetting is not None:
        folders[FORGETTING] = Path(forgetting)
    check_folders_apart(config)
    for name, folder in folders.items():
        check_separate("output_dir", Path(config.run.output_dir), f"{name}_dir", [folder])
    training_set = load_training_set(config.data)
    summary, training = training_set.summary, training_set.samples
    sets = {TRAIN: ImageSet(training, [UNGROUPED] * len(training), DRAWS[TRAIN])}
    for name, folder in folders.items():
        samples = (load_heldout(folder, config.data) if name == HELDOUT else load_samples(folder)).samples
        sets[name] = ImageSet(samples, groups_of(folder, samples), DRAWS[name])
    check_not_trained_on(sets[HELDOUT].samples, training, "are")
    prompts = _prompts(config, options, heldout, sets[HELDOUT].samples)
    return Inputs(summary, sets, prompts, heldout, _scoring_models(options))


def load_evaluator(config: TrainConfig, runs: Sequence[PlannedRun], inputs: Inputs) -> tuple[RunEvaluator, Base]:
    """Load the base and build the evaluator of `runs`, on the GPU if there is one.

    Results are cached below `output_dir`, separately for each way to load the base.
    """
    folder = Path(config.run.output_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = dataclasses.replace(config.model, quantize_base=None, offload=False)
    base = load_base(model, device, DTYPES[config.optim.precision_of_base])
    resolution = config.data.resolution or base.resolution
    background = config.data.background_color
    cache = _measurement_hash(config)
    loss_evaluator = LossEvaluator(
        base,
        base.objective(config.objective).unweighted(),
        inputs.sets,
        resolution,
        folder / "measured" / cache,
        background,
        any(planned.config.adapter.train_text_encoder for planned in runs),
    )
    generator = PictureGenerator(base, resolution, folder / "pictures" / cache, guidance=inputs.prompts.guidance)
    prompts = dataclasses.replace(inputs.prompts, guidance=generator.guidance)
    training = [_at_training_resolution(sample, background, resolution) for sample in inputs.sets[TRAIN].samples]
    drawn = [sample for sample in inputs.sets[HELDOUT].samples if sample.caption in inputs.prompts.style]
    heldout = {sample.caption: _at_training_resolution(sample, background, resolution) for sample in drawn}
    names = names_of(inputs.heldout, inputs.sets[HELDOUT].samples)
    return RunEvaluator(loss_evaluator, generator, prompts, inputs.scoring_models, training, heldout, names), base


def free_gpu_memory() -> None:
    """Release the GPU memory of a deleted evaluator."""
    gc.collect()
    torch.cuda.empty_cache()


def _scoring_models(options: CompareConfig) -> ScoringModels:
    """Load the models that score pictures, on the CPU to leave the GPU to the training."""
    encoders = [load_encoder(name) for name in options.encoders]
    judge = load_judge(SAMPLES / "tiny_sdxl" / "judge") if JUDGE in options.encoders else None
    return ScoringModels(encoders, judge, load_lpips() if options.lpips else None)


def _measurement_hash(config: TrainConfig) -> str:
    """A short hash of the settings of the base and of the objective."""
    settings = [asdict(config.model), asdict(config.objective), config.optim.precision_of_base]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]


def _heldout_folder(config: TrainConfig, options: CompareConfig) -> Path:
    if options.heldout_dir is not None:
        return Path(options.heldout_dir)
    if _uses_sample_icons(config):
        return SAMPLE_ICONS / HELDOUT_FOLDER
    raise ConfigError(
        "heldout_dir is missing: give a folder of captioned images of the style that are not trained on, which show "
        "whether a LoRA generalizes"
    )


def _uses_sample_icons(config: TrainConfig) -> bool:
    images = config.data.instance_data_dir
    return images is not None and Path(images).resolve() == SAMPLE_ICONS.resolve()


def _prompts(config: TrainConfig, options: CompareConfig, heldout: Path, samples: Sequence[Sample]) -> PromptSets:
    file = Path(options.prompts_file) if options.prompts_file else heldout / "prompts.txt"
    style = _read_lines(file) if options.prompts_file or file.is_file() else [sample.caption for sample in samples]
    is_tiny = config.model.pretrained_model_name_or_path in INCLUDED_BASES
    default = SAMPLES / "prompts" / ("unrelated_tiny.txt" if is_tiny else "unrelated_sdxl.txt")
    unrelated = _read_lines(Path(options.unrelated_prompts_file) if options.unrelated_prompts_file else default)
    return PromptSets(
        tuple(dict.fromkeys(style))[: options.num_prompts],
        tuple(dict.fromkeys(unrelated))[: options.num_prompts],
        tuple(range(options.pictures_per_prompt)),
        family_of(config.model).guidance if options.guidance_scale is None else options.guidance_scale,
    )


def _read_lines(file: Path) -> list[str]:
    prompts = read_prompts(file)
    if not prompts:
        raise ConfigError(f"{str(file)!r} is empty: give a text file with one prompt per line")
    return prompts


def _at_training_resolution(sample: Sample, background: str, resolution: int) -> Image.Image:
    """Crop and resize an image to the resolution of the pictures that it is compared with."""
    image = centre_square(load_image(sample.source, background))
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS)
