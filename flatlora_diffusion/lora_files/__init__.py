"""LoRA files, read in any layout and written in two: key names, scales, metadata, safe reading of hostile files.

Knows no trainer. Start with `reading.py` and `writing.py`; `names.py` maps each tool's key names to layers.
"""
