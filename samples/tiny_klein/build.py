"""Build the tiny FLUX.2 klein base from public icon sets: `python -m samples.tiny_klein.build --work FOLDER`.

Icons, captions, VAE and judges are those of samples/tiny_sdxl. A killed training goes on where it was. Its learning
rate stays up for `--steps` and then falls for `--falling` more, so that a copy of FOLDER can be brought to an end at
any time by smaller `--steps`. Needs npm and the `recipe` extra of this package. `--publish` copies the result over the
one that ships with the repository.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2
from transformers import Qwen2TokenizerFast

from flatlora_diffusion.config import SAMPLES
from flatlora_diffusion.evaluation.judge import load_judge
from flatlora_diffusion.storage.tensor_io import cached_tensors
from samples.tiny_klein.recipe.base import build_vae
from samples.tiny_klein.recipe.drawing import load_tiny_klein
from samples.tiny_klein.recipe.text import train_tokenizer
from samples.tiny_klein.recipe.training import normalize, save_base, train_base
from samples.tiny_sdxl.build import CONCEPTS, build_second_judge, flat_images
from samples.tiny_sdxl.recipe.drawing import draw_icons
from samples.tiny_sdxl.recipe.icons import Concept, choose_concepts, load_concepts, recognizable
from samples.tiny_sdxl.recipe.judge import collect_renders
from samples.tiny_sdxl.recipe.loop import Schedule
from samples.tiny_sdxl.recipe.quality import draw, measure_quality, quality_table, write_report
from samples.tiny_sdxl.recipe.second_judge import load_second_judge
from samples.tiny_sdxl.recipe.unet import Data, encode_pictures, list_pictures

STAGES = ("base", "judge2", "quality")
LEARNING_RATE = 2e-3
GUIDANCE = 4.0  # Flux2KleinPipeline's own
HERE = Path(__file__).parent
TINY_SDXL = SAMPLES / "tiny_sdxl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads, latents and checkpoints")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--steps", type=int, default=40_000, help="at the full learning rate")
    parser.add_argument("--falling", type=int, default=2_000, help="steps at a falling learning rate")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights")
    parser.add_argument("--publish", action="store_true", help="copy base and report into samples/tiny_klein")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    concepts = load_concepts(args.work)
    total = args.steps + args.falling
    schedule = Schedule(total, LEARNING_RATE, warmup=100, ema=args.ema, plateau=args.steps / total, save_seconds=180.0)
    build: dict[str, Callable[[list[Concept], Path], None]] = {
        "base": partial(build_base, schedule=schedule),
        "judge2": build_second_judge,
        "quality": report_quality,
    }
    for stage in args.stages:
        build[stage](concepts, args.work)
    if args.publish:
        for part in ("pipeline", "report"):
            shutil.copytree(args.work / part, HERE, dirs_exist_ok=True)


def build_base(concepts: list[Concept], work: Path, schedule: Schedule) -> None:
    if not (work / "tokenizer").exists():
        train_tokenizer(concepts, work / "tokenizer")
    tokenizer = Qwen2TokenizerFast.from_pretrained(work / "tokenizer")
    vae = build_vae(TINY_SDXL)
    pictures = list_pictures(recognizable(concepts), choose_concepts(concepts, CONCEPTS))
    cached = cached_tensors(work / "latents.safetensors", lambda: {"latents": encode_pictures(vae, pictures)})
    data = Data(normalize(vae, cached["latents"]), pictures)
    base = train_base(data, tokenizer, schedule, work / "base.safetensors")
    save_base(base, vae, tokenizer, work / "pipeline")


def report_quality(concepts: list[Concept], work: Path) -> None:
    renders = collect_renders(concepts, flat_images(concepts, work))
    base = work / "pipeline"
    artist = partial(draw_icons, base, kept=work / "drawn", load=load_tiny_klein)
    drawn = draw(artist, recognizable(concepts), choose_concepts(concepts, CONCEPTS), GUIDANCE, GUIDANCE)
    vae = AutoencoderKLFlux2.from_pretrained(base, subfolder="vae", dtype=torch.float32).eval()
    judges = load_judge(TINY_SDXL / "judge"), load_second_judge(work / "judge2")
    report = measure_quality(concepts, drawn, renders, base, vae, judges)
    write_report(report, drawn, work / "report")
    print(quality_table(report))


if __name__ == "__main__":
    main()
