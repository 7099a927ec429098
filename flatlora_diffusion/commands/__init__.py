"""The command-line programs; each imports other packages only when it runs.

Knows flags, messages and exit codes. Start with `command_line.py`.
"""
