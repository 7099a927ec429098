"""Measures models and pictures: fixed losses, encoders and the metrics made of them; reads finished runs.

Knows no arms and no report. Start with `probe.py` (losses) and `metrics.py` (pictures).
"""
