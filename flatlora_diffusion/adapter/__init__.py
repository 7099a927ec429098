"""The trained parts of a model: LoRA layers, new tokens, and the update that any LoRA variant adds to each weight.

Knows no file format and no training loop. Start with `lora.py`, then `delta.py`.
"""
