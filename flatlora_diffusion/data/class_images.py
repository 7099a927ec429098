"""Prior preservation: generates the missing class images with the base."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from flatlora_diffusion.config import ModelConfig, TrainConfig
from flatlora_diffusion.data.dataset import Sample, load_samples
from flatlora_diffusion.data.images import find_images
from flatlora_diffusion.families.base import Base
from flatlora_diffusion.families.device import DTYPES, check_precision, this_process
from flatlora_diffusion.families.drawing import ImageSettings
from flatlora_diffusion.families.registry import load_base
from flatlora_diffusion.families.sampling import generate_images
from flatlora_diffusion.storage.atomic_io import atomic_write, explain_write_errors
from flatlora_diffusion.storage.rng import derive_seed
from flatlora_diffusion.storage.run_lock import lock_folder

logger = logging.getLogger(__name__)


def load_class_samples(config: TrainConfig) -> list[Sample]:
    """Return the class images, after generating missing ones; empty without prior preservation.

    `config` must have its seed.
    """
    data = config.data
    if not data.with_prior_preservation:
        return []
    folder = Path(str(data.class_data_dir))
    processes = this_process()
    # Two runs would use the same file names; the processes of one run share the work.
    lock = lock_folder(folder, "class_data_dir", wait=True) if processes.is_main_process else nullcontext()
    with lock:
        (present,) = broadcast_object_list([len(find_images(folder)[0]) if processes.is_main_process else 0])
        missing = range(present, data.num_class_images)
        if missing:
            logger.info("generating %d class images into %s", len(missing), folder)
        numbers = missing[processes.process_index :: processes.num_processes]
        if numbers:
            _generate(config, folder, numbers, processes.device)
        processes.wait_for_everyone()
    return load_samples(folder, data.class_prompt).samples[: data.num_class_images]


def _load_on(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> Base:
    """Load the base onto `device`; with --offload each of its models is there only while it is used."""
    offload = model.is_unet_last and device.type != "cpu"
    base = load_base(model, torch.device("cpu") if offload else device, dtype)
    if offload:
        base.pipeline.enable_model_cpu_offload(device=device)
    return base


def _generate(config: TrainConfig, folder: Path, numbers: Sequence[int], device: torch.device) -> None:
    """Generate the images of these numbers into `folder`; each seed is a function of (seed, number)."""
    data, seed = config.data, config.run.seed
    assert seed is not None
    check_precision("prior_generation_precision", data.prior_generation_precision, device)
    default = torch.float16 if device.type == "cuda" else torch.float32
    dtype = default if data.prior_generation_precision is None else DTYPES[data.prior_generation_precision]
    base = _load_on(config.model, device, dtype)
    settings = ImageSettings(base.checked_resolution(data.resolution))
    for start in tqdm(range(0, len(numbers), data.sample_batch_size), desc="class images"):
        part = numbers[start : start + data.sample_batch_size]
        prompts = [str(data.class_prompt)] * len(part)
        seeds = [derive_seed(seed, "class_image", number) for number in part]
        images = generate_images(base, prompts, seeds, settings, data.sample_batch_size, must_be_finite=True)
        for number, image in zip(part, images, strict=True):
            path = folder / f"class-{number:04d}.png"
            while path.exists():  # the user's own file is never overwritten
                path = path.with_stem(f"{path.stem}-new")
            with explain_write_errors(folder, "class_data_dir"), atomic_write(path) as temporary:
                image.save(temporary, format="PNG")
