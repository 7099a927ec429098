"""What processes that a test starts see at their start: a plain installation whose accelerate has fp16 on a CPU."""

import runpy
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
runpy.run_path(str(TESTS / "plain_start" / "sitecustomize.py"))
sys.path.append(str(TESTS))

from accelerate import Accelerator  # noqa: E402
from fp16_on_cpu import init_with_scaler  # noqa: E402

Accelerator.__init__ = init_with_scaler
