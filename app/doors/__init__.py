"""Who may ask, what they may name and how much they may send: names and pages of the app, logins, places, uploads.

Knows no tab. Start with `guard.py`.
"""
