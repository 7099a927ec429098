"""Flat-LoRA itself, for any model with PEFT LoRA layers: the noise of Eq. 7 and how a model computes with W + eps.

Knows no SDXL, no diffusers and no training loop. Start with `flat_lora.py` (`FlatLora`), then `low_rank_draw.py`
and `full_draw.py`, two of the kinds of eps that `settings.py` lists, and `optimizer_hook.py` for
other loops. `gradient.py` is how a step's gradient is taken; `rivals/` takes it in other ways.
"""
