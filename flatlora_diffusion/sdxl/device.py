"""On which device, in which precision and as which process something runs: each table of it, once."""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

# By the names that settings have for them; "no" is mixed precision's word for none.
DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TEXT_PARTS = ("text_encoder", "text_encoder_2")  # of a pipeline, in the order in which their outputs are joined


def this_process() -> PartialState:
    """This process among those of the launcher, on its device: on the CPU if accelerate was told so."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # Accelerator looks, PartialState does not
