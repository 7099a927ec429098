"""The trained parts: LoRA layers, new tokens, and the update that a LoRA of any variant adds to each weight.

Knows no file and no loop. Start with `lora.py`, then `delta.py`.
"""
