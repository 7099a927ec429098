"""LPIPS diversity with the optional package `lpips`; nothing is downloaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.data.crops import image_to_tensor
from flatlora_diffusion.evaluation.metrics import Pictures

ALEXNET = "alexnet-owt-7be5be79.pth"
_URL = "https://download.pytorch.org/models/"

Distance = Callable[[Tensor, Tensor], Tensor]  # (B, 3, H, W) in [-1, 1], twice -> (B, 1, 1, 1)


def load_lpips(weights: Path | None = None) -> Distance:
    """Load LPIPS 0.1 with AlexNet's ImageNet weights, by default from torchvision's cache.

    Raises ConfigError if the package or the weights are missing.
    """
    if find_spec("lpips") is None or find_spec("torchvision") is None:
        raise ConfigError("LPIPS needs the packages lpips and torchvision: pip install lpips torchvision")
    import lpips

    path = weights or Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if not path.is_file():
        raise ConfigError(f"LPIPS needs AlexNet's weights (233 MB) in {path}: download {_URL}{ALEXNET}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips uses a deprecated torchvision call
        # Weights are loaded separately, because torchvision would unpickle the file without restrictions.
        model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    _load_trunk(model.net, torch.load(path, map_location="cpu", weights_only=True), path)
    return model.eval().requires_grad_(False)


def lpips_diversity(distance: Distance, pictures: Pictures) -> float:
    """Return the mean LPIPS distance over pairs of seeds of a prompt, averaged over prompts; images have one size.

    Raises ValueError if no prompt has two seeds.
    """
    by_prompt: dict[str, list[Tensor]] = {}
    for (prompt, _), image in pictures.items():
        by_prompt.setdefault(prompt, []).append(image_to_tensor(image.convert("RGB")))
    means = []
    with torch.inference_mode():
        for images in by_prompt.values():
            pairs = [float(distance(a[None], b[None])) for a, b in combinations(images, 2)]
            means += [sum(pairs) / len(pairs)] if pairs else []
    if not means:
        raise ValueError("diversity needs at least two seeds of a prompt")
    return sum(means) / len(means)


def _load_trunk(trunk: torch.nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Copy AlexNet's weights into the slices of lpips, which have the same layer numbers."""
    sources = {name: "features." + name.split(".", 1)[1] for name in trunk.state_dict()}
    missing = [source for source in sources.values() if source not in state]
    if missing:
        raise ConfigError(f"{path} does not hold AlexNet's weights: {missing[0]} is missing; download it again")
    trunk.load_state_dict({name: state[source] for name, source in sources.items()})
