"""Images and captions that were dropped on the page, and the Dataset tab.

Knows no run. Start with `uploads.py`, then `tab.py`.
"""
