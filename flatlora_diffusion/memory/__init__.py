"""Estimates of the memory and disk space of a run before it starts, computed on shapes without weights.

Needs no GPU. Start with `estimate.py` for device memory and with `disk.py` for disk space.
"""
