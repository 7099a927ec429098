"""The programs as a user starts them, on the tiny random pipeline."""

from __future__ import annotations

import html
import json
import logging
import os
import re
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageOps

from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.families.sdxl.single_file import save_single_file
from flatlora_diffusion.storage.run_dir import LORA_FILE

ROOT = Path(__file__).parents[2]
WITHOUT_TORCH = (
    "import sys; from flatlora_diffusion.commands.command_line import main; code = main(sys.argv[1:]); "
    "print(code, sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
)


def start(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "nowhere.safetensors"],
        ["import", "nowhere.safetensors"],
        ["export", "nowhere.safetensors"],
        ["resize", "nowhere.safetensors"],
        ["merge", "--base", "tiny", "--lora", "nowhere.safetensors@0.5", "--output", "x"],
        ["merge", "--base", "nowhere.safetensors", "--lora", "x", "--output", "x"],
        ["extract", "--base", "tiny", "--tuned", "nowhere.safetensors"],
        ["generate", "--lora", "nowhere.safetensors"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_file_that_is_not_there_is_told_before_torch_is_imported(arguments: list[str]) -> None:
    done = start("-c", WITHOUT_TORCH, *arguments)
    assert done.stdout == "2 []\n", done.stderr
    assert done.stderr.startswith("error: ")
    assert "nowhere.safetensors" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "--instance_data_dir", "IMAGES"], "fox.png has no caption"),
        (["compare", "--instance_data_dir", "IMAGES", "--max_train_steps", "2"], "fox.png has no caption"),
        (["train", "--dataset_config", "IMAGES/data.toml"], "fox.png has no caption"),
        (["train", "--instance_data_dir", "IMAGES/empty"], "has no readable image"),
        (["train", "--preset", "demo", "--resolution", "33"], "resolution=33 must be a multiple of 16"),
        (["demo", "--resolution", "33"], "resolution=33 must be a multiple of 16"),
        (["evidence", "--resolution", "1000"], "resolution=1000 must be a multiple of 32"),
        (["generate", "--prompts", "a", "--resolution", "33"], "resolution=33 must be a multiple of 16"),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) else "",
)
def test_images_captions_and_sizes_are_looked_at_before_torch_is_imported(
    tmp_path: Path, arguments: list[str], told: str
) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "fox.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "fox.png").read_bytes()[:60])
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.toml").write_text(f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{tmp_path.as_posix()}'\n")
    done = start("-c", WITHOUT_TORCH, *(argument.replace("IMAGES", str(tmp_path)) for argument in arguments))
    assert done.stdout == "2 []\n", done.stderr
    assert told in done.stderr
    assert "damaged" not in done.stderr, "an image that is skipped needs no caption"


@contextmanager
def hanging_up() -> Iterator[tuple[str, list[int]]]:
    """The address of a server that ends every connection at once, and a list with a number for each."""
    calls: list[int] = []

    class HangUp(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            calls.append(len(calls))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), HangUp) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", calls
        server.shutdown()


@pytest.mark.long
@pytest.mark.parametrize("is_file", [True, False], ids=["file", "hub-id"])
def test_extract_without_a_network_asks_the_hub_once(base: Path, tmp_path: Path, is_file: bool) -> None:
    """Its libraries would ask many times, with pauses of a minute in all."""
    single = save_single_file(StableDiffusionXLPipeline.from_pretrained(base), tmp_path / "tuned.safetensors")
    tuned = str(single) if is_file else "somebody/sdxl"
    arguments = ["-m", "flatlora_diffusion", "extract", "--base", str(base), "--tuned", tuned]
    with hanging_up() as (address, calls):
        away = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_ENDPOINT": address}
        done = start(*arguments, "--output", str(tmp_path / "x.safetensors"), HF_HOME=str(tmp_path / "hub"), **away)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "the hub cannot be reached" in done.stderr
    assert len(calls) == 1


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
    assert done.stderr.splitlines()[0] == done.stdout.splitlines()[-1] == f"base: {base}, 32 pixels"
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


@pytest.mark.long
@pytest.mark.usefixtures("without_a_process")
def test_compare_trains_each_run_once_and_reports_base_arms_and_nulls(
    base: Path, icons: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    prompts, heldout, out = tmp_path / "prompts.txt", tmp_path / "heldout", tmp_path / "pair"
    prompts.write_text("an icon of a fox\n\nan icon of a cow\n", encoding="utf-8")
    heldout.mkdir()
    for file in icons.glob("*.png"):
        ImageOps.mirror(Image.open(file)).save(heldout / file.name)
        (heldout / f"{file.stem}.txt").write_text("an icon", encoding="utf-8")
    arguments = [
        "compare",
        f"--pretrained_model_name_or_path={base}",
        f"--instance_data_dir={icons}",
        f"--heldout_dir={heldout}",
        f"--prompts_file={prompts}",
        f"--output_dir={out}",
        "--num_checkpoints=2",
        "--num_prompts=2",
        "--max_train_steps=3",
        "--train_batch_size=1",
        "--learning_rate=0.01",
    ]
    assert main(arguments) == 0
    assert "cannot tell: Flat-LoRA \N{MINUS SIGN} LoRA in held-out loss" in capsys.readouterr().out
    picture = Image.open(out / "compare.png")
    assert picture.width > 2 * 192
    assert picture.height > 3 * 192
    found = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    arms = [found["values"][arm]["0"]["heldout_loss"] for arm in ("lora", "flat-lora")]
    assert len({found["base"]["heldout_loss"], *arms}) == 3
    nulls = {row["name"]: row for row in found["nulls"]}
    equal = nulls["Flat-LoRA at sigma 0 against LoRA"]
    assert (equal["picture_difference"], equal["weight_difference"], equal["heldout_difference"]) == (0, 0, 0)
    assert nulls["LoRA with other draws against LoRA"]["weight_difference"] > 0
    assert nulls["Flat-LoRA with another eps against Flat-LoRA"]["weight_difference"] > 0
    assert all(fact["holds"] for fact in found["proof"])
    for arm in ("lora", "flat-lora"):
        points = found["trajectories"][arm]["0"]
        assert [point["step"] for point in points] == [0, 2, 3]
        assert points[-1]["heldout_loss"] == found["values"][arm]["0"]["heldout_loss"]
        assert points[0]["heldout_loss"] == found["base"]["heldout_loss"]
    assert {row["matched"] for row in found["paired"]} == {"steps", "clean loss", "seconds"}
    page = (out / "compare.html").read_text(encoding="utf-8")
    assert found["verdict"] in html.unescape(re.sub("</?span>", "", page))
    assert str(tmp_path) not in page + json.dumps(found)
    files = sorted(out.glob(f"*/seed-0/{LORA_FILE}"))
    assert len(files) == 5
    made = [file.stat().st_mtime_ns for file in files]
    with caplog.at_level(logging.INFO):
        assert main(arguments) == 0
    assert "LoRA, seed 0: already trained" in caplog.text
    assert [file.stat().st_mtime_ns for file in files] == made
