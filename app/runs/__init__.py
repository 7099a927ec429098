"""The runs folder as the app sees it: runs, their states, files and actions.

Reads run folders and knows neither the trainer nor the page. Start with `runs.py`.
"""
