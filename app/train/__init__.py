"""The Train tab: the form, time and memory estimates, starting and watching trainings.

Start with `tab.py`.
"""
