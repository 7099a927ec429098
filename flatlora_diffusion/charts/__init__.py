"""Charts in one look: a colour, a line and a marker for each method, lines as PNG or SVG, rows of dots for tables.

Knows numbers and names, not where they come from. Start with `palette.py`, then `lines.py`.
"""
