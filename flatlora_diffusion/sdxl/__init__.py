"""The base model: loading it from wherever it lies, its inputs, the training objective, drawing with it.

Knows no LoRA file and no run. Start with `pipeline.py` (`Sdxl`), then `loading.py`.
"""
