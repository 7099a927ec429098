"""From a folder of images to the batch of a step: reading, captions, crops, order and caches.

Knows no optimizer. Start with `sources.py`, then `batches.py`.
"""
