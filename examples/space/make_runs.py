"""Train the runs that the Space shows: `python -m examples.space.make_runs`, some minutes on two CPU cores.

A LoRA, a Flat-LoRA and the average of three LoRAs, on samples/icons_3d with the demo's preset at rank 1: at its rank
of 16 the three files have 18 MB.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.storage.run_dir import LORA_FILE

RUNS = Path(__file__).parent / "runs"
ROOT = Path(__file__).parents[2]
TRAININGS = {
    "icons-lora": ("--method", "lora"),
    "icons-flat-lora": ("--method", "flat-lora"),
    "icons-average": ("--method", "lora", "--members", "3", "--remove_members"),
}
SHIPPED = ("config.json", "manifest.json", "events.jsonl", "README.md", LORA_FILE)  # all that the app reads of a run


def make_runs(folder: Path) -> int:
    """Train the runs and put what the app reads of them into `folder`; returns the exit code."""
    preset = ("--config", str(ROOT / "samples/presets/demo.json"), "--rank", "1", "--report_to", "none")
    with tempfile.TemporaryDirectory() as scratch:
        for name, flags in TRAININGS.items():
            run = Path(scratch, name)
            if code := main(["train", *preset, *flags, "--output_dir", str(run)]):
                return code
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / name).mkdir(parents=True)
            for file in SHIPPED:
                shutil.copy(run / file, folder / name)
    return 0


if __name__ == "__main__":
    sys.exit(make_runs(RUNS))
