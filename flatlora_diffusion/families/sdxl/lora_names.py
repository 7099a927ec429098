"""The names of SDXL's layers in LoRA files."""

from __future__ import annotations

from flatlora_diffusion.families.sdxl.sgm_names import original_block_path, original_path

KOHYA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
_COMFYUI_TEXT = {"text_encoder": "text_encoders.clip_l.", "text_encoder_2": "text_encoders.clip_g."}


def file_names(part: str, module: str, layers_per_block: int) -> dict[str, str]:
    """Return the styles of all names of a layer, or of a norm of the UNet, by name."""
    prefix, flat = KOHYA_PREFIXES[part], module.replace(".", "_")
    if part != "unet":
        short = module.removeprefix("text_model.")
        return {
            f"{prefix}_{flat}": "kohya-sgm",  # the same in both of kohya's styles
            f"{prefix}_{short.replace('.', '_')}": "kohya-sgm",
            f"{_COMFYUI_TEXT[part]}transformer.{module}": "comfyui",
            f"{part}.{module}": "peft",
            f"{part}.{short}": "peft",
        }
    original = original_path(module, layers_per_block)
    return {
        f"{prefix}_{flat}": "kohya-diffusers",
        f"{prefix}_{original.replace('.', '_')}": "kohya-sgm",
        f"diffusion_model.{original}": "comfyui",
        f"lycoris_{flat}": "lycoris",
        f"unet.{module}": "peft",
    }


def kohya_name(part: str, module: str, layers_per_block: int = 2) -> str:
    """Name a module in kohya's layout, such as `lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q`.

    Raises:
        KeyError: The UNet's module has no such name (conv_in, time_embedding, ...).
    """
    path = original_block_path(module, layers_per_block) if part == "unet" else module
    return f"{KOHYA_PREFIXES[part]}_{path.replace('.', '_')}"
