"""Uploaded images and captions of each session: checking, unpacking and storing them, and captions as text.

Knows neither runs nor the page. Start with `uploads.py`.
"""
