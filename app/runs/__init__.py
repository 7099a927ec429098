"""The runs folder as the app sees it: which runs there are, what each is at, what may be done with it; the Runs tab.

Reads run folders, never the trainer. Start with `runs.py`.
"""
