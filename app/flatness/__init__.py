"""The Flatness tab: measuring finished runs as a queued job, and showing the result.

Start with `view.py`.
"""
