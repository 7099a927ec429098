"""Flat-LoRA for any model with PEFT LoRA layers: the noise of Eq. 7 and the forward pass at W + eps.

Knows no SDXL, no diffusers and no training loop. Start with `flat_lora.py` (`FlatLora`), then `draw.py` (the
two ways to sample eps). `optimizer_hook.py` is for other training loops, `gradient.py` computes
the gradient of a training step, and `rivals/` has the methods that Flat-LoRA is compared with.
"""
