"""Seeds, the run folder and its lock, atomic files and hashes: the ground that all other packages build on.

Knows nothing of models, images or training. Start with `rng.py` and `run_dir.py`.
"""
