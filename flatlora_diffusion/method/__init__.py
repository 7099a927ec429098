"""Flat-LoRA itself, for any model with PEFT LoRA layers: the noise of Eq. 7 and how a model computes with W + eps.

Knows no SDXL, no diffusers and no training loop. Start with `perturbation.py` (`FlatLora`), then `full_draw.py` and
`low_rank_draw.py`, the two kinds of eps, and `follow.py` for loops that are not ours.
"""
