"""Parts of the page that several tabs share: theme, cards, charts, messages, confirmations, timers.

Knows no tab. Start with `messages.py`.
"""
