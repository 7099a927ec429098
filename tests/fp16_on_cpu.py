"""fp16 on a CPU as on a GPU without bf16: accelerate has its autocast and its scaler of losses on GPUs only."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator

FIRST_SCALE = "FP16_FIRST_SCALE"  # variable of a loss scale at which first gradients overflow
_plain = Accelerator.__init__


def init_with_scaler(self: Accelerator, *args: Any, **kwargs: Any) -> None:
    """For `Accelerator.__init__`."""
    _plain(self, *args, **kwargs)
    if self.mixed_precision == "fp16":
        self.native_amp = True
        self.scaler = torch.amp.GradScaler("cpu", init_scale=float(os.environ.get(FIRST_SCALE, 2.0**16)))
