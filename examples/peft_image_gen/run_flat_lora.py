"""PEFT's benchmark of image generation with Flat-LoRA: its `run.py` as it is, for experiments with a `flat_lora.json`.

    cd peft/method_comparison/image-gen
    python .../examples/peft_image_gen/run_flat_lora.py -v experiments/lora/flux2-klein-flat-sigma0.1/

The arguments are those of `run.py`. Without a `flat_lora.json` the experiment runs as by `run.py`.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from flatlora_diffusion import FlatLora

SETTINGS = "flat_lora.json"  # fields of `NoiseConfig`


def perturbed(make_optimizer: Callable[..., Any], settings: Mapping[str, Any]) -> Callable[..., Any]:
    """The benchmark's `get_optimizer_and_scheduler`, after which each training forward of the model sees eps."""

    def make_optimizer_and_perturb(model: nn.Module, *, max_steps: int, **options: Any) -> Any:
        made = make_optimizer(model, max_steps=max_steps, **options)
        flat = FlatLora(model, total_steps=max_steps, **settings)
        # Without an argument, since the benchmark's optimizer also has the frozen weights, which it never steps.
        flat.follow()
        return made

    return make_optimizer_and_perturb


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark in the working folder."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("path_experiment", nargs="?", default="")
    parser.add_argument("--bucket_name")
    settings = Path(parser.parse_known_args(arguments)[0].path_experiment, SETTINGS)
    sys.path.insert(0, str(Path.cwd()))  # as if run.py were started itself
    if settings.is_file():
        # run.py takes the function from this module, so it has to be another one before run.py begins.
        utils: Any = import_module("utils")
        noise = json.loads(settings.read_text(encoding="utf-8"))
        utils.get_optimizer_and_scheduler = perturbed(utils.get_optimizer_and_scheduler, noise)
    sys.argv[:] = ["run.py", *arguments]
    runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
