"""Losses of models on fixed samples, metrics of images, statistics, and the reading of finished runs.

Knows neither arms nor reports. Start with `probe.py` (losses) and `metrics.py` (pictures).
"""
