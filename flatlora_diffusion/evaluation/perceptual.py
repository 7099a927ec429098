"""LPIPS diversity, through the optional package `lpips`; nothing is downloaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.evaluation.metrics import Pictures

ALEXNET = "alexnet-owt-7be5be79.pth"
_ADDRESS = "https://download.pytorch.org/models/"

Distance = Callable[[Tensor, Tensor], Tensor]  # (B, 3, H, W) in [-1, 1], twice -> (B, 1, 1, 1)


def load_lpips(weights: Path | None = None) -> Distance:
    """LPIPS 0.1 with AlexNet's ImageNet weights from `weights`, by default where torchvision keeps them.

    Raises ConfigError when the package or the weights are missing.
    """
    if find_spec("lpips") is None or find_spec("torchvision") is None:
        raise ConfigError("LPIPS needs the packages lpips and torchvision: pip install lpips torchvision")
    import lpips

    path = weights or Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if not path.is_file():
        raise ConfigError(f"LPIPS needs AlexNet's weights (233 MB) in {path}: fetch {_ADDRESS}{ALEXNET}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision in an old way
        # A random trunk, filled here: torchvision would unpickle the file without restriction.
        model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    _fill(model.net, torch.load(path, map_location="cpu", weights_only=True), path)
    return model.eval().requires_grad_(False)


def lpips_diversity(distance: Distance, pictures: Pictures) -> float:
    """Mean LPIPS distance over the pairs of seeds of one prompt, then over prompts; images must be of one size.

    Raises ValueError when no prompt has two seeds.
    """
    of_prompts: dict[str, list[Tensor]] = {}
    for (prompt, _), image in pictures.items():
        of_prompts.setdefault(prompt, []).append(_pixels(image))
    means = []
    with torch.inference_mode():
        for images in of_prompts.values():
            pairs = [float(distance(a[None], b[None])) for a, b in combinations(images, 2)]
            means += [sum(pairs) / len(pairs)] if pairs else []
    if not means:
        raise ValueError("diversity needs at least two seeds of a prompt")
    return sum(means) / len(means)


def _fill(trunk: torch.nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Copy AlexNet's `features.I.*` into the slices of lpips, which keep the numbers I."""
    places = {name: "features." + name.split(".", 1)[1] for name in trunk.state_dict()}
    missing = [place for place in places.values() if place not in state]
    if missing:
        raise ConfigError(f"{path} does not hold AlexNet's weights: {missing[0]} is missing; fetch it anew")
    trunk.load_state_dict({name: state[place] for name, place in places.items()})


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
