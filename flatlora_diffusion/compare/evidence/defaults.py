"""What `evidence` compares unless flags say otherwise: a training of the paper's setting on the sample icons."""

from flatlora_diffusion.config import SDXL

BASE, ENCODERS = SDXL, ("openai/clip-vit-large-patch14", "facebook/dinov2-base")
DEFAULTS = (
    *("--preset", "paper", "--instance_data_dir", "samples/icons_3d", "--resolution", "1024", "--cache_latents"),
    *("--gradient_checkpointing", "--num_seeds", "3", "--encoders", *ENCODERS, "--output_dir", "evidence"),
)
OF_BASE = ("--pretrained_model_name_or_path", BASE, "--variant", "fp16")
"""Where no base is given."""
