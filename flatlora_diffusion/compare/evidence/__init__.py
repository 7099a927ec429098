"""`evidence`: one comparison on real SDXL that anyone with a GPU can make, as a report and one JSON to be posted.

Start with `evidence.py`.
"""
