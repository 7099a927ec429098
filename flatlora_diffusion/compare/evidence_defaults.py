"""The default flags of `evidence`: a training with the paper's settings on the sample icons."""

from flatlora_diffusion.config import SDXL

BASE, ENCODERS = SDXL, ("openai/clip-vit-large-patch14", "facebook/dinov2-base")
DEFAULTS = (
    *("--preset", "paper", "--instance_data_dir", "samples/icons_3d", "--resolution", "1024", "--cache_latents"),
    *("--gradient_checkpointing", "--num_seeds", "3", "--encoders", *ENCODERS, "--output_dir", "evidence"),
)
BASE_FLAGS = ("--pretrained_model_name_or_path", BASE, "--variant", "fp16")
"""Flags for use if no base is given."""
