"""From a folder of images to the batch of a step: intake, captions, crops, order, caches.

Knows no optimizer. Start with `sources.py`, then `batches.py`.
"""
