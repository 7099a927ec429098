"""Does a run need the memory that was estimated? `python -m benchmarks.gpu_memory RUN OUT.json`

The estimate counts the driver's context, which PyTorch's allocator does not; it is left out here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import record
from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.memory.estimate import estimate_memory
from flatlora_diffusion.storage.run_dir import RunDir


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    run = RunDir(args.run)
    steps = [event for event in run.events() if event["event"] == "step"]
    estimate = estimate_memory(TrainConfig.from_dict(run.config()))
    seconds = sorted(event["seconds"] for event in steps)
    figures = {
        "steps": len(steps),
        "seconds_per_step": seconds[len(seconds) // 2],
        "peak_bytes": max(event["memory"] for event in steps),
        "estimated_bytes": estimate.total - estimate.context,
        "estimated_parts": estimate.parts,
    }
    record.save(args.out, figures)
    print(f"{figures['peak_bytes'] / 2**30:.2f} GiB used, {figures['estimated_bytes'] / 2**30:.2f} GiB estimated")


if __name__ == "__main__":
    main()
