"""How flat the loss is around finished runs' merged weights, and what that says of strength, bits and rank.

Reads run folders; knows no training loop. Start with `report.py`, then `landscape.py`. From that down nothing knows
SDXL: `peft_models.py` measures any model with PEFT adapters.
"""
