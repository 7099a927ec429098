"""What is trained: LoRA layers, new tokens, and what a LoRA of any variant adds to each weight.

Knows no file and no loop. Start with `lora.py`, then `update.py`.
"""
