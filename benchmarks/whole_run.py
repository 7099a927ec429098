"""What does a whole run take beside diffusers' own script? `python -m benchmarks.whole_run --script FILE`

FILE is `examples/dreambooth/train_dreambooth_lora_sdxl.py` of github.com/huggingface/diffusers; this repository has no
copy of it.
Both programs train the same LoRA with the same settings on the same images, as processes of their own from start to
saved file, imports, encoding, two sets of previews and logs included. They differ in the rest: ours keeps the latents
and the embeddings of the captions, the script encodes each batch; ours draws previews in 25 steps, the script in 50;
ours draws the base too, checks its first steps, and writes a card, a file for other tools and hashes. The arms take
turns, and each goes first in turn. Seconds are those of the processor, which other work on a machine disturbs least.
Two subjects: the tiny base, and a base with one block of SDXL's widths (640 wide, prompts of 2048).
Writes benchmarks/whole_run.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks import record
from flatlora_diffusion.config import SAMPLES, TINY
from flatlora_diffusion.families.paths import base_path

WIDTH, PROMPT_WIDTHS = 640, (768, 1280)
SUBJECTS: dict[str, dict[str, Any]] = {
    "tiny base": {"resolution": 64, "train_batch_size": 4, "num_validation_images": 4},
    "SDXL block": {"resolution": 32, "train_batch_size": 1, "num_validation_images": 1},
}
SETTINGS = {
    "instance_prompt": "3d icon",
    "validation_prompt": "3d icon of a crown",
    "rank": 16,
    "learning_rate": 1e-4,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "seed": 0,
    "report_to": "tensorboard",
}
OURS = ("--method", "lora", "--cache_latents")


# A small process between this one and the command: Linux counts the memory of the process that forks as the child's.
_LAUNCHER = """
import json, os, sys, time
start = time.perf_counter()
pid = os.spawnv(os.P_NOWAIT, sys.argv[2], sys.argv[2:])
_, status, usage = os.wait4(pid, 0)
wall = time.perf_counter() - start
peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
with open(sys.argv[1], "w") as report:
    json.dump([os.waitstatus_to_exitcode(status), [usage.ru_utime + usage.ru_stime, wall, peak]], report)
"""


class Took(NamedTuple):
    """What a process took."""

    cpu: float
    wall: float
    peak_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, required=True, help="train_dreambooth_lora_sdxl.py of diffusers")
    parser.add_argument("--steps", type=int, default=500, help="of a run on the tiny base; a fifth on the block")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=SUBJECTS)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    if not hasattr(os, "wait4"):
        raise SystemExit("Run this benchmark on Linux or macOS: Windows does not report the peak memory of a process.")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        commands, took = {}, {}
        for subject in args.subjects:
            base, steps = Path(folder) / subject.replace(" ", "-"), steps_of(subject, args.steps)
            make_base(subject, base)
            commands[subject] = commands_of(args.script, subject, steps, base, Path(folder))
            took[subject] = {arm: list[Took]() for arm in commands[subject]}
        for turn in range(args.turns):
            for subject in args.subjects:
                for arm in rotated(list(commands[subject]), turn):
                    took[subject][arm].append(run(commands[subject][arm], Path(folder) / "run", args.threads))
                print(subject, took[subject], flush=True)
            results = {
                subject: {"steps": steps_of(subject, args.steps), "turns": turn + 1, **figures(took[subject])}
                for subject in args.subjects
            }
            record.save(args.out, results)


def steps_of(subject: str, steps: int) -> int:
    return steps if subject == "tiny base" else steps // 5


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The names with each first in turn."""
    start = turn % len(names)
    return [*names[start:], *names[:start]]


def commands_of(script: Path, subject: str, steps: int, base: Path, folder: Path) -> dict[str, list[str]]:
    """The command of each arm; all write into `folder / "run"`."""
    images = folder / "images"
    images.mkdir(exist_ok=True)
    for file in (SAMPLES / "icons_3d").glob("*.png"):
        shutil.copy(file, images)  # the script reads each file of the folder as an image
    paths = {"pretrained_model_name_or_path": base, "instance_data_dir": images, "output_dir": folder / "run"}
    settings = {**SETTINGS, **SUBJECTS[subject], "max_train_steps": steps, **paths}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    ours = [sys.executable, "-m", "flatlora_diffusion", "train", *flags, *OURS]
    return {"diffusers": [sys.executable, str(script), *flags], "ours": ours}


def run(command: Sequence[str], output: Path, threads: int) -> Took:
    """Run a command in a new folder `output` to its end."""
    shutil.rmtree(output, ignore_errors=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log, tempfile.NamedTemporaryFile("r") as report:
        subprocess.run(
            [sys.executable, "-c", _LAUNCHER, report.name, *command], env=environment, stdout=log, stderr=log
        )
        code, took = json.load(report)
        if code != 0 or not (output / "pytorch_lora_weights.safetensors").is_file():
            log.seek(0)
            raise SystemExit(f"{' '.join(command[:4])} failed:\n{log.read().decode(errors='replace')[-4000:]}")
    return Took(*took)


def figures(took: dict[str, list[Took]]) -> dict[str, Any]:
    """The seconds of each run, the largest peak of each arm, and the median ratio of seconds within a turn."""
    ratios = [ours.cpu / script.cpu for ours, script in zip(took["ours"], took["diffusers"], strict=True)]
    return {
        "seconds": {arm: [round(run.cpu, 1) for run in rows] for arm, rows in took.items()},
        "wall_seconds": {arm: [round(run.wall, 1) for run in rows] for arm, rows in took.items()},
        "peak_bytes": {arm: max(run.peak_bytes for run in rows) for arm, rows in took.items()},
        "ours / diffusers": statistics.median(ratios),
    }


def make_base(subject: str, folder: Path) -> None:
    """Save the tiny base in fp32, which the script needs on a CPU, or random weights of SDXL's widths."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(base_path(TINY), torch_dtype=torch.float32)
    if subject == "SDXL block":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipeline.register_modules(**random_parts(pipeline.tokenizer.vocab_size))
    pipeline.to(torch.float32).save_pretrained(folder)


def random_parts(vocabulary: int) -> dict[str, torch.nn.Module]:
    """A UNet with one down and one up block of SDXL's middle width, and text encoders of one layer."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(WIDTH,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        layers_per_block=1,
        attention_head_dim=WIDTH // 64,
        cross_attention_dim=sum(PROMPT_WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + PROMPT_WIDTHS[1],
    )
    small, large = (
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2,
            num_attention_heads=width // 64,
            projection_dim=width,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        for width in PROMPT_WIDTHS
    )
    return {"unet": unet, "text_encoder": CLIPTextModel(small), "text_encoder_2": CLIPTextModelWithProjection(large)}


if __name__ == "__main__":
    main()
