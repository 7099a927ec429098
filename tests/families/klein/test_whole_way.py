"""What a user does with a FLUX.2 klein after training: compare, measure, draw, read the card; on a random klein."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tiny_random_klein import RESOLUTION, TOKENS, save_tiny_random_klein

from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.compare import evaluator, inputs, pictures
from flatlora_diffusion.config import INCLUDED_BASES, TINY_KLEIN, ModelConfig, TrainConfig
from flatlora_diffusion.families.drawing import ImageSettings
from flatlora_diffusion.families.klein.pipeline import load_klein
from flatlora_diffusion.families.registry import family_of
from flatlora_diffusion.lora_files.metadata import portable_base_name
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir
from flatlora_diffusion.training.trainer import train

CPU = torch.device("cpu")
# Names that mean nothing to a user of klein; `lora_unet_blocks` is the name of a setting.
OF_SDXL = re.compile(r"SDXL|\bUNet\b|(?<!lora_)\bunet\b")


@pytest.fixture(scope="module")
def run(klein: Path, icons: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A Flat-LoRA of three steps that checks itself, with a preview."""
    folder = tmp_path_factory.mktemp("run") / "mine"
    settings: dict[str, Any] = {
        "pretrained_model_name_or_path": str(klein),
        "instance_data_dir": str(icons),
        "output_dir": str(folder),
        "max_train_steps": 3,
        "learning_rate": 0.02,
        "sigma_schedule": "constant",
        "validation_prompt": "an icon of a cup",
        "num_validation_images": 1,
        "selfcheck": "always",
        "seed": 0,
        "report_to": "none",
    }
    train(TrainConfig.from_dict(settings))
    return RunDir(folder)


