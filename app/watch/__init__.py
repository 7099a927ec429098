"""What has changed since the last look, told by times and sizes of files and by living processes; no file is opened.

Knows where runs lie, not what they are. Start with `kept.py`.
"""
