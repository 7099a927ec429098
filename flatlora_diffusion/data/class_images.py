"""Prior preservation: generate the class images that are missing, with the base itself."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from tqdm import tqdm

from flatlora_diffusion.config import ModelConfig, TrainConfig
from flatlora_diffusion.data.dataset import Sample, load_samples
from flatlora_diffusion.data.images import find_images
from flatlora_diffusion.ground.run_lock import alone_in
from flatlora_diffusion.ground.seeds import derive_seed
from flatlora_diffusion.ground.whole_files import writing_into, writing_whole
from flatlora_diffusion.sdxl.device import DTYPES, this_process
from flatlora_diffusion.sdxl.pipeline import Sdxl, load_sdxl
from flatlora_diffusion.sdxl.sampling import generate_images

logger = logging.getLogger(__name__)


def load_class_samples(config: TrainConfig) -> list[Sample]:
    """The class images, the missing ones generated first; empty without prior preservation. Needs a seed."""
    data = config.data
    if not data.with_prior_preservation:
        return []
    folder = Path(str(data.class_data_dir))
    processes = this_process()
    if processes.is_main_process:
        with alone_in(folder, "class_data_dir", waits=True):  # two runs would number their images alike
            present = len(find_images(folder)[0])
            if present < data.num_class_images:
                _generate(config, folder, present, processes.device)
    processes.wait_for_everyone()
    return load_samples(folder, data.class_prompt).samples[: data.num_class_images]


def _placed(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> Sdxl:
    """The base that draws on `device`; with --offload each of its models is there only while it works."""
    one_by_one = model.is_unet_last and device.type != "cpu"
    sdxl = load_sdxl(model, torch.device("cpu") if one_by_one else device, dtype)
    if one_by_one:
        sdxl.pipeline.enable_model_cpu_offload(device=device)
    return sdxl


def _generate(config: TrainConfig, folder: Path, present: int, device: torch.device) -> None:
    """Fill `folder` up to the number wanted; the seed of each image is a function of (seed, its number)."""
    data, seed = config.data, config.run.seed
    assert seed is not None
    wanted = list(range(present, data.num_class_images))
    logger.info("generating %d class images into %s", len(wanted), folder)
    default = torch.float16 if device.type == "cuda" else torch.float32
    dtype = default if data.prior_generation_precision is None else DTYPES[data.prior_generation_precision]
    sdxl = _placed(config.model, device, dtype)
    size = data.resolution or sdxl.resolution
    for start in tqdm(range(0, len(wanted), data.sample_batch_size), desc="class images"):
        numbers = wanted[start : start + data.sample_batch_size]
        prompts = [str(data.class_prompt)] * len(numbers)
        seeds = [derive_seed(seed, "class_image", number) for number in numbers]
        images = generate_images(sdxl, prompts, seeds, size, batch_size=data.sample_batch_size)
        for number, image in zip(numbers, images, strict=True):
            path = folder / f"class-{number:04d}.png"
            while path.exists():  # the user's own file is never overwritten
                path = path.with_stem(f"{path.stem}-new")
            with writing_into(folder, "class_data_dir"), writing_whole(path) as aside:  # half a picture would count
                image.save(aside, format="PNG")
