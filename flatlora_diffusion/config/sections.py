"""The sections of the training settings, and properties that depend on several sections."""

from __future__ import annotations

from dataclasses import dataclass, field

from flatlora_diffusion.config.adapter import AdapterConfig, TokenConfig
from flatlora_diffusion.config.data import DataConfig
from flatlora_diffusion.config.model import ModelConfig
from flatlora_diffusion.config.optim import ObjectiveConfig, OptimConfig
from flatlora_diffusion.config.perturb import PerturbConfig
from flatlora_diffusion.config.run import MembersConfig, RunConfig


@dataclass(frozen=True)
class Sections:
    """The settings of a training run by section."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    tokens: TokenConfig = field(default_factory=TokenConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    perturb: PerturbConfig = field(default_factory=PerturbConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    average: MembersConfig = field(default_factory=MembersConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def trains_text(self) -> bool:
        """Whether text encoder weights or embeddings are trained."""
        return self.adapter.train_text_encoder or self.tokens.train_text_encoder_ti

    @property
    def encodes_in_steps(self) -> bool:
        """Whether every step encodes prompts."""
        return self.trains_text or self.data.draws_captions
