"""The kohya file's metadata: the keys that web UIs and model sites read, and hashes of the file's contents.

No directory, caption or path is in it: a base is named by its hub id or file, settings and images by hashes.
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

from flatlora_diffusion.config import TINY, AdapterConfig, TrainConfig
from flatlora_diffusion.lora_files.kohya import KOHYA_PREFIXES
from flatlora_diffusion.sdxl.family import Family
from flatlora_diffusion.storage.atomic_io import file_sha256
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.storage.tensor_io import Contents, header_bytes

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# Of a file's metadata: what does not hold for another file with the same LoRA, and what is its maker's own affair.
_STALE = re.compile(
    r"lora_adapter_metadata|ss_network_(dim|alpha)|sshs_(model|legacy)_hash|modelspec\.hash_sha256"
    r"|ss_(reg_)?dataset_dirs|ss_datasets|ss_tag_frequency|ss_bucket_info|ot_.*"
)
# Neither an address such as https://... nor a tag such as </b> is one.
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/(?!\w+>)[\w.~-]|(?<=\w:)/(?!/)|file://|\b[A-Za-z]:[\\/](?!/)|\\\\\w+\\")
_LEGACY_START, LEGACY_END = 0x100000, 0x110000
_DOWN = ".lora_down.weight"
SDXL_CLIP_SKIP = 2  # others count from the last layer, which is 1; SDXL's own choice is the one before
MODELSPEC = "1.0.1"
# What is so of every kohya file that is written here, whatever it was made of.
KOHYA_FACTS = {
    "ss_v2": "False",
    "ss_network_module": "networks.lora",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
}


@dataclass(frozen=True)
class Training:
    """What the base is, and the state of the run when the file is written.

    The base's name is a hub id or a file's name; None for a folder's.
    """

    base: str | None
    family: Family
    step: int
    epoch: int
    images: int
    class_images: int
    trigger: str
    predicts_v: bool
    zero_terminal_snr: bool
    average: str = ""  # what it is the average of, for a run with --members
    folded: str = ""  # what the plain LoRA was made of and misses, for a DoRA and for full fine-tuning


def kohya_metadata(run: RunDir, config: TrainConfig, training: Training, now: datetime) -> dict[str, str]:
    """All keys but those that `with_contents` adds. `config` has its resolution and steps settled."""
    data, optim, objective = config.data, config.optim, config.objective
    has_text, said = config.adapter.train_text_encoder, comment(config, training.average, training.folded)
    title = run.lora_name(config.run.output_name)
    values: dict[str, Any] = {
        "format": "pt",
        # A1111, Forge and SD.Next take a file without this for one of SD 1.
        "ss_base_model_version": training.family.version,
        **KOHYA_FACTS,
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
        "ss_clip_skip": SDXL_CLIP_SKIP + (config.model.clip_skip or 0),
        "ss_num_train_images": training.images * data.repeats,
        "ss_num_reg_images": training.class_images,
        "ss_prior_loss_weight": objective.prior_loss_weight if data.with_prior_preservation else None,
        "ss_min_snr_gamma": objective.snr_gamma,
        "ss_debiased_estimation": objective.debiased_estimation,
        "ss_noise_offset": objective.noise_offset,
        "ss_v_parameterization": training.predicts_v,
        "ss_zero_terminal_snr": training.zero_terminal_snr,
        "ss_training_started_at": run.manifest_file.stat().st_mtime,  # it is written once, at the start
        "ss_training_finished_at": now.timestamp(),
        "ss_training_comment": said,
        "modelspec.sai_model_spec": MODELSPEC,
        "modelspec.architecture": training.family.architecture,
        "modelspec.title": title,
        "modelspec.description": said,
        "modelspec.date": now.replace(microsecond=0).isoformat(),
        "modelspec.resolution": f"{data.resolution}x{data.resolution}",
        "modelspec.prediction_type": "v" if training.predicts_v else "epsilon",
        "modelspec.trigger_phrase": training.trigger,
        "modelspec.usage_hint": f"Write {training.trigger} in the prompt." if training.trigger else None,
        "flatlora.config_sha256": file_sha256(run.config_file),
        "flatlora.manifest_sha256": file_sha256(run.manifest_file),
    }
    return {name: str(value) for name, value in values.items() if value is not None and value != ""}


def with_contents(metadata: Mapping[str, str], contents: Contents) -> dict[str, str]:
    """`metadata` with a rank and its alpha, and the hashes of the tensors as a file will hold them.

    Both are those of most layers of the UNet, or of all where it has none: a tool shows them as the file's.

    `sshs_model_hash` is the sha256 of everything behind the header; `sshs_legacy_hash` the first 8 digits of that of
    64 KiB from 1 MiB on, of a file with no other metadata than `ss_*`. `contents` has as many of its first bytes.
    """
    whole = dict(metadata)
    whole["ss_network_dim"], whole["ss_network_alpha"] = _rank_and_alpha(contents)
    whole["sshs_model_hash"] = contents.sha256
    own = {name: value for name, value in whole.items() if name.startswith("ss_")}
    legacy = (header_bytes(contents.entries, own) + contents.first)[_LEGACY_START:LEGACY_END]
    whole["sshs_legacy_hash"] = hashlib.sha256(legacy).hexdigest()[:8]
    whole["modelspec.hash_sha256"] = f"0x{whole['sshs_model_hash']}"
    return whole


def _rank_and_alpha(contents: Contents) -> tuple[str, str]:
    names = [name.removesuffix(_DOWN) for name in contents.entries if name.endswith(_DOWN)]
    of_unet = [name for name in names if name.startswith(f"{KOHYA_PREFIXES['unet']}_")]
    pairs = Counter(
        (contents.entries[name + _DOWN]["shape"][0], contents.numbers[f"{name}.alpha"]) for name in of_unet or names
    )
    rank, alpha = pairs.most_common(1)[0][0]
    return str(rank), str(alpha)


def kept_metadata(metadata: Mapping[str, str], name: str, family: Family) -> dict[str, str]:
    """The metadata of a file that hold for another file with the same LoRA, which is called `name`, too.

    The base is that of the LoRA's shapes, whatever a wrong entry says. Names of files are kept without their folders,
    anything else with an absolute path in it is not, and nothing of the images that it was trained on.
    """
    kept = {}
    for key, value in metadata.items():
        is_name = key.startswith("ss_") and key.endswith("_name") and not is_hub_id(value)
        text = re.split(r"[\\/]", value.rstrip("\\/"))[-1] if is_name else value
        # A picture in the metadata is base64, in which there are slashes.
        if not _STALE.fullmatch(key) and (text.startswith("data:image/") or not _ABSOLUTE_PATH.search(text)):
            kept[key] = text
    start = f"{family.version.split('_')[0]}_"  # of SDXL there are several versions
    if not kept.get("ss_base_model_version", start).startswith(start):
        del kept["ss_base_model_version"]
    return {**kept, "format": "pt", "ss_output_name": name, "modelspec.title": name}


def sidecar(config: TrainConfig, training: Training, notes: Sequence[str]) -> dict[str, Any]:
    """The JSON beside the kohya file that A1111, Forge and InvokeAI read."""
    return {
        "description": comment(config, training.average, training.folded),
        "sd version": training.family.sidecar,
        "activation text": training.trigger,
        "preferred weight": 1.0,
        "notes": " ".join([f"{training.step} steps, seed {config.run.seed}.", *notes]),
    }


def comment(config: TrainConfig, *more: str) -> str:
    """How it was trained, in a line: the method, sigma and the kind of draw where there are any, and `more`."""
    perturb = config.perturb
    said = [f"flatlora-diffusion: method {perturb.method}"]
    if perturb.draws_noise:
        said.append(f"sigma {perturb.effective_sigma:g}, {perturb.sigma_schedule} schedule")
        said.append(f"{perturb.perturb_draw.replace('_', '-')} draws")
    elif perturb.effective_rho:
        said.append(f"rho {perturb.effective_rho:g}")
    return ", ".join(filter(None, [*said, *more]))


def folded(adapter: AdapterConfig, missed: float) -> str:
    """What the file for other tools says of a LoRA that is none in itself: what it was made of, and what it misses."""
    if not missed:
        return ""
    made_of = "full fine-tuning" if adapter.adapter == "full" else "a DoRA"
    share = f"{100 * missed:.1f}" if missed >= 0.0005 else "less than 0.1"
    return f"a plain LoRA made of {made_of}, of whose effect it misses {share} %"


def is_hub_id(name: str) -> bool:
    """Whether it can be OWNER/NAME, which no folder of that name has to make a path."""
    return bool(_HUB_ID.fullmatch(name))


def base_name(config: TrainConfig) -> str | None:
    """The base's hub id or file name; None for a folder, whose name is the user's own."""
    name = config.model.pretrained_model_name_or_path
    path = Path(name)
    if name == TINY or (is_hub_id(name) and not path.exists()):
        return name
    return None if path.is_dir() else path.name
