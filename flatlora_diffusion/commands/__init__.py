"""The command-line programs; each imports other packages only when it runs.

Knows flags, messages and exit codes. Start with `command_line.py`.
"""

import os

# For PyTorch, which reads it when it is imported. Threads of GNU's OpenMP wait for each other in a loop, by default so
# long that another busy process slows a small model on two cores many times; with fewer turns a quiet machine is as
# fast.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
