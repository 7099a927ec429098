"""Reports of experiments, shown in place. Knows the run folders, and no other part of the page.

Start with `report.py`.
"""
