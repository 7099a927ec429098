"""What one run of a study is trained with, and which of it names the run."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal

from flatlora_diffusion.config import DrawKind, NoiseKind, SigmaSchedule

Variant = Literal["lora", "dora", "pissa", "lora-ga", "adalora", "lora+", "full"]


@dataclass(frozen=True)
class Settings:
    """What one run is trained with; all but these is alike."""

    lr: float
    steps: int
    rank: int = 8
    variant: Variant = "lora"
    sigma: float = 0.0
    schedule: SigmaSchedule = "cosine"
    draw: DrawKind = "full"
    noise: NoiseKind = "filter"
    weight_decay: float = 0.0
    dropout: float = 0.0
    rho: float = 0.0
    sam: Literal["lora", "weights"] = "lora"  # what rho is the radius of: A and B, or W

    def named(self) -> dict[str, Any]:
        """Learning rate, steps and what is not as usual: the identity of a run, whatever settings come later."""
        usual = {item.name: item.default for item in fields(self) if item.default is not MISSING}
        return {name: value for name, value in asdict(self).items() if name not in usual or value != usual[name]}
