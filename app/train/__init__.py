"""The Train tab: the form made of the settings, what a training will take, starting it.

Start with `tab.py`.
"""
