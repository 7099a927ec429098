"""Pictures to look at: prompts x seeds x LoRAs x strengths, as files and as one labelled grid.

Knows no run but its LoRA file. Start with `gallery.py`.
"""
