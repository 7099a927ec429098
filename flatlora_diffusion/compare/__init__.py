"""Fair comparisons: trains arms under equal conditions and reports paired differences, controls and advice.

Trains through the command line and reads run folders. Start with `comparison.py`, then `arms.py`.
"""
