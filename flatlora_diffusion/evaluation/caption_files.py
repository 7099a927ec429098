"""`caption`: the images of a folder that have no caption get one, written by a model into NAME.txt beside them."""

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
    """Write the missing captions, each as soon as it is there; returns how many. None that is there is replaced.

    Raises ConfigError for a folder without images to caption and for a model that cannot be loaded.
    """
    for name, what in (("folder", "of images"), ("captioner", "or hub id of a model that captions")):
        if not getattr(config, name):
            raise ConfigError(f"{name} is missing: give --{name}, the folder {what}")
    folder = Path(config.folder)
    paths, _ = find_images(folder)
    captions = own_captions(folder, paths)
    bare = [path for path in paths if not captions[path.name]]
    if not bare:
        every = "has a caption for every image; delete those that are to be written anew"
        raise ConfigError(f"folder={config.folder!r} {every if paths else 'has no readable image'}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    thresholds = Thresholds(config.tag_threshold, config.character_threshold)
    captioner = load_captioner(config.captioner, config.trigger.strip(), thresholds, device)
    empty, written = [], 0
    for path in tqdm(bare, desc="captions"):
        (caption,) = captioner([load_image(path)])
        if not caption:
            empty.append(path.name)
        elif not own_captions(folder, [path])[path.name]:  # one that somebody has written meanwhile stays
            with explain_write_errors(folder, "folder"):
                write_text(path.with_suffix(".txt"), caption + "\n")
            written += 1
    if empty:
        logger.warning("no tag of %s is likely enough; it has no caption yet", ", ".join(empty))
    return written
