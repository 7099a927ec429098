"""The base model: loading, inputs, training objective and image generation.

Knows no LoRA file and no run. Start with `pipeline.py` (`Sdxl`), then `loading.py`.
"""
