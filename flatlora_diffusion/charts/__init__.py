"""Charts with a colour, a line style and a marker for each method: line charts as PNG or SVG, and rows of dots.

Knows numbers and names, not their source. Start with `palette.py`, then `lines.py`.
"""
