"""`caption`: writes captions by a model to NAME.txt beside the images of a folder that have none."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from tqdm import tqdm

from flatlora_diffusion.config import CaptionConfig, ConfigError
from flatlora_diffusion.data.dataset import own_captions
from flatlora_diffusion.data.images import find_images, load_image
from flatlora_diffusion.evaluation.captioner import load_captioner
from flatlora_diffusion.evaluation.tagger import Thresholds
from flatlora_diffusion.storage.atomic_io import explain_write_errors, write_text

logger = logging.getLogger(__name__)


def write_captions(config: CaptionConfig) -> int:
    """Write the missing captions one by one; returns how many. Existing captions are not replaced.

    Raises ConfigError for a folder without images to caption, or a model that cannot be loaded.
    """
    for name, what in (("folder", "of images"), ("captioner", "or hub id of a captioning model")):
        if not getattr(config, name):
            raise ConfigError(f"{name} is missing: give --{name}, the folder {what}")
    folder = Path(config.folder)
    paths, _ = find_images(folder)
    captions = own_captions(folder, paths)
    uncaptioned = [path for path in paths if not captions[path.name]]
    if not uncaptioned:
        reason = "has a caption for every image; delete those to be replaced" if paths else "has no readable image"
        raise ConfigError(f"folder={config.folder!r} {reason}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    thresholds = Thresholds(config.tag_threshold, config.character_threshold)
    captioner = load_captioner(config.captioner, config.trigger.strip(), thresholds, device)
    empty, written = [], 0
    for path in tqdm(uncaptioned, desc="captions"):
        (caption,) = captioner([load_image(path)])
        if not caption:
            empty.append(path.name)
        elif not own_captions(folder, [path])[path.name]:  # written by someone else in the meantime
            with explain_write_errors(folder, "folder"):
                write_text(path.with_suffix(".txt"), caption + "\n")
            written += 1
    if empty:
        logger.warning("no tag of %s reaches its threshold; they still have no caption", ", ".join(empty))
    return written
