"""The programs as a user starts them, on the tiny random pipeline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from flatlora_diffusion.lora_file import LORA_FILE

ROOT = Path(__file__).parents[2]


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8"
    )


@pytest.mark.slow
def test_the_script_trains_and_a_stock_pipeline_draws_other_images_with_its_lora(
    base: Path, icons: Path, tmp_path: Path
) -> None:
    run = tmp_path / "Ausgabe für Icons"  # spaces and umlauts must not matter
    done = start(
        "train_dreambooth_flatlora.py",
        f"--pretrained_model_name_or_path={base}",
        f"--instance_data_dir={icons}",
        f"--output_dir={run}",
        "--max_train_steps=2",
        "--train_batch_size=1",
        "--learning_rate=0.05",
        "--sigma_schedule=constant",
    )
    assert done.returncode == 0, done.stderr
    assert "3 images, captions 3/3" in done.stderr
    seed = json.loads((run / "config.json").read_text())["seed"]
    assert f"seed {seed}" in done.stderr
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)

    def draw() -> bytes:
        rng = torch.Generator().manual_seed(0)
        image = pipeline("an icon", height=32, width=32, num_inference_steps=2, generator=rng).images[0]
        return image.tobytes()

    before = draw()
    pipeline.load_lora_weights(run / LORA_FILE)
    assert draw() != before
    pipeline.unload_lora_weights()
    assert draw() == before


@pytest.mark.slow
def test_compare_trains_both_arms_once_and_shows_base_lora_and_flat_lora(
    base: Path, icons: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("an icon of a fox\n\nan icon of a cow\n", encoding="utf-8")
    arguments = (
        "-m",
        "flatlora_diffusion",
        "compare",
        f"--pretrained_model_name_or_path={base}",
        f"--instance_data_dir={icons}",
        f"--heldout_dir={icons}",
        f"--prompts_file={prompts}",
        f"--output_dir={tmp_path / 'pair'}",
        "--max_train_steps=2",
        "--train_batch_size=1",
        "--learning_rate=0.01",
        "--seed=0",
    )
    done = start(*arguments)
    assert done.returncode == 0, done.stderr
    picture = Image.open(tmp_path / "pair" / "compare.png")
    assert picture.width > 2 * 192
    assert picture.height > 3 * 192
    rows = json.loads((tmp_path / "pair" / "compare.json").read_text())
    assert [row["name"] for row in rows] == ["base", "lora", "flat-lora"]
    assert len({row["heldout_loss"] for row in rows}) == 3
    assert rows[1]["seconds_per_step"] > 0
    files = [tmp_path / "pair" / method / LORA_FILE for method in ("lora", "flat-lora")]
    made = [file.stat().st_mtime_ns for file in files]
    again = start(*arguments)
    assert again.returncode == 0, again.stderr
    assert "LoRA: already trained" in again.stderr
    assert [file.stat().st_mtime_ns for file in files] == made
