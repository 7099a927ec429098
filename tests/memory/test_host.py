"""The estimate of the CPU's memory: against the files, weights and caches of a real run, and against sums by hand."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import samples_of
from torch import Tensor, nn

from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.data.prompts import FrozenPrompts
from flatlora_diffusion.families.sdxl.pipeline import Sdxl
from flatlora_diffusion.memory.host import cpu_lines, estimate_cpu_memory
from flatlora_diffusion.training.state import prepare

GIB = 2**30
PARTS = ("unet", "text_encoder", "text_encoder_2", "vae")


def numbers(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def size(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def test_loading_takes_memory_for_the_weights_and_the_largest_cast_file(config: TrainConfig, sdxl: Sdxl) -> None:
    counts = {part: numbers(getattr(sdxl.pipeline, part)) for part in PARTS}
    samples = samples_of(config)
    as_it_is = estimate_cpu_memory(config.replace(mixed_precision="no"), samples)
    assert as_it_is.loading == 4 * sum(counts.values())
    assert as_it_is.total == as_it_is.loading
    halved = estimate_cpu_memory(config.replace(mixed_precision="bf16"), samples)
    half = 2 * (sum(counts.values()) - counts["vae"]) + 4 * counts["vae"]
    folder = Path(config.model.pretrained_model_name_or_path)
    files = {part: sum(file.stat().st_size for file in (folder / part).glob("*.safetensors")) for part in PARTS}
    assert halved.loading == half + max(files[part] for part in PARTS if part != "vae")


LOAD = """
import sys
from pathlib import Path
import torch
from flatlora_diffusion.config import ModelConfig
from flatlora_diffusion.families.sdxl.loading import load_pipeline

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

small, large, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
load_pipeline(ModelConfig(pretrained_model_name_or_path=small), torch.device("cpu"), dtype)  # imports the rest
before = anonymous()
pipeline = load_pipeline(ModelConfig(pretrained_model_name_or_path=large), torch.device("cpu"), dtype)
print(anonymous() - before)
"""


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_file_in_the_precision_of_the_run_is_mapped_and_not_copied(base: Path, sdxl: Sdxl, tmp_path: Path) -> None:
    unet = type(sdxl.denoiser).from_config({**sdxl.denoiser.config, "block_out_channels": (128, 256, 512)})
    folder = tmp_path / "large"
    shutil.copytree(base, folder)
    shutil.rmtree(folder / "unet")
    unet.to(torch.bfloat16).save_pretrained(folder / "unet")
    size_of_file = sum(file.stat().st_size for file in (folder / "unet").glob("*.safetensors"))
    assert size_of_file > 50e6
    taken = {}
    for dtype in ("bfloat16", "float32"):
        command = [sys.executable, "-c", LOAD, str(base), str(folder), dtype]
        taken[dtype] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    assert taken["bfloat16"] < 0.3 * size_of_file
    assert taken["float32"] > 1.7 * size_of_file, "cast to twice the width"


def test_a_cast_single_file_is_held_whole(config: TrainConfig, sdxl: Sdxl, tmp_path: Path) -> None:
    counts = {part: numbers(getattr(sdxl.pipeline, part)) for part in PARTS}
    file = tmp_path / "base.safetensors"
    halves = {f"{part}.{name}": value.half() for part in PARTS for name, value in _weights(sdxl, part)}
    save_file(halves, file)
    single = config.replace(
        pretrained_model_name_or_path=str(file),
        single_file_config=config.model.pretrained_model_name_or_path,
        mixed_precision="fp16",
    )
    weights = 2 * sum(counts.values()) + 2 * counts["vae"]
    loading = estimate_cpu_memory(single, samples_of(config)).loading
    assert loading == pytest.approx(weights + 2 * counts["vae"], rel=0.05), "of a half-precision file the VAE alone"
    loading = estimate_cpu_memory(single.replace(mixed_precision="bf16"), samples_of(config)).loading
    assert loading == pytest.approx(weights + file.stat().st_size), "as wide, yet of another kind: all is cast"
    loading = estimate_cpu_memory(single.replace(mixed_precision="no"), samples_of(config)).loading
    assert loading == pytest.approx(4 * sum(counts.values()) + file.stat().st_size)


def _weights(sdxl: Sdxl, part: str) -> list[tuple[str, Tensor]]:
    return [(name, value.detach().clone()) for name, value in getattr(sdxl.pipeline, part).named_parameters()]


def test_caches_and_offloaded_parts_are_those_of_a_real_run(config: TrainConfig, icons: Path) -> None:
    config = config.replace(cache_latents=True, offload=True, prior_from_base=True, class_prompt="a thing")
    samples = samples_of(config)
    estimate, state = estimate_cpu_memory(config, samples), prepare(config, samples)
    assert state.batches.latents is not None
    assert estimate.latents == sum(size(*pair) for pair in state.batches.latents._posteriors.values())
    assert isinstance(state.batches.prompts, FrozenPrompts)
    assert estimate.prompts == sum(size(*tensors.values()) for tensors in state.batches.prompts._embeds.values())
    pipeline = state.base.pipeline
    assert estimate.offloaded == 4 * sum(numbers(getattr(pipeline, part)) for part in PARTS if part != "unet")
    prior = {"with_prior_preservation": True, "prior_from_base": False, "class_data_dir": str(icons)}
    config = config.replace(**prior, num_class_images=3, prior_generation_precision="fp32")
    state = prepare(config, samples, load_samples(icons, "a thing").samples)
    both = estimate_cpu_memory(config, samples)
    assert state.batches.class_latents is not None
    cached = [*state.batches.latents._posteriors.values()] if state.batches.latents else []
    cached += state.batches.class_latents._posteriors.values()
    assert both.latents == sum(size(*pair) for pair in cached)
    assert both.class_images == both.loading, "class images are drawn with the same base in fp32"


def test_sdxl_from_fp32_files_by_hand(config: TrainConfig) -> None:
    sdxl = config.replace(pretrained_model_name_or_path="some/sdxl", mixed_precision="bf16", resolution=1024)
    estimate = estimate_cpu_memory(sdxl, [])
    unet, encoders, vae = 2_567_463_684, 123_060_480 + 694_659_840, 83_653_863  # the weights of SDXL 1.0
    assert estimate.loading == 2 * (unet + encoders) + 4 * vae + 4 * unet
    in_halves = sdxl.replace(variant="fp16", mixed_precision="fp16")
    assert estimate_cpu_memory(in_halves, []).loading == 2 * (unet + encoders) + 4 * vae + 2 * vae
    other_halves = in_halves.replace(mixed_precision="bf16")
    assert estimate_cpu_memory(other_halves, []).loading == 2 * (unet + encoders) + 4 * vae + 2 * unet


def test_the_message_names_the_settings_that_lower_it(config: TrainConfig) -> None:
    samples = samples_of(config)
    (fits,) = cpu_lines(config, samples, 32 * GIB)
    assert "32.0 GiB free" in fits
    _, loading = cpu_lines(config, samples, 1)
    assert "--mixed_precision" in loading
    cached = config.replace(cache_latents=True, resolution=4096)
    _, caches = cpu_lines(cached, samples, 1)
    assert "--cache_latents" in caches