@pytest.fixture(scope="module")
def heldout(icons: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mirrored icons, which are other images."""
    folder = tmp_path_factory.mktemp("heldout")
    for file in icons.glob("*.png"):
        ImageOps.mirror(Image.open(file)).save(folder / file.name)
        shutil.copy(file.with_suffix(".txt"), folder)
    return folder


def test_a_run_checks_its_first_steps(run: RunDir) -> None:
    checks = [event for event in run.events() if event["event"] == "selfcheck"]
    assert {"noise_std", "sigma_zero", "base_weights", "loss"} <= {event["what"] for event in checks}
    assert all(event["is_right"] for event in checks), checks


def test_the_code_of_the_card_draws_the_image_of_generate(
    run: RunDir, klein: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (run.folder / "README.md").read_text(encoding="utf-8")
    assert not OF_SDXL.findall(text)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "torch.bfloat16" in code, "fp16 overflows in some transformers"
    assert f"height={RESOLUTION}, width={RESOLUTION}, max_sequence_length={TOKENS})" in code
    monkeypatch.chdir(run.folder)
    generator = "generator=torch.Generator().manual_seed(5), max_sequence_length"
    exec(code.replace("BASE_FOLDER", str(klein)).replace("max_sequence_length", generator), {})
    by_card = np.asarray(Image.open("image.png"), dtype=int)
    (run.folder / "image.png").unlink()
    drawing = ["--prompts", "an icon of a cup", "--seeds", "5", "--output_dir", str(tmp_path)]
    assert main(["generate", "--pretrained_model_name_or_path", str(klein), "--lora", str(run.folder), *drawing]) == 0
    base, ours = (np.asarray(Image.open(file), dtype=int) for file in sorted((tmp_path / "001").glob("01_*.png")))
    assert np.abs(ours - by_card).max() <= 1
    assert np.abs(ours - base).max() > 1
    with Image.open(tmp_path / "001" / "grid.png") as grid:
        said = next(json.loads(value) for value in grid.info.values() if str(value).startswith("{"))
    assert (said["num_inference_steps"], said["guidance_scale"]) == (50, 4.0), "klein's own"


def test_defaults_of_an_image_are_those_of_the_base(tmp_path: Path, klein: Path, monkeypatch: Any) -> None:
    asked, given = ImageSettings(RESOLUTION), ImageSettings(RESOLUTION, steps=3, guidance=2.0)
    base = load_klein(ModelConfig(str(klein)), CPU, torch.float32)
    assert (base.steps_of(asked), base.guidance_of(asked), base.steps_of(given), base.guidance_of(given)) == (
        *(50, 4.0),
        *(3, 2.0),
    )
    distilled = load_klein(ModelConfig(str(save_tiny_random_klein(tmp_path / "distilled", True))), CPU, torch.float32)
    generator = pictures.PictureGenerator(distilled, RESOLUTION, tmp_path)
    assert generator.passes_per_picture == 4, "four steps without guidance"
    assert pictures.PictureGenerator(distilled, RESOLUTION, tmp_path, guidance=4.0).guidance == 1.0
    monkeypatch.setitem(INCLUDED_BASES, TINY_KLEIN, klein)
    assert load_klein(ModelConfig(TINY_KLEIN), CPU, torch.float32).steps_of(asked) == 25


@pytest.mark.parametrize(
    ("is_distilled", "flag", "value"),
    [(False, "guidance_rescale", "0.7"), (True, "guidance_scale", "3.0"), (True, "negative_prompt", "'blur'")],
)
def test_settings_that_an_image_does_not_depend_on_are_refused_before_the_first(
    is_distilled: bool, flag: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny_random_klein(tmp_path / "base", is_distilled)
    given = ["--pretrained_model_name_or_path", str(base), f"--{flag}", value.strip("'")]
    assert main(["generate", "--prompts", "a cup", "--output_dir", str(tmp_path / "out"), *given]) == 2
    assert f"{flag}={value} " in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_an_arm_that_does_not_fit_the_base_is_refused_before_any_training(
    klein: Path, icons: Path, heldout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--instance_data_dir", str(icons), "--heldout_dir", str(heldout), "--output_dir", str(tmp_path / "out")]
    flags = ["--arms", "lora", "lora:snr_gamma=5", "--max_train_steps", "2"]
    assert main(["compare", "--pretrained_model_name_or_path", str(klein), *flags, *places]) == 2
    assert "--arms lora:snr_gamma=5: snr_gamma=5.0 does not fit FLUX.2 klein" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*/"))


def test_flatness_is_measured(run: RunDir, klein: Path, icons: Path, heldout: Path, tmp_path: Path) -> None:
    few = "--sigmas 0.1 --rise_draws 2 --radii 0.01 --eigenvalues 1 --lanczos_steps 2 --trace_probes 2"
    fewer = "--surface_points 3 --slice_directions 2"
    moved = ["--pretrained_model_name_or_path", str(klein), "--instance_data_dir", str(icons)]
    out = [*moved, "--heldout_dir", str(heldout), "--output_dir", str(tmp_path / "out")]
    assert main(["flatness", str(run.folder), *few.split(), *fewer.split(), *out]) == 0
    for file in (tmp_path / "out").iterdir():
        if file.suffix in (".md", ".html", ".json"):
            assert not OF_SDXL.findall(file.read_text(encoding="utf-8").partition("plotly")[0]), file.name
    assert json.loads((tmp_path / "out" / "flatness.json").read_text(encoding="utf-8"))


@pytest.mark.usefixtures("without_a_process")
def test_two_arms_and_an_average_are_compared(
    klein: Path, icons: Path, heldout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator, "STRENGTHS", (0.5, 1.0))
    monkeypatch.setattr(evaluator, "INCREASE_DRAWS", 1)
    monkeypatch.setattr(inputs, "PictureGenerator", partial(pictures.PictureGenerator, steps=1))
    flags = ["--arms", "lora", "flat-lora", "lora:members=2", "--no_controls", "--num_checkpoints", "1"]
    flags += ["--num_prompts", "1", "--max_train_steps", "2", "--seed", "0", "--report_to", "none"]
    places = ["--instance_data_dir", str(icons), "--heldout_dir", str(heldout), "--output_dir", str(tmp_path / "out")]
    assert main(["compare", "--pretrained_model_name_or_path", str(klein), *flags, *places]) == 0
    result = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert [arm["name"] for arm in result["arms"]] == ["LoRA", "Flat-LoRA", "LoRA, average of 2"]
    assert result["settings"]["guidance_scale"] == 4.0
    page = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert not OF_SDXL.findall(re.sub(r"base64,[A-Za-z0-9+/=]+", "", page))
    card = (tmp_path / "out" / "lora-members-2" / "seed-0" / "README.md").read_text(encoding="utf-8")
    assert not OF_SDXL.findall(card)
    assert (tmp_path / "out" / "lora-members-2" / "seed-0" / LORA_FILE).is_file()


def test_a_quantized_base_trains_and_its_lora_fits_the_whole_base(
    klein: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("torchao")
    settings |= {"quantize_base": "torchao-int8", "offload": True, "cache_latents": True, "method": "sam", "rho": 0.05}
    file = train(TrainConfig.from_dict(settings))
    assert main(["inspect", str(file), "--base", str(klein)]) == 0
    (event,) = [event for event in RunDir(file.parent).events() if event["event"] == "proof"]
    assert event


def test_a_run_on_the_tiny_klein_names_it(
    klein: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(INCLUDED_BASES, TINY_KLEIN, klein)
    file = train(TrainConfig.from_dict(settings | {"pretrained_model_name_or_path": TINY_KLEIN}))
    config = TrainConfig().updated_from(file.with_name("config.json"))
    assert portable_base_name(config) == TINY_KLEIN
    text = (file.parent / "README.md").read_text(encoding="utf-8")
    assert "A LoRA for the tiny klein of flatlora-diffusion" in text
    assert 'Flux2KleinPipeline.from_pretrained("samples/' in text
    assert "license: apache-2.0" in text
    capsys.readouterr()
    assert main(["inspect", str(file)]) == 0, "the base is found by the file's names and shapes"
    assert "transformer.single_transformer_blocks.1" in capsys.readouterr().out
    assert family_of(config.model).denoiser_title == "transformer"
