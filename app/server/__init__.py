"""The web server around the page: which requests are let through, logins, upload limits, and a readable log.

Knows neither runs nor tabs. Start with `guard.py`.
"""
