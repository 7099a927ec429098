"""Processes and files of this computer: starting commands, finding trainers, the database, caches of files.

Knows neither runs nor the page. Start with `launch.py`.
"""
