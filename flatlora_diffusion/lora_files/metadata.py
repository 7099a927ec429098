"""The kohya file's metadata: the keys that web UIs and model sites read, and hashes of the file's contents.

It contains no directory, caption or path: a base is named by its hub id or file name, settings and images by hashes.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from flatlora_diffusion.config import INCLUDED_BASES, AdapterConfig, TrainConfig
from flatlora_diffusion.families.labels import Labels
from flatlora_diffusion.lora_files.kohya import KOHYA_PREFIXES
from flatlora_diffusion.storage.atomic_io import file_sha256
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.storage.tensor_io import Contents, header_bytes

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# Keys that are wrong in another file with the same LoRA, or that are private to the file's author.
_NOT_PORTABLE = re.compile(
    r"lora_adapter_metadata|ss_network_(dim|alpha)|sshs_(model|legacy)_hash|modelspec\.hash_sha256"
    r"|ss_(reg_)?dataset_dirs|ss_datasets|ss_tag_frequency|ss_bucket_info|ot_.*"
)
# A URL such as https://... or a tag such as </b> does not match.
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/(?!\w+>)[\w.~-]|(?<=\w:)/(?!/)|file://|\b[A-Za-z]:[\\/](?!/)|\\\\\w+\\")
_LEGACY_START, LEGACY_END = 0x100000, 0x110000
_DOWN = (".lora_down.weight", ".lora_A.weight")
SDXL_CLIP_SKIP = 2  # other tools call the last layer 1; SDXL uses the penultimate layer
MODELSPEC = "1.0.1"
# Metadata of every kohya file written here.
KOHYA_FACTS = {"ss_v2": "False", "ss_network_module": "networks.lora"}


@dataclass(frozen=True)
class TrainingSummary:
    """The base, and the state of the run when the file is written.

    Attributes:
        base: The base's hub id or file name; None for a folder.
        average: The members of the average, for a run with --members.
        conversion_note: The source of a plain LoRA made of a DoRA or of full fine-tuning, and the share it misses.
    """

    base: str | None
    labels: Labels
    step: int
    epoch: int
    images: int
    class_images: int
    trigger: str
    predicts_v: bool
    zero_terminal_snr: bool
    average: str = ""
    conversion_note: str = ""


def kohya_metadata(run: RunDir, config: TrainConfig, training: TrainingSummary, now: datetime) -> dict[str, str]:
    """Collect all keys except those that `with_content_keys` adds; `config` has its resolution and steps resolved."""
    data, optim, objective = config.data, config.optim, config.objective
    has_text, said = (
        config.adapter.train_text_encoder,
        training_comment(config, training.average, training.conversion_note),
    )
    title, is_flow = run.lora_name(config.run.output_name), training.labels.is_flow
    values: dict[str, Any] = {
        "format": "pt",
        # A1111, Forge and SD.Next assume SD 1 without this key.
        "ss_base_model_version": training.labels.version,
        **({} if is_flow else KOHYA_FACTS),
        "modelspec.implementation": training.labels.implementation,
        "ss_output_name": title,
        "ss_sd_model_name": training.base,
        "ss_resolution": f"({data.resolution}, {data.resolution})",
        "ss_steps": training.step,
        "ss_max_train_steps": optim.max_train_steps,
        "ss_epoch": training.epoch,
        "ss_learning_rate": optim.learning_rate,
        "ss_unet_lr": optim.learning_rate,
        "ss_text_encoder_lr": optim.text_encoder_lr if has_text else None,
        "ss_optimizer": optim.optimizer,
        "ss_lr_scheduler": optim.lr_scheduler,
        "ss_lr_warmup_steps": optim.lr_warmup_steps,
        "ss_total_batch_size": optim.train_batch_size * optim.gradient_accumulation_steps,
        "ss_gradient_checkpointing": optim.gradient_checkpointing,
        "ss_gradient_accumulation_steps": optim.gradient_accumulation_steps,
        "ss_max_grad_norm": optim.max_grad_norm,
        "ss_mixed_precision": optim.mixed_precision,
        "ss_seed": config.run.seed,
        "ss_clip_skip": None if is_flow else SDXL_CLIP_SKIP + (config.model.clip_skip or 0),
        "ss_num_train_images": training.images * data.repeats,
        "ss_num_reg_images": training.class_images,
        "ss_prior_loss_weight": objective.prior_loss_weight if data.with_prior_preservation else None,
        "ss_min_snr_gamma": objective.snr_gamma,
        "ss_debiased_estimation": None if is_flow else objective.debiased_estimation,
        "ss_noise_offset": None if is_flow else objective.noise_offset,
        "ss_v_parameterization": None if is_flow else training.predicts_v,
        "ss_zero_terminal_snr": None if is_flow else training.zero_terminal_snr,
        "ss_weighting_scheme": objective.weighting_scheme if is_flow else None,
        "ss_training_started_at": run.manifest_file.stat().st_mtime,  # the manifest is written once, at the start
        "ss_training_finished_at": now.timestamp(),
        "ss_training_comment": said,
        "modelspec.sai_model_spec": MODELSPEC,
        "modelspec.architecture": training.labels.architecture,
        "modelspec.title": title,
        "modelspec.description": said,
        "modelspec.date": now.replace(microsecond=0).isoformat(),
        "modelspec.resolution": f"{data.resolution}x{data.resolution}",
        "modelspec.prediction_type": None if is_flow else "v" if training.predicts_v else "epsilon",
        "modelspec.trigger_phrase": training.trigger,
        "modelspec.usage_hint": f"Write {training.trigger} in the prompt." if training.trigger else None,
        "flatlora.config_sha256": file_sha256(run.config_file),
        "flatlora.manifest_sha256": file_sha256(run.manifest_file),
    }
    return {name: str(value) for name, value in values.items() if value is not None and value != ""}


def with_content_keys(metadata: Mapping[str, str], contents: Contents) -> dict[str, str]:
    """Add the rank, the alpha and the hashes of the tensors as the file will contain them.

    Rank and alpha are the most common pair in the UNet, or in all parts without a UNet. `sshs_model_hash` is the
    sha256 of everything after the header; `sshs_legacy_hash` the first 8 digits of the sha256 of 64 KiB from 1 MiB on,
    in a file with no metadata except `ss_*`. `contents.first` must reach that far.
    """
    whole = dict(metadata)
    whole["ss_network_dim"], whole["ss_network_alpha"] = _rank_and_alpha(contents)
    whole["sshs_model_hash"] = contents.sha256
    ss_keys = {name: value for name, value in whole.items() if name.startswith("ss_")}
    legacy = (header_bytes(contents.entries, ss_keys) + contents.first)[_LEGACY_START:LEGACY_END]
    whole["sshs_legacy_hash"] = hashlib.sha256(legacy).hexdigest()[:8]
    whole["modelspec.hash_sha256"] = f"0x{whole['sshs_model_hash']}"
    return whole


def _rank_and_alpha(contents: Contents) -> tuple[str, str]:
    names = [name for name in contents.entries if name.endswith(_DOWN)]
    of_unet = [name for name in names if name.startswith(f"{KOHYA_PREFIXES['unet']}_")]
    pairs = []
    for name in of_unet or names:
        rank = contents.entries[name]["shape"][0]
        key = f"{name.removesuffix('.weight').rpartition('.')[0]}.alpha"
        pairs.append((rank, contents.numbers.get(key, float(rank))))  # without an alpha the scale is in the factors
    rank, alpha = Counter(pairs).most_common(1)[0][0]
    return str(rank), str(alpha)


def portable_metadata(metadata: Mapping[str, str], name: str, labels: Labels) -> dict[str, str]:
    """Select the metadata that remain valid in another file with the same LoRA, which is called `name`.

    Drops a base version that contradicts `labels`, folders of file names, any value with an absolute path, and
    everything about the training images.
    """
    selected = {}
    for key, value in metadata.items():
        is_name = key.startswith("ss_") and key.endswith("_name") and not is_hub_id(value)
        text = re.split(r"[\\/]", value.rstrip("\\/"))[-1] if is_name else value
        # The base64 of a picture in the metadata may contain slashes.
        if not _NOT_PORTABLE.fullmatch(key) and (text.startswith("data:image/") or not _ABSOLUTE_PATH.search(text)):
            selected[key] = text
    start = f"{labels.version.split('_')[0]}_"  # SDXL has several versions
    if not selected.get("ss_base_model_version", start).startswith(start):
        del selected["ss_base_model_version"]
    return {**selected, "format": "pt", "ss_output_name": name, "modelspec.title": name}


def sidecar(config: TrainConfig, training: TrainingSummary, notes: Sequence[str]) -> dict[str, Any]:
    """Build the JSON beside the kohya file that A1111, Forge and InvokeAI read."""
    return {
        "description": training_comment(config, training.average, training.conversion_note),
        "sd version": training.labels.sidecar,
        "activation text": training.trigger,
        "preferred weight": 1.0,
        "notes": " ".join([f"{training.step} steps, seed {config.run.seed}.", *notes]),
    }


def training_comment(config: TrainConfig, *more: str) -> str:
    """Describe the training in one line: method, sigma or rho, kind of draw, then `more`."""
    perturb = config.perturb
    parts = [f"flatlora-diffusion: method {perturb.method}"]
    if perturb.draws_noise:
        parts.append(f"sigma {perturb.effective_sigma:g}, {perturb.sigma_schedule} schedule")
        parts.append(f"{perturb.perturb_draw.replace('_', '-')} draws")
    elif perturb.effective_rho:
        parts.append(f"rho {perturb.effective_rho:g}")
    return ", ".join(filter(None, [*parts, *more]))


def conversion_note(adapter: AdapterConfig, missed: float) -> str:
    """Say in the file for other tools that its plain LoRA approximates another adapter; empty if it is exact."""
    if not missed:
        return ""
    source = "full fine-tuning" if adapter.adapter == "full" else "a DoRA"
    share = f"{100 * missed:.1f}" if missed >= 0.0005 else "less than 0.1"
    return f"a plain LoRA made of {source}, missing {share} % of its effect"


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form OWNER/NAME."""
    return bool(_HUB_ID.fullmatch(name))


def portable_base_name(config: TrainConfig) -> str | None:
    """The base's hub id or file name; None for a folder, whose name is private."""
    name = config.model.pretrained_model_name_or_path
    path = Path(name)
    if name in INCLUDED_BASES or (is_hub_id(name) and not path.exists()):
        return name
    return None if path.is_dir() else path.name
