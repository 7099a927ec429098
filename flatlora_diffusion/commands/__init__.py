"""The programs as command lines; every other package is imported only when its program runs.

Knows flags, messages and exit codes. Start with `command_line.py`.
"""
