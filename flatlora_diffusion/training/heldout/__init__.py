"""Images that are not trained on, for when to stop: at the best checkpoint, or after the steps that folds have found.

Knows no loop: folds get what trains one. Start with `losses.py`.
"""
