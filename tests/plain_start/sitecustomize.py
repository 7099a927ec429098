"""What processes that tests start see at their start: a plain installation, without the extras for quantized bases.

diffusers imports both wherever they are installed, a fifth of a start's time.
"""

import sys

for absent in ("bitsandbytes", "torchao"):
    sys.modules[absent] = None  # type: ignore[assignment]  # Python's sign for what cannot be imported
