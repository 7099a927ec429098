"""Workflows and parameters for other tools: nodes, noise levels, noise, text and conditioning."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from PIL import Image

from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.families.drawing import ImageSettings, portable_base_name
from flatlora_diffusion.families.sdxl.drawing import (
    SdxlDrawing,
    parameters_text,
    sampling_names,
    workflow_for_api,
    workflow_for_page,
)
from flatlora_diffusion.families.sdxl.pipeline import Sdxl
from flatlora_diffusion.training.trainer import train

# The inputs that ComfyUI's nodes require, as its INPUT_TYPES name them, with what they take.
REQUIRED: dict[str, dict[str, Any]] = {
    "CheckpointLoaderSimple": {"ckpt_name": str},
    "LoraLoader": {
        "model": "MODEL",
        "clip": "CLIP",
        "lora_name": str,
        "strength_model": float,
        "strength_clip": float,
    },
    "ModelSamplingDiscrete": {"model": "MODEL", "sampling": str, "zsnr": bool},
    "RescaleCFG": {"model": "MODEL", "multiplier": float},
    "CLIPSetLastLayer": {"clip": "CLIP", "stop_at_clip_layer": int},
    "CLIPTextEncode": {"clip": "CLIP", "text": str},
    "ConditioningZeroOut": {"conditioning": "CONDITIONING"},
    "EmptyLatentImage": {"width": int, "height": int, "batch_size": int},
    "KSampler": {
        "model": "MODEL",
        "seed": int,
        "steps": int,
        "cfg": float,
        "sampler_name": str,
        "scheduler": str,
        "positive": "CONDITIONING",
        "negative": "CONDITIONING",
        "latent_image": "LATENT",
        "denoise": float,
    },
    "VAEDecode": {"samples": "LATENT", "vae": "VAE"},
    "SaveImage": {"images": "IMAGE", "filename_prefix": str},
}
OUTPUTS = {
    "CheckpointLoaderSimple": ["MODEL", "CLIP", "VAE"],
    "LoraLoader": ["MODEL", "CLIP"],
    "ModelSamplingDiscrete": ["MODEL"],
    "RescaleCFG": ["MODEL"],
    "CLIPSetLastLayer": ["CLIP"],
    "CLIPTextEncode": ["CONDITIONING"],
    "ConditioningZeroOut": ["CONDITIONING"],
    "EmptyLatentImage": ["LATENT"],
    "KSampler": ["LATENT"],
    "VAEDecode": ["IMAGE"],
    "SaveImage": [],
}
PLAIN = SdxlDrawing(
    prompt="a fox (red)",
    negative_prompt="fog",
    seed=7,
    size=1024,
    steps=25,
    guidance=5.0,
    sampler=("euler", "Euler"),
    spacing=("ddim_uniform", "DDIM"),
    base="sd_xl_base_1.0",
    loras=(("fox", 1.0),),
)
RICH = replace(
    PLAIN,
    negative_prompt="",
    is_zeroed=True,
    clip_skip=1,
    predicts_v=True,
    zero_terminal_snr=True,
    loras=(("fox", 0.8),),
    rescale=0.7,
)


@pytest.mark.parametrize("drawing", [PLAIN, RICH, replace(PLAIN, loras=())])
def test_the_workflow_is_one_of_comfyui_s_own_nodes_with_all_that_they_require(drawing: SdxlDrawing) -> None:
    nodes = workflow_for_api(drawing)
    for node in nodes.values():
        required = REQUIRED[node["class_type"]]
        assert node["inputs"].keys() == required.keys()
        for name, value in node["inputs"].items():
            if isinstance(required[name], str):
                source, output = value
                assert OUTPUTS[nodes[source]["class_type"]][output] == required[name]
            else:
                assert type(value) is required[name], name


def one(nodes: dict[str, Any], kind: str) -> dict[str, Any]:
    (result,) = [node["inputs"] for node in nodes.values() if node["class_type"] == kind]
    return dict(result)


def test_what_a_base_or_a_prompt_needs_beyond_the_usual_is_there() -> None:
    nodes = workflow_for_api(RICH)
    assert one(nodes, "ModelSamplingDiscrete").items() >= {"sampling": "v_prediction", "zsnr": True}.items()
    assert one(nodes, "CLIPSetLastLayer")["stop_at_clip_layer"] == -3
    sampler = one(nodes, "KSampler")
    assert nodes[sampler["negative"][0]]["class_type"] == "ConditioningZeroOut"
    assert nodes[sampler["model"][0]]["class_type"] == "RescaleCFG"
    rescale = one(nodes, "RescaleCFG")
    assert rescale["multiplier"] == 0.7
    assert nodes[rescale["model"][0]]["class_type"] == "ModelSamplingDiscrete"
    assert one(nodes, "LoraLoader").items() >= {"lora_name": "fox.safetensors", "strength_clip": 0.8}.items()
    kinds = {node["class_type"] for node in workflow_for_api(PLAIN).values()}
    assert not kinds & {"ModelSamplingDiscrete", "RescaleCFG", "CLIPSetLastLayer", "ConditioningZeroOut"}


def test_the_page_s_workflow_has_the_same_nodes_values_and_links() -> None:
    api, page = workflow_for_api(RICH), workflow_for_page(RICH)
    assert [node["type"] for node in page["nodes"]] == [node["class_type"] for node in api.values()]
    by_number = {link[0]: link for link in page["links"]}
    for node in page["nodes"]:
        given = api[str(node["id"])]["inputs"]
        for slot, entry in enumerate(node["inputs"]):
            _, source, output, target, into, kind = by_number[entry["link"]]
            assert [str(source), output] == given[entry["name"]]
            assert (target, into, kind) == (node["id"], slot, entry["type"])
        for slot, entry in enumerate(node["outputs"]):
            assert entry["links"] == [n for n, link in by_number.items() if link[1:3] == [node["id"], slot]]
        values = [value for value in given.values() if not isinstance(value, list)]
        assert [value for value in node["widgets_values"] if value != "fixed"] == values
    sampler = next(node for node in page["nodes"] if node["type"] == "KSampler")
    assert sampler["widgets_values"] == [7, "fixed", 25, 5.0, "euler", "ddim_uniform", 1.0]


def levels_of_comfyui(name: str, sigmas: torch.Tensor, steps: int) -> list[float]:
    """The noise levels of ComfyUI's schedulers by their definition: which of the model's `sigmas` they take."""
    count = len(sigmas)
    places = {
        "ddim_uniform": list(range(1, count, count // steps))[::-1],
        "simple": [count - 1 - int(step * count / steps) for step in range(steps)],
    }[name]
    return [float(sigmas[place]) for place in places] + [0.0]


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_the_noise_levels_are_those_of_the_preview(spacing: str) -> None:
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing=spacing
    )
    names = sampling_names(scheduler)
    assert names is not None
    levels = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5
    scheduler.set_timesteps(25)
    expected = levels_of_comfyui(names[1][0], levels, 25)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_a_sampler_without_an_equal_gives_no_workflow() -> None:
    assert sampling_names(HeunDiscreteScheduler()) is None
    assert sampling_names(EDMEulerScheduler()) is None
    assert sampling_names(EulerDiscreteScheduler(use_karras_sigmas=True)) == (("euler", "Euler"), ("karras", "Karras"))


def test_the_noise_is_what_comfyui_draws_from_the_seed(sdxl: Sdxl) -> None:
    """On the CPU, in fp32, an image at a time."""
    generator = [torch.Generator("cpu").manual_seed(7)]
    made = sdxl.pipeline.prepare_latents(1, 4, 64, 64, torch.float32, torch.device("cpu"), generator)
    expected = torch.randn(made.shape, generator=torch.manual_seed(7))
    torch.testing.assert_close(made / sdxl.pipeline.scheduler.init_noise_sigma, expected)


def test_plain_brackets_are_no_weights() -> None:
    assert one(workflow_for_api(replace(PLAIN, negative_prompt="", loras=(), predicts_v=True)), "SaveImage")
    texts = [n["inputs"]["text"] for n in workflow_for_api(PLAIN).values() if n["class_type"] == "CLIPTextEncode"]
    assert texts == [r"a fox \(red\)", "fog"]
    assert parameters_text(replace(PLAIN, prompt="[a] fox")).startswith(r"\[a\] fox <lora:fox:1>")


def test_the_text_of_a1111() -> None:
    first, negative, last = parameters_text(PLAIN).split("\n")
    assert (first, negative) == (r"a fox \(red\) <lora:fox:1>", "Negative prompt: fog")
    assert last.startswith(
        "Steps: 25, Sampler: Euler, Schedule type: DDIM, CFG scale: 5.0, Seed: 7, Size: 1024x1024, "
        "Model: sd_xl_base_1.0, RNG: CPU, Version: flatlora-diffusion "
    )


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", "sd_xl_base_1.0"),
        ("someone/my-sdxl", "my-sdxl"),
        ("black-forest-labs/FLUX.2-klein-base-4B", "flux-2-klein-base-4b"),
        ("noob.safetensors", "noob"),
        (None, "BASE"),
    ],
)
def test_the_base_has_the_name_of_its_file_there(name: str | None, there: str) -> None:
    assert portable_base_name(name) == there


def settings(base: Path | str, icons: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig.from_dict(
        {
            "pretrained_model_name_or_path": str(base),
            "instance_data_dir": str(icons),
            "instance_prompt": "an icon",
            "output_dir": str(tmp_path / "fox"),
            "validation_prompt": "an icon of a (red) fox",
            "num_validation_images": 2,
            "validation_epochs": 1,
            "max_train_steps": 2,
            "learning_rate": 0.01,
            "resolution": 32,
            "hub_token": "hf_secret",
            "seed": 0,
            "report_to": "none",
        }
    )


def test_a_finished_run_says_how_its_pictures_are_drawn_elsewhere(base: Path, icons: Path, tmp_path: Path) -> None:
    run = train(settings(base, icons, tmp_path)).parent
    api = json.loads((run / "fox.comfyui_api.json").read_text(encoding="utf-8"))
    sampler = one(api, "KSampler")
    assert (sampler["seed"], sampler["steps"], sampler["cfg"]) == (0, 25, 5.0)
    assert one(api, "LoraLoader")["lora_name"] == "fox.safetensors"
    assert one(api, "CheckpointLoaderSimple")["ckpt_name"] == "BASE.safetensors"
    assert nodes_of(run / "fox.png") == api
    assert json.loads((run / "fox.comfyui.json").read_text(encoding="utf-8"))["version"] == 0.4
    text = (run / "fox.parameters.txt").read_text(encoding="utf-8")
    assert text.startswith(r"an icon of a \(red\) fox <lora:fox:1>")
    assert Image.open(run / "fox.png").info["parameters"] == text.rstrip("\n")
    assert one(nodes_of(run / "images" / "step-2-1.png"), "KSampler")["seed"] == 1
    plain = nodes_of(run / "images" / "base-0.png")
    assert "LoraLoader" not in {node["class_type"] for node in plain.values()}
    assert "prompt" not in Image.open(run / "images" / "step-1-0.png").info, "no tool has the LoRA of this step"
    said = "".join(str(Image.open(file).info) for file in run.rglob("*.png")) + text + json.dumps(api)
    for private in (str(tmp_path), str(base.parent), "hf_secret"):
        assert private not in said


@pytest.mark.usefixtures("short_drawings")
def test_a_later_run_moves_what_tells_of_the_earlier_one_aside(base: Path, icons: Path, tmp_path: Path) -> None:
    config = settings(base, icons, tmp_path)
    run = train(config).parent
    train(config.replace(validation_prompt=None))
    names = ["fox.comfyui.json", "fox.comfyui_api.json", "fox.parameters.txt"]
    assert [(run / name).exists() for name in names] == [False] * 3
    assert [(run / "earlier-1" / name).exists() for name in names] == [True] * 3


@pytest.mark.usefixtures("short_drawings")
def test_a_lora_of_the_tiny_base_has_no_workflow(icons: Path, tmp_path: Path) -> None:
    run = train(settings("tiny", icons, tmp_path).replace(max_train_steps=1)).parent
    assert not list(run.glob("*.comfyui*"))
    assert "prompt" not in Image.open(run / "fox.png").info


def nodes_of(picture: Path) -> dict[str, Any]:
    nodes: dict[str, Any] = json.loads(Image.open(picture).info["prompt"])
    return nodes


def test_two_loras_are_one_after_the_other() -> None:
    both = replace(PLAIN, loras=(("fox", 0.6), ("hat", 1.2)))
    nodes = workflow_for_api(both)
    loaders = [node["inputs"] for node in nodes.values() if node["class_type"] == "LoraLoader"]
    assert [(node["lora_name"], node["strength_model"]) for node in loaders] == [
        ("fox.safetensors", 0.6),
        ("hat.safetensors", 1.2),
    ]
    assert nodes[loaders[1]["model"][0]]["inputs"] == loaders[0]
    assert "<lora:fox:0.6> <lora:hat:1.2>" in parameters_text(both)


def test_a_picture_of_generate_is_opened_by_other_tools(base: Path, lora: Path, tmp_path: Path) -> None:
    from flatlora_diffusion.config import GenerateConfig, ModelConfig
    from flatlora_diffusion.gallery.gallery import generate

    shutil.copytree(lora.parent, tmp_path / "renamed")
    asked = GenerateConfig(
        model=ModelConfig(pretrained_model_name_or_path=str(base)),
        prompts=("a (red) fox",),
        negative_prompt="fog",
        seeds=(4,),
        lora=(f"{tmp_path / 'renamed'}",),
        strengths=(0.5,),
        num_inference_steps=2,
        resolution=32,
        output_dir=str(tmp_path / "out"),
    )
    (grid,) = generate(asked)
    plain, drawn = sorted(file for file in grid.parent.glob("*.png") if file != grid)
    nodes = nodes_of(drawn)
    assert one(nodes, "LoraLoader").items() >= {"lora_name": "renamed.safetensors", "strength_model": 0.5}.items()
    assert one(nodes, "KSampler").items() >= {"seed": 4, "steps": 2, "cfg": 5.0}.items()
    assert "Schedule type: DDIM" in Image.open(drawn).info["parameters"]
    assert "LoraLoader" not in {node["class_type"] for node in nodes_of(plain).values()}
    assert json.loads(Image.open(drawn).info["flatlora_diffusion"])["seed"] == 4


def test_guidance_is_rescaled_for_zero_terminal_snr_and_for_no_other(base: Path, sdxl: Sdxl) -> None:
    from flatlora_diffusion.config import ModelConfig
    from flatlora_diffusion.families.sampling import generate_images
    from flatlora_diffusion.families.sdxl.pipeline import load_sdxl

    model = ModelConfig(
        pretrained_model_name_or_path=str(base), prediction_type="v_prediction", zero_terminal_snr=True
    )
    actual = load_sdxl(model, torch.device("cpu"), torch.float32)
    assert (actual.default_rescale, sdxl.default_rescale) == (0.7, 0.0)
    drawn = [
        generate_images(actual, ["a fox"], [0], ImageSettings(32, 2, rescale=rescale))[0].tobytes()
        for rescale in (None, 0.7, 0.0)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    drawing = actual.describe_image("a fox", 0, ImageSettings(32), "noob", ())
    assert drawing is not None
    assert drawing.rescale == 0.7
