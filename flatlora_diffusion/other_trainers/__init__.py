"""Flat-LoRA inside the trainers of others: their seams on one side, `FlatLora` on the other.

Knows no training loop of ours. Each module is imported by the user of its trainer alone, so none needs the others'
libraries. Start with `transformers_trainer.py`, the smallest.
"""
