"""The first steps of a run watch themselves: measures that only the real device can give, told in log and events.

Knows nothing of what to do about them. Start with `watch.py`.
"""
