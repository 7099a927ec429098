"""The queue of heavy work: one job at a time, across restarts, each a command line in a process of its own.

Knows commands and folders, not what they compute. Start with `queue.py`.
"""
