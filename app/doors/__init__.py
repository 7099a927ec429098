"""Who may ask and what they may name: the app's own names and pages, places on this computer, password guesses.

Knows no tab. Start with `guard.py`.
"""
