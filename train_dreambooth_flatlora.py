"""DreamBooth-LoRA and Flat-LoRA training for SDXL: parse the settings, train, report."""

from __future__ import annotations

import sys

from flatlora_diffusion.commands.command_line import train_main

if __name__ == "__main__":
    sys.exit(train_main())
