"""The memory and the disk that a training will need, counted without weights before it starts.

Knows no GPU: it works on a machine without one. Start with `estimate.py`; of the disk, with `disk.py`.
"""
