"""FLUX.2 klein: loading, inputs, training objective, LoRA names and image generation.

Knows no LoRA file and no run. Start with `pipeline.py` (`Klein`), then `objective.py`.
"""
