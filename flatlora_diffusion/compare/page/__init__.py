"""The report of a comparison as one HTML page: Python prepares values, `templates/` shows them.

Knows the result as JSON and nothing of how it was measured. Start with `page.py`.
"""
