"""Adapters that run Flat-LoRA inside other trainers.

Knows nothing of this package's training loop. Users import only the module of their trainer, so no module needs the
libraries of another. Start with `transformers_trainer.py`, the smallest.
"""
