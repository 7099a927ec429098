"""The report of a comparison as one HTML page: Python prepares values, `templates/` renders them.

Knows the result as JSON, not how it was measured. Start with `page.py`.
"""
