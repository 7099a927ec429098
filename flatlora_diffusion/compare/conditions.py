"""The proof that the runs of an experiment were alike: hashes of what they shared, read from their folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flatlora_diffusion.compare.arms import OTHER_DRAWS, Planned
from flatlora_diffusion.config import TrainConfig

_SHOWN = 16  # hex digits
# Where a run lies and how often it saves is not how it was trained.
_PLACES = {"output_dir", "output_name", "checkpointing_steps", "instance_data_dir"}
# An arm that moves one of these has other first weights, or draws in another order.
_SHAPES = {"rank", "lora_block_ranks", "lora_target_modules", "lora_unet_blocks", "use_dora", "use_blora", "init_lora"}
_SHAPES |= {"lora_init_seed", "train_text_encoder"}
_FEEDS = {"max_train_steps", "train_batch_size", "gradient_accumulation_steps", "random_flip", "center_crop"}
_FEEDS |= {"noise_offset", "resolution", "repeats", "cache_latents", "use_aspect_ratio_buckets", "background_color"}
_FEEDS |= {"image_interpolation_mode", "with_prior_preservation", "alpha_mask_loss"}


@dataclass(frozen=True)
class Fact:
    """What runs should share, with the hash of each; `holds` says whether they do."""

    what: str
    hashes: Mapping[str, str]
    holds: bool
    note: str


def proof(runs: Sequence[Planned]) -> list[dict[str, Any]]:
    """One fact for the images and the base of all runs, then for settings, first weights and draws of each seed."""
    labels = {run.label: run for run in runs}
    facts = [
        _alike("training images and captions", {label: _images(run) for label, run in labels.items()}),
        _alike("base model", {label: _start(run)["base"] for label, run in labels.items()}),
    ]
    for seed in dict.fromkeys(run.seed for run in runs):
        of_seed = {label: run for label, run in labels.items() if run.seed == seed}
        facts.append(
            _alike(
                f"all settings but the arm's own, seed {seed}",
                {label: _settings(run, list(of_seed.values())) for label, run in of_seed.items()},
            )
        )
        alike = {
            label: run
            for label, run in of_seed.items()
            if run.arm.key == OTHER_DRAWS or not _SHAPES & set(run.arm.changes)
        }
        facts.append(
            _alike(
                f"first weights of the LoRA, seed {seed}",
                {label: _start(run)["lora"] for label, run in alike.items()},
                _without(of_seed, alike, "another rank or other layers"),
            )
        )
        drawn = {
            label: run
            for label, run in of_seed.items()
            if run.arm.key != OTHER_DRAWS and not _FEEDS & set(run.arm.changes)
        }
        facts.append(
            _alike(
                f"images, crops, noise and timesteps of every step, seed {seed}",
                {label: _draws(run) for label, run in drawn.items()},
                _without(of_seed, drawn, "draws of its own, as intended"),
            )
        )
    return [asdict(fact) for fact in facts]


def _alike(what: str, hashes: Mapping[str, str], note: str = "") -> Fact:
    return Fact(what, {label: found[:_SHOWN] for label, found in hashes.items()}, len(set(hashes.values())) <= 1, note)


def _without(all_runs: Mapping[str, Planned], taken: Mapping[str, Planned], why: str) -> str:
    left = [label for label in all_runs if label not in taken]
    return f"{', '.join(left)}: {why}" if left else ""


def _images(run: Planned) -> str:
    return _sha256([[row["sha256"], row["caption_sha256"]] for row in run.run.manifest()])


def _settings(run: Planned, fellows: Sequence[Planned]) -> str:
    """The hash of what the run was trained with, the settings that tell any arm of this seed from another left out."""
    own = {"method", "sigma", *_PLACES, *(name for fellow in fellows for name in fellow.arm.changes)}
    saved = {**TrainConfig().to_dict(), **run.run.config()}
    return _sha256({name: value for name, value in sorted(saved.items()) if name not in own})


def _start(run: Planned) -> Mapping[str, Any]:
    starts = [event for event in run.run.events() if event["event"] == "start"]
    return starts[0] if starts else {"base": "not recorded", "lora": "not recorded"}


def _draws(run: Planned) -> str:
    by_step = {event["step"]: event["draws"] for event in run.run.events() if event["event"] == "step"}
    return _sha256(sorted(by_step.items()))


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
