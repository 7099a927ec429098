"""The Runs tab: list, details, labels, downloads, import, cloning, trash, and the report of an experiment.

Start with `tab.py`.
"""
