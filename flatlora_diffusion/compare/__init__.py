"""Arms trained alike and compared fairly: what they shared, paired differences, nulls, advice, the report.

Trains through the command line and reads run folders. Start with `comparison.py`, then `arms.py`.
"""
