"""Normal numbers by their place, the same on every device: by PyTorch, and by a kernel that adds them to W.

Knows no layers and no norms. Start with `numbers.py`.
"""
