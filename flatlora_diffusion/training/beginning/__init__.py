"""What a run begins with: the settings that it leaves open, first weights, and a sigma that the base itself names.

Knows no loop: what it reads are the micro-batches of the first steps, before these are taken.
Start with `settling.py`, which needs no model, then `first_weights.py`.
"""
