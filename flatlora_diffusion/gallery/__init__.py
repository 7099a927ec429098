"""`generate`: images of prompts x seeds x LoRAs x strengths, as files and as labelled grids.

Knows no run except its LoRA file. Start with `gallery.py`.
"""
