"""The settings of the base model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flatlora_diffusion.config.setting import Section, setting

PredictionType = Literal["epsilon", "v_prediction"]
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
TINY = "tiny"  # the name of the small base that ships with this program
TEXT_PARTS = ("text_encoder", "text_encoder_2")  # of a pipeline, in the order in which their outputs are joined
Quantization = Literal["nf4", "int8", "torchao-int8"]


@dataclass(frozen=True)
class ModelConfig(Section):
    """The base model."""

    pretrained_model_name_or_path: str = setting(
        TINY,
        "SDXL base: a diffusers folder, a hub id, a single .safetensors checkpoint, or `tiny` for the small base that "
        "ships with this program",
        place="model",
        stays_open=True,
        names_base=True,
    )
    pretrained_vae_model_name_or_path: str | None = setting(
        None,
        "another VAE: folder or hub id; the fp16 fix is in fp16",
        place="model",
        stays_open=True,
        names_base=True,
    )
    revision: str | None = setting(None, "hub revision of the base", place="part", names_base=True)
    variant: str | None = setting(
        None, "weight variant of the base, such as fp16", place="part", names_base=True, only_loads=True
    )
    single_file_config: str | None = setting(
        None,
        "for a single-file base: a diffusers folder whose configs and tokenizers are used, to work offline",
        place="read",
        stays_open=True,
        names_base=True,
    )
    prediction_type: PredictionType | None = setting(
        None, "what the base predicts; default: what its file or scheduler says"
    )
    zero_terminal_snr: bool = setting(
        False, "rescale the betas so that the last timestep is pure noise; v-prediction only"
    )
    clip_skip: int | None = setting(None, "text encoder layers to skip beyond SDXL's own choice", min=0, max=11)
    quantize_base: Quantization | None = setting(
        None, "load the frozen UNet in 4 or 8 bits (nf4, int8: bitsandbytes; torchao-int8: torchao)", only_loads=True
    )
    offload: bool = setting(
        False,
        "keep text encoders and VAE on the CPU once their outputs are cached",
        free_on_resume=True,
        only_loads=True,
    )
    enable_xformers_memory_efficient_attention: bool = setting(
        False, "attention by xformers; PyTorch's own (SDPA) is the default and as good on most GPUs", only_loads=True
    )
    allow_tf32: bool = setting(
        False, "TF32 matrix products on Ampere and newer GPUs: faster, less exact", only_loads=True
    )

    @property
    def is_unet_last(self) -> bool:
        """Whether the UNet is placed last, so that it need not share the device with the encoding of the images."""
        return self.offload and self.quantize_base is None
