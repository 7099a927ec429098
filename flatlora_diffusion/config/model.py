"""The settings of the base model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flatlora_diffusion.config.setting import SAMPLES, Section, setting

PredictionType = Literal["epsilon", "v_prediction"]
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
KLEIN = "black-forest-labs/FLUX.2-klein-base-4B"
TINY, TINY_KLEIN = "tiny", "tiny_klein"
INCLUDED_BASES = {TINY: SAMPLES / "tiny_sdxl", TINY_KLEIN: SAMPLES / "tiny_klein"}  # small bases by name
DENOISERS = ("unet", "transformer")  # parts of pipelines that get a LoRA; a pipeline has one of them
TEXT_PARTS = ("text_encoder", "text_encoder_2")  # of a pipeline, in the order of their concatenated outputs
Quantization = Literal["nf4", "int8", "torchao-int8"]


@dataclass(frozen=True)
class ModelConfig(Section):
    """The base model and how it is loaded."""

    pretrained_model_name_or_path: str = setting(
        TINY,
        "base model, SDXL or FLUX.2 klein: diffusers folder, hub id, single .safetensors checkpoint (SDXL), or `tiny` "
        "or `tiny_klein` for the included small bases",
        path_kind="model",
        read_at_runtime=True,
        identifies_base=True,
    )
    pretrained_vae_model_name_or_path: str | None = setting(
        None,
        "VAE to use instead of that of the base: folder or hub id; a VAE with the fp16 fix runs in fp16",
        path_kind="model",
        read_at_runtime=True,
        identifies_base=True,
    )
    revision: str | None = setting(
        None, "revision (branch, tag or commit) of the base on the Hub", path_kind="part", identifies_base=True
    )
    variant: str | None = setting(
        None, "weight variant of the base, such as fp16", path_kind="part", identifies_base=True, loader_only=True
    )
    single_file_config: str | None = setting(
        None,
        "diffusers folder with configs and tokenizers for a single-file base, to work offline",
        path_kind="read",
        read_at_runtime=True,
        identifies_base=True,
    )
    prediction_type: PredictionType | None = setting(
        None, "prediction type of the base; default: from its file or scheduler config"
    )
    zero_terminal_snr: bool = setting(
        False, "zero terminal SNR: rescale the betas so that the last timestep is pure noise; v-prediction only"
    )
    clip_skip: int | None = setting(None, "text encoder layers to skip in addition to SDXL's default", min=0, max=11)
    quantize_base: Quantization | None = setting(
        None,
        "quantize the frozen UNet or transformer to 4 or 8 bits (nf4, int8: bitsandbytes; torchao-int8: torchao)",
        loader_only=True,
    )
    offload: bool = setting(
        False,
        "move text encoders and VAE to the CPU after caching their outputs",
        free_on_resume=True,
        loader_only=True,
    )
    enable_xformers_memory_efficient_attention: bool = setting(
        False, "use xformers attention instead of PyTorch's SDPA, which is as fast on most GPUs", loader_only=True
    )
    allow_tf32: bool = setting(
        False, "allow TF32 matrix multiplication on Ampere and newer GPUs: faster, less precise", loader_only=True
    )

    @property
    def is_unet_last(self) -> bool:
        """Whether the UNet is moved to the device after the images are encoded."""
        return self.offload and self.quantize_base is None
