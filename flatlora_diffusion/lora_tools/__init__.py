"""Programs for LoRA files: export and import, average, merge, resize, extract, inspect.

Knows no trainer. Start with `converting.py`.
"""
