"""Flatness of the loss around the merged weights of finished runs, and robustness to strength, precision and rank.

Reads run folders; knows no training loop. Start with `report.py`, then `landscape.py`. `landscape.py` and its imports
know no SDXL: `peft_models.py` measures any model with PEFT adapters.
"""
