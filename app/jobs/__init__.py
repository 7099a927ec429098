"""The queue of heavy work: one job at a time, across restarts; each started as a command line of its own.

Knows commands and folders, not what they compute. Start with `jobs.py`.
"""
