"""`python -m flatlora_diffusion VERB`; without a verb it lists them."""

from __future__ import annotations

import sys

from flatlora_diffusion.commands.command_line import main

if __name__ == "__main__":
    sys.exit(main())
