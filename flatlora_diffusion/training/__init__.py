"""A run from its settings to its files: state, loop, checkpoints, previews, result, upload.

Knows nothing of comparisons. Start with `trainer.py`, then `state.py`.
"""
