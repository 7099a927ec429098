"""LoRA files, read in any layout and written in two: names, scales, metadata, what refuses a hostile file.

Knows no trainer. Start with `reading.py` and `writing.py`; `names.py` says whose names are whose.
"""
