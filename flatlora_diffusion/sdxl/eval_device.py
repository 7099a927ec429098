"""All parts of a base where they can work together, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from flatlora_diffusion.config import TEXT_PARTS
from flatlora_diffusion.sdxl.pipeline import Sdxl
from flatlora_diffusion.sdxl.sampling import evaluating


@contextmanager
def ready(sdxl: Sdxl) -> Iterator[None]:
    """All parts on the UNet's device and in eval mode while this is open, then where and how they were."""
    parts = [getattr(sdxl.pipeline, part) for part in (*TEXT_PARTS, "vae")]
    homes = [part.device for part in parts]
    with ExitStack() as stack:
        for part, home in zip(parts, homes, strict=True):
            if home != sdxl.unet.device:
                part.to(sdxl.unet.device)
                stack.callback(part.to, home)
            stack.enter_context(evaluating(part))
        yield
