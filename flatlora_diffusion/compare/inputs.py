"""The material of a comparison: image sets, prompts, encoders, and the evaluator that holds them."""

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
from flatlora_diffusion.config import SAMPLES, TINY, CompareConfig, ConfigError, TrainConfig
from flatlora_diffusion.data.dataset import Sample, load_samples
from flatlora_diffusion.data.image_folders import check_folders_apart
from flatlora_diffusion.data.images import HELDOUT_FOLDER, load_image
from flatlora_diffusion.data.prompts import read_prompts
from flatlora_diffusion.data.sources import check_not_trained_on, load_heldout, load_training_set
from flatlora_diffusion.evaluation.encoders import JUDGE, centre_square, load_encoder
from flatlora_diffusion.evaluation.judge import load_judge
from flatlora_diffusion.evaluation.perceptual import load_lpips
from flatlora_diffusion.sdxl.device import DTYPES
from flatlora_diffusion.sdxl.objective import objective_of, unweighted
from flatlora_diffusion.sdxl.pipeline import Sdxl, load_sdxl
from flatlora_diffusion.storage.separate_folders import check_separate

DRAWS = {TRAIN: 4, HELDOUT: 2, FORGETTING: 2}  # (noise, timestep) pairs of each image
SAMPLE_ICONS, FLAT_ICONS = SAMPLES / "icons_3d", SAMPLES / "icons_flat"


@dataclass(frozen=True)
class Material:
    """Everything that was read before the first run is trained."""

    summary: str
    sets: dict[str, ImageSet]
    prompts: PromptSets
    heldout: Path
    scoring_models: ScoringModels


def read_material(config: TrainConfig, own: CompareConfig) -> Material:
    """The images and prompts that the arms are measured with.

    Raises ConfigError for what is missing, held-out images that are trained on and an --output_dir amid images.
    """
    for name, is_set, why in (
        (
            "train_text_encoder_ti",
            config.tokens.train_text_encoder_ti,
            "captions with new tokens mean nothing to the base",
        ),
        ("push_to_hub", config.run.push_to_hub, "every arm and null would be uploaded"),
    ):
        if is_set:
            raise ConfigError(f"{name} cannot be used in a comparison: {why}; leave it out")
    heldout = _heldout_folder(config, own)
    folders = {HELDOUT: heldout}
    forgetting = own.forgetting_dir or (FLAT_ICONS if _are_sample_icons(config) else None)
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
    prompts = _prompts(config, own, heldout, sets[HELDOUT].samples)
    return Material(summary, sets, prompts, heldout, _scoring_models(own))


def load_evaluator(config: TrainConfig, runs: Sequence[PlannedRun], material: Material) -> tuple[RunEvaluator, Sdxl]:
    """The evaluator of `runs`, on the GPU if there is one, and its base.

    What is measured and drawn is kept below `output_dir`, apart for each way to load the base.
    """
    folder = Path(config.run.output_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = dataclasses.replace(config.model, quantize_base=None, offload=False)
    sdxl = load_sdxl(model, device, DTYPES[config.optim.precision_of_base])
    resolution = config.data.resolution or sdxl.resolution
    background = config.data.background_color
    identity = _identity(config)
    loss_evaluator = LossEvaluator(
        sdxl,
        unweighted(objective_of(config.objective, sdxl.scheduler)),
        material.sets,
        resolution,
        folder / "measured" / identity,
        background,
        any(planned.config.adapter.train_text_encoder for planned in runs),
    )
    generator = PictureGenerator(sdxl, resolution, folder / "pictures" / identity, guidance=material.prompts.guidance)
    training = [_as_seen(sample, background, resolution) for sample in material.sets[TRAIN].samples]
    drawn = [sample for sample in material.sets[HELDOUT].samples if sample.caption in material.prompts.style]
    heldout = {sample.caption: _as_seen(sample, background, resolution) for sample in drawn}
    names = names_of(material.heldout, material.sets[HELDOUT].samples)
    return RunEvaluator(
        loss_evaluator, generator, material.prompts, material.scoring_models, training, heldout, names
    ), sdxl


def free_device() -> None:
    """Give the GPU's memory back that an evaluator held which nobody needs any more."""
    gc.collect()
    torch.cuda.empty_cache()


def _scoring_models(own: CompareConfig) -> ScoringModels:
    """The models that look at pictures: on the CPU, so that training has the GPU for itself."""
    encoders = [load_encoder(name) for name in own.encoders]
    judge = load_judge(SAMPLES / "tiny_sdxl" / "judge") if JUDGE in own.encoders else None
    return ScoringModels(encoders, judge, load_lpips() if own.lpips else None)


def _identity(config: TrainConfig) -> str:
    """A short hash of how the base is loaded and what it is asked to predict."""
    settings = [asdict(config.model), asdict(config.objective), config.optim.precision_of_base]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]


def _heldout_folder(config: TrainConfig, own: CompareConfig) -> Path:
    if own.heldout_dir is not None:
        return Path(own.heldout_dir)
    if _are_sample_icons(config):
        return SAMPLE_ICONS / HELDOUT_FOLDER
    raise ConfigError(
        "heldout_dir is missing: give a folder of captioned images of the style that are not trained on; "
        "whether a LoRA generalizes shows on those alone"
    )


def _are_sample_icons(config: TrainConfig) -> bool:
    images = config.data.instance_data_dir
    return images is not None and Path(images).resolve() == SAMPLE_ICONS.resolve()


def _prompts(config: TrainConfig, own: CompareConfig, heldout: Path, samples: Sequence[Sample]) -> PromptSets:
    file = Path(own.prompts_file) if own.prompts_file else heldout / "prompts.txt"
    style = _lines(file) if own.prompts_file or file.is_file() else [sample.caption for sample in samples]
    is_tiny = config.model.pretrained_model_name_or_path == TINY
    ours = SAMPLES / "prompts" / ("unrelated_tiny.txt" if is_tiny else "unrelated_sdxl.txt")
    unrelated = _lines(Path(own.unrelated_prompts_file) if own.unrelated_prompts_file else ours)
    most = own.num_prompts
    return PromptSets(
        tuple(dict.fromkeys(style))[:most],
        tuple(dict.fromkeys(unrelated))[:most],
        tuple(range(own.pictures_per_prompt)),
        own.guidance_scale,
    )


def _lines(file: Path) -> list[str]:
    prompts = read_prompts(file)
    if not prompts:
        raise ConfigError(f"{str(file)!r} is empty: give a text file with one prompt per line")
    return prompts


def _as_seen(sample: Sample, background: str, resolution: int) -> Image.Image:
    """A training image at the resolution of the pictures that it is compared with."""
    image = centre_square(load_image(sample.source, background))
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS)
