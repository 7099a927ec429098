"""Base models by family: loading, inputs, objective, image generation.

Knows no LoRA file and no run. Start with `base.py` (`Base`), then `registry.py` (`load_base`) and `sdxl/pipeline.py`.
"""
