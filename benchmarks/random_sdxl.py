"""Write a base of SDXL's sizes with random weights, to time on: `python -m benchmarks.random_sdxl FOLDER`

7 GB in half precision; nothing is downloaded, the tokenizers are those of the tiny base. What it draws is noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from benchmarks.record import DEVICE
from flatlora_diffusion.config import TINY, ModelConfig
from flatlora_diffusion.families.paths import base_path
from flatlora_diffusion.families.sdxl.loading import load_pipeline
from flatlora_diffusion.families.sdxl.shapes import part_settings

SDXL = ModelConfig(pretrained_model_name_or_path="stabilityai/stable-diffusion-xl-base-1.0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if (folder / "model_index.json").is_file():
        return
    tiny = Path(base_path(TINY))
    scheduler = load_pipeline(ModelConfig(), torch.device("cpu"), torch.float32).scheduler
    torch.set_default_dtype(torch.bfloat16)  # in fp32 the 3.5 billion weights would not fit into a GPU of 16 GB
    with torch.device(DEVICE):  # a GPU is quick to fill them
        pipeline = StableDiffusionXLPipeline(
            vae=AutoencoderKL.from_config(part_settings(SDXL, "vae")),
            text_encoder=CLIPTextModel(CLIPTextConfig(**part_settings(SDXL, "text_encoder"))),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**part_settings(SDXL, "text_encoder_2"))),
            tokenizer=CLIPTokenizer.from_pretrained(tiny / "tokenizer"),
            tokenizer_2=CLIPTokenizer.from_pretrained(tiny / "tokenizer_2"),
            unet=UNet2DConditionModel.from_config(part_settings(SDXL, "unet")),
            scheduler=scheduler,
        )
    pipeline.save_pretrained(folder)


if __name__ == "__main__":
    main()
