"""Where the runs of a comparison are trained when there are several at once: on this machine, or on a Ray cluster.

Knows commands and their logs, and nothing of what is compared. Start with `at_once.py`.
"""
