"""`flatness`: measures the base and finished runs around their merged weights.

flatness.json     all results, the settings, versions and the hash of each LoRA file
flatness.md       the tables
rise.png          expected loss increase by sigma, under noise of Eq. 7
slices.png        the loss along random directions, mean and standard error
surface.png       filled contours of the loss over two random directions; surface.html: the same, interactive
strength.png      the loss by the strength of the LoRA
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flatlora_diffusion.adapter.new_tokens import new_tokens, replace_in_captions
from flatlora_diffusion.config import ConfigError, FlatnessConfig, ModelConfig, TrainConfig
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.data.sources import check_not_trained_on, image_folders, load_heldout, load_training_set
from flatlora_diffusion.evaluation.finished_runs import FinishedRun, check_images, read_runs
from flatlora_diffusion.evaluation.probe import Probe, fixed_probe
from flatlora_diffusion.families.base import Base
from flatlora_diffusion.families.paths import base_given_as
from flatlora_diffusion.families.registry import base_title, load_base
from flatlora_diffusion.flatness.landscape import axis
from flatlora_diffusion.flatness.measure import HELDOUT, TRAIN, FlatnessFigures, MeasuredModel, measure_flatness
from flatlora_diffusion.flatness.merged_weights import base_weights, lora_deltas
from flatlora_diffusion.flatness.perturbed_models import OtherModels
from flatlora_diffusion.flatness.plots import RESULT, check_result_folder
from flatlora_diffusion.flatness.run_charts import write_charts
from flatlora_diffusion.flatness.tables import markdown_tables
from flatlora_diffusion.lora_files.loading import loras_loaded
from flatlora_diffusion.lora_files.paths import LoraFile, parse_lora
from flatlora_diffusion.storage.atomic_io import check_writable, write_json, write_text
from flatlora_diffusion.storage.saved_config import portable
from flatlora_diffusion.storage.separate_folders import check_separate
from flatlora_diffusion.storage.versions import versions

logger = logging.getLogger(__name__)

BASE = "Base"


def flatness(config: FlatnessConfig) -> Path:
    """Measure the runs and their base and write all files; returns the folder.

    W' are weights of the UNet in fp32; text encoders and new tokens of a run only encode the captions. Raises
    ConfigError for invalid input, before anything is measured.
    """
    runs, folder = read_runs(config.runs), Path(config.output_dir)
    check_writable(folder, "output_dir")
    check_result_folder(folder, "output_dir")
    first = _with_given_paths(runs[0].config, config)
    logger.info("base: %s", base_title(first.model))
    _check_apart(folder, first, config)
    images = _images(runs[0], first, config)
    model = dataclasses.replace(first.model, quantize_base=None, offload=False)
    base = load_base(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32)
    models = _models(base, runs, first, images, config)
    others = _other_models(base, config)
    names = {name: None for deltas in (*(model.deltas for model in models), others.second_lora) for name in deltas}
    weights = base_weights(base.denoiser, names)
    objective = base.objective(first.objective).unweighted()
    figures = [measure_flatness(base, objective, weights, model, config, others) for model in models]
    folder.mkdir(parents=True, exist_ok=True)
    facts = _facts(config, runs, base, images, sum(weight.numel() for weight in weights.values()))
    _write(folder, config, first.model, figures, facts)
    return folder


def _with_given_paths(config: TrainConfig, given: FlatnessConfig) -> TrainConfig:
    if given.pretrained_model_name_or_path is not None:
        config = config.replace(pretrained_model_name_or_path=given.pretrained_model_name_or_path)
    if given.instance_data_dir is not None:
        config = config.replace(instance_data_dir=given.instance_data_dir, dataset_name=None)
    return config


def _check_apart(folder: Path, config: TrainConfig, given: FlatnessConfig) -> None:
    """Raise ConfigError if the output folder is an image folder, whose images the charts would join."""
    folders = image_folders(config)
    if given.heldout_dir is not None:
        folders["heldout_dir"] = [Path(given.heldout_dir)]
    for name, images in folders.items():
        check_separate("output_dir", folder, name, images, ("is",))


def _images(run: FinishedRun, config: TrainConfig, given: FlatnessConfig) -> dict[str, list[Sample]]:
    training = load_training_set(config.data)
    check_images(run, training)
    images = {TRAIN: training.samples}
    if given.heldout_dir is not None:
        images[HELDOUT] = load_heldout(Path(given.heldout_dir), config.data).samples
        check_not_trained_on(images[HELDOUT], images[TRAIN], "were")
    return images


def _models(
    base: Base,
    runs: Sequence[FinishedRun],
    config: TrainConfig,
    images: Mapping[str, list[Sample]],
    given: FlatnessConfig,
) -> list[MeasuredModel]:
    """Return the base and each run; all files are read before anything is measured."""
    resolution = config.data.resolution or base.resolution

    def probes(tokens: Mapping[str, list[str]]) -> dict[str, Probe]:
        return {
            kind: fixed_probe(
                base,
                replace_in_captions(samples, tokens),
                resolution,
                given.seed,
                given.probe_draws,
                config.data.background_color,
            )
            for kind, samples in images.items()
        }

    models = [MeasuredModel(BASE, {}, probes({}))]
    for run in runs:
        tokens = new_tokens(run.config.tokens) if run.config.tokens.train_text_encoder_ti else {}
        with loras_loaded(base.pipeline, [LoraFile(run.lora)]):
            models.append(MeasuredModel(run.name, lora_deltas(base.denoiser), probes(tokens)))
    return models


def _other_models(base: Base, given: FlatnessConfig) -> OtherModels:
    """Load the second LoRA and the other base, if given; the probes are of the first base."""
    second_lora, other_base = {}, {}
    if given.second_lora is not None:
        files = parse_lora(given.second_lora)
        if len(files) > 1:
            raise ConfigError(f"second_lora={given.second_lora!r} names {len(files)} files; give only one")
        with loras_loaded(base.pipeline, files):
            second_lora = lora_deltas(base.denoiser)
    if given.other_base is not None:
        with base_given_as("other_base"):
            other = load_base(ModelConfig(given.other_base), base.denoiser.device, torch.float32).denoiser
        shapes = {name: weight.shape for name, weight in base.denoiser.named_parameters()}
        if {name: weight.shape for name, weight in other.named_parameters()} != shapes:
            raise ConfigError(f"other_base={given.other_base!r} has other layers than the base of the runs")
        other_base = base_weights(other, shapes)
    return OtherModels(second_lora, other_base)


def _facts(
    config: FlatnessConfig, runs: Sequence[FinishedRun], base: Base, images: Mapping[str, list[Sample]], weights: int
) -> dict[str, Any]:
    """Return all that the results depend on."""
    settings = portable(dataclasses.asdict(config)) | {"runs": [run.name for run in runs]}
    for name in ("heldout_dir", "second_lora", "other_base"):
        settings[name] = None if settings[name] is None else Path(settings[name]).name
    run_facts = {
        run.name: {
            "sha256": run.sha256,
            "method": run.config.perturb.method,
            "sigma": run.config.perturb.effective_sigma,
            "rank": run.config.adapter.rank,
            "max_train_steps": run.config.optim.max_train_steps,
            "seed": run.config.run.seed,
        }
        for run in runs
    }
    return {
        "settings": settings,
        "base": portable(dataclasses.asdict(runs[0].config.model)),
        "runs": run_facts,
        "probe_samples": {kind: len(samples) * config.probe_draws for kind, samples in images.items()},
        "weights": weights,
        "axis": axis(config.extent, config.surface_points),
        "device": str(base.denoiser.device),
        "versions": versions(),
    }


def _write(
    folder: Path,
    config: FlatnessConfig,
    model: ModelConfig,
    figures: Sequence[FlatnessFigures],
    facts: Mapping[str, Any],
) -> None:
    result = {**facts, "figures": [dataclasses.asdict(model) for model in figures]}
    write_json(folder / RESULT, result)
    base = base_title(ModelConfig(**portable(dataclasses.asdict(model))))
    write_text(folder / "flatness.md", f"base: {base}\n\n{markdown_tables(figures, config)}\n")
    write_charts(folder, config, figures, facts)
