"""The Compare tab: finished runs side by side, and the blind vote.

Draws through the queue and keeps every picture. Start with `comparison.py`, then `tab.py`.
"""
