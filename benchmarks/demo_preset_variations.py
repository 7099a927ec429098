"""What `demo_preset` tries: settings other than the demo's, lengths, and captions in other words."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flatlora_diffusion.compare.material import SAMPLE_ICONS
from flatlora_diffusion.data.dataset import Sample

STEPS, EVERY = 450, 150
CAPTION = "a TOK icon of {}, in the style of TOK"


@dataclass(frozen=True)
class Variation:
    """Settings other than the demo's, how an icon is captioned, and when it ends."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    caption: str = CAPTION
    steps: int = STEPS

    @property
    def base_name(self) -> str:
        """What the base is called where it is measured: its figures depend on the captions."""
        return f"base, {self.caption.format('X')}"

    def folder(self, name: str) -> str:
        """The folder of the run of this name."""
        return f"{name.replace(' ', '_')}-{self.steps}"

    @property
    def is_plain(self) -> bool:
        """Whether it is a plain LoRA, on which the demo's settings are chosen."""
        return "method" not in self.changes

    @property
    def measured_steps(self) -> list[int]:
        ends_at_0 = self.changes.get("lr_scheduler") == "cosine"
        return [self.steps] if ends_at_0 else [*range(EVERY, self.steps, EVERY), self.steps]


ATTENTION = {"lora_target_modules": "attn", "rank": 8, "learning_rate": 1e-3, "lr_scheduler": "constant"}
CONV = {**ATTENTION, "lora_target_modules": "conv", "rank": 16}
SAM = {**CONV, "method": "sam"}
COSINE = {**CONV, "lr_scheduler": "cosine", "lr_warmup_steps": 0}
VARIATIONS = {
    "attn rank 8": Variation(ATTENTION),
    "attn+ff rank 16": Variation({**ATTENTION, "lora_target_modules": "attn+ff", "rank": 16}),
    "conv rank 16": Variation(CONV),
    "conv rank 16 alpha 24": Variation({**CONV, "lora_alpha": 24}),
    "conv rank 16 alpha 32": Variation({**CONV, "lora_alpha": 32}),
    "conv rank 16 debiased": Variation({**CONV, "debiased_estimation": True}),
    "conv rank 16 noisiest": Variation({**CONV, "min_timestep": 300}),
    "conv rank 32 lr 5e-4": Variation({**CONV, "rank": 32, "learning_rate": 5e-4}),
    "text encoders": Variation({**ATTENTION, "train_text_encoder": True, "text_encoder_lr": 5e-4}),
    "conv rank 16 cosine": Variation(COSINE, steps=150),
    "conv rank 16 cosine longer": Variation(COSINE, steps=300),
    "conv rank 16 cosine longest": Variation(COSINE, steps=450),
    "cosine lr 2e-3": Variation({**COSINE, "learning_rate": 2e-3}, steps=300),
    "cosine lr 5e-4": Variation({**COSINE, "learning_rate": 5e-4}, steps=300),
    "cosine, captions as the base's": Variation(COSINE, "a flat icon of {}, in the style of TOK", 300),
    "cosine, short captions": Variation(COSINE, "{} TOK", 300),
    "conv rank 16 SAM": Variation(SAM),
    "conv rank 16 debiased SAM": Variation({**SAM, "debiased_estimation": True}, steps=300),
    "conv rank 16 SAM 0.5": Variation({**SAM, "rho_rise": 0.5}),
}


def training_icons(variation: Variation, folder: Path) -> Path:
    """The sample's training icons, captioned as the variation says."""
    if variation.caption == CAPTION:
        return SAMPLE_ICONS
    folder.mkdir(parents=True, exist_ok=True)
    for image in SAMPLE_ICONS.glob("*.png"):
        shutil.copy(image, folder)
        text = recaption(image.with_suffix(".txt").read_text(encoding="utf-8").strip(), variation.caption)
        (folder / f"{image.stem}.txt").write_text(text, encoding="utf-8")
    return folder


def recaptioned(sample: Sample, pattern: str) -> Sample:
    return dataclasses.replace(sample, caption=recaption(sample.caption, pattern))


def recaption(caption: str, pattern: str) -> str:
    """A caption in the sample's own grammar in another one."""
    before, after = CAPTION.split("{}")
    return pattern.format(caption.removeprefix(before).removesuffix(after))
