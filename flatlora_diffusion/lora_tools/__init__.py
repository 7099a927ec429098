"""The programs that work on LoRA files: export and import, merge, resize, extract, inspect.

Knows no trainer. Start with `converting.py`.
"""
