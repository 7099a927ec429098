"""The form of a training, made from the definition of the settings, and the settings' labels.

Knows no tab. Start with `forms.py`.
"""
