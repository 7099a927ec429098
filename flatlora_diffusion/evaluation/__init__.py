"""What is measured of a model or of pictures: fixed losses, encoders and the metrics made of them, finished runs.

Knows no arms and no report. Start with `probe.py` (losses) and `metrics.py` (pictures).
"""
