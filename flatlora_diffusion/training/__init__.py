"""A run from its settings to its files: state, loop, checkpoints, previews, result, upload.

Knows nothing of comparing runs. Start with `trainer.py`, then `state.py`.
"""
