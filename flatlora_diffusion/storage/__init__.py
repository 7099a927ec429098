"""What everything stands on: random seeds, the run folder and its lock, files written whole or not at all, hashes.

Knows nothing of models, images or training. Start with `rng.py` and `run_dir.py`.
"""
