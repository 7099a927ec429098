"""Build the tiny SDXL base from public icon sets: `python -m samples.tiny_sdxl.build --work FOLDER`.

Every stage is skipped when its result is in FOLDER, and a killed stage goes on where it was. Takes hours on two CPU
cores; needs npm (to fetch the icons) and the `recipe` extra of this package. Weights differ from machine to
machine in their last digits. `--publish` copies the result over the one that ships with the repository.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from flatlora_diffusion.evaluation.judge import load_judge
from samples.tiny_sdxl.recipe.captions import train_tokenizers
from samples.tiny_sdxl.recipe.drawing import draw_icons, load_tiny_sdxl
from samples.tiny_sdxl.recipe.icons import Concept, choose_concepts, load_concepts, recognizable, render
from samples.tiny_sdxl.recipe.judge import collect_renders, train_judge
from samples.tiny_sdxl.recipe.loop import Schedule
from samples.tiny_sdxl.recipe.quality import STYLED_GUIDANCE, draw, measure_quality, quality_table, write_report
from samples.tiny_sdxl.recipe.second_judge import load_second_judge, train_second_judge
from samples.tiny_sdxl.recipe.unet import cache_latents, list_pictures, save_base, train_unet
from samples.tiny_sdxl.recipe.vae import train_vae

STAGES = ("vae", "unet", "judge", "judge2", "quality")
CONCEPTS = 200
UNET_SCHEDULE = Schedule(steps=8_862, learning_rate=6e-4, warmup=300, plateau=0.89844, ema=0.995)
HERE = Path(__file__).parent

Images = np.ndarray[Any, np.dtype[np.uint8]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads, renders and checkpoints")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--start", type=Path, help="a base in this format to train on, instead of random weights")
    parser.add_argument("--guidance", type=float, default=STYLED_GUIDANCE, help="of the styled prompts of `quality`")
    parser.add_argument("--publish", action="store_true", help="copy base, judge and report into samples/tiny_sdxl")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    concepts = load_concepts(args.work)
    if args.start is not None:
        for part in ("vae", "tokenizer", "tokenizer_2"):
            shutil.copytree(args.start / part, args.work / "pipeline" / part, dirs_exist_ok=True)
    build: dict[str, Callable[[list[Concept], Path], None]] = {
        "vae": build_vae,
        "unet": partial(build_unet, start=args.start),
        "judge": build_judge,
        "judge2": build_second_judge,
        "quality": partial(report_quality, guidance=args.guidance),
    }
    for stage in args.stages:
        build[stage](concepts, args.work)
    if args.publish:
        for part in ("pipeline", "judge", "report"):
            target = HERE / "judge" if part == "judge" else HERE
            shutil.copytree(args.work / part, target, dirs_exist_ok=True)


def build_vae(concepts: list[Concept], work: Path) -> None:
    folder = work / "pipeline" / "vae"
    if not folder.exists():
        train_vae(flat_images(concepts, work), work).half().save_pretrained(folder)


def build_unet(concepts: list[Concept], work: Path, start: Path | None) -> None:
    pipeline = work / "pipeline"
    if (pipeline / "unet").exists():
        return
    if start is None:
        train_tokenizers(concepts, pipeline)
    vae = AutoencoderKL.from_pretrained(pipeline / "vae", dtype=torch.float32)
    data = cache_latents(vae, list_pictures(recognizable(concepts), choose_concepts(concepts, CONCEPTS)))
    save_base(train_unet(data, pipeline, UNET_SCHEDULE, work / "unet.safetensors", start), pipeline)


def build_judge(concepts: list[Concept], work: Path) -> None:
    if not (work / "judge").exists():
        renders = collect_renders(concepts, flat_images(concepts, work))
        train_judge(concepts, renders, work / "pipeline" / "tokenizer", work, work / "judge")


def build_second_judge(concepts: list[Concept], work: Path) -> None:
    if not (work / "judge2").exists():
        train_second_judge(concepts, collect_renders(concepts, flat_images(concepts, work)), work, work / "judge2")


def report_quality(concepts: list[Concept], work: Path, guidance: float) -> None:
    renders = collect_renders(concepts, flat_images(concepts, work))
    base = work / "pipeline"
    artist = partial(draw_icons, base, kept=work / "drawn", load=load_tiny_sdxl)
    drawn = draw(artist, recognizable(concepts), choose_concepts(concepts, CONCEPTS), styled_guidance=guidance)
    second = load_second_judge(work / "judge2") if (work / "judge2").exists() else None
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae", dtype=torch.float32).eval()
    report = measure_quality(concepts, drawn, renders, base, vae, (load_judge(work / "judge"), second))
    write_report(report, drawn, work / "report")
    print(quality_table(report))


def flat_images(concepts: list[Concept], work: Path) -> Images:
    """All flat renders, (N, 64, 64, 3), concept by concept and style by style."""
    cache = work / "flat64.npy"
    if not cache.exists():
        np.save(cache, np.stack([render(svg) for concept in concepts for svg in concept.flat_svgs.values()]))
    return np.asarray(np.load(cache))


if __name__ == "__main__":
    main()
