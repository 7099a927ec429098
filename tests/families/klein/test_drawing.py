"""The ComfyUI workflow of an image of FLUX.2 klein: nodes, noise levels and noise."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from tiny_random_klein import RESOLUTION, tiny_random_klein

from flatlora_diffusion.config import ModelConfig, TrainConfig
from flatlora_diffusion.families.drawing import ImageSettings
from flatlora_diffusion.families.klein.drawing import KleinDrawing, workflow_for_api, workflow_for_page
from flatlora_diffusion.families.klein.pipeline import load_klein, wrap_pipeline
from flatlora_diffusion.training.trainer import train

# Inputs and outputs of ComfyUI's nodes, as nodes.py, nodes_custom_sampler.py and nodes_flux.py define them.
REQUIRED: dict[str, dict[str, Any]] = {
    "UNETLoader": {"unet_name": str, "weight_dtype": str},
    "CLIPLoader": {"clip_name": str, "type": str, "device": str},
    "VAELoader": {"vae_name": str},
    "LoraLoaderModelOnly": {"model": "MODEL", "lora_name": str, "strength_model": float},
    "CLIPTextEncode": {"clip": "CLIP", "text": str},
    "CFGGuider": {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "cfg": float},
    "KSamplerSelect": {"sampler_name": str},
    "Flux2Scheduler": {"steps": int, "width": int, "height": int},
    "RandomNoise": {"noise_seed": int},
    "EmptyFlux2LatentImage": {"width": int, "height": int, "batch_size": int},
    "SamplerCustomAdvanced": {
        "noise": "NOISE",
        "guider": "GUIDER",
        "sampler": "SAMPLER",
        "sigmas": "SIGMAS",
        "latent_image": "LATENT",
    },
    "VAEDecode": {"samples": "LATENT", "vae": "VAE"},
    "SaveImage": {"images": "IMAGE", "filename_prefix": str},
}
OUTPUTS = {
    "UNETLoader": ["MODEL"],
    "CLIPLoader": ["CLIP"],
    "VAELoader": ["VAE"],
    "LoraLoaderModelOnly": ["MODEL"],
    "CLIPTextEncode": ["CONDITIONING"],
    "CFGGuider": ["GUIDER"],
    "KSamplerSelect": ["SAMPLER"],
    "Flux2Scheduler": ["SIGMAS"],
    "RandomNoise": ["NOISE"],
    "EmptyFlux2LatentImage": ["LATENT"],
    "SamplerCustomAdvanced": ["LATENT", "LATENT"],
    "VAEDecode": ["IMAGE"],
}
PLAIN = KleinDrawing(
    prompt="a fox (red)",
    negative_prompt="fog",
    seed=7,
    size=1024,
    steps=50,
    guidance=4.0,
    sampler="FlowMatchEulerDiscrete",
    base="flux-2-klein-base-4b",
    loras=(("fox", 0.6), ("hat", 1.2)),
)
CPU = torch.device("cpu")


def only(nodes: dict[str, Any], kind: str) -> dict[str, Any]:
    (found,) = [node["inputs"] for node in nodes.values() if node["class_type"] == kind]
    return dict(found)


@pytest.mark.parametrize("drawing", [PLAIN, replace(PLAIN, loras=())])
def test_the_workflow_is_one_of_comfyui_s_own_nodes_with_all_that_they_require(drawing: KleinDrawing) -> None:
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


def test_its_values_are_those_of_the_image() -> None:
    nodes = workflow_for_api(PLAIN)
    assert only(nodes, "UNETLoader")["unet_name"] == "flux-2-klein-base-4b.safetensors"
    assert only(nodes, "CLIPLoader").items() >= {"clip_name": "qwen_3_4b.safetensors", "type": "flux2"}.items()
    assert only(nodes, "Flux2Scheduler") == {"steps": 50, "width": 1024, "height": 1024}
    assert only(nodes, "RandomNoise")["noise_seed"] == 7
    guider = only(nodes, "CFGGuider")
    assert guider["cfg"] == 4.0
    texts = [nodes[guider[name][0]]["inputs"]["text"] for name in ("positive", "negative")]
    assert texts == ["a fox (red)", "fog"], "brackets are no weights there"
    last = nodes[guider["model"][0]]["inputs"]
    first = nodes[last["model"][0]]["inputs"]
    assert (first["lora_name"], first["strength_model"]) == ("fox.safetensors", 0.6)
    assert (last["lora_name"], last["strength_model"]) == ("hat.safetensors", 1.2)


def test_the_page_s_workflow_has_the_same_nodes_values_and_links() -> None:
    api, page = workflow_for_api(PLAIN), workflow_for_page(PLAIN)
    assert [node["type"] for node in page["nodes"]] == [node["class_type"] for node in api.values()]
    by_number = {link[0]: link for link in page["links"]}
    for node in page["nodes"]:
        given = api[str(node["id"])]["inputs"]
        for slot, entry in enumerate(node["inputs"]):
            _, source, output, target, into, kind = by_number[entry["link"]]
            assert [str(source), output] == given[entry["name"]]
            assert (target, into, kind) == (node["id"], slot, entry["type"])
        values = [value for value in given.values() if not isinstance(value, list)]
        assert [value for value in node["widgets_values"] if value != "fixed"] == values


def levels_of_comfyui(tokens: int, steps: int) -> list[float]:
    """Flux2Scheduler by its definition, for fewer than 4300 tokens: 1 to 0 in equal steps, then a shift."""
    at_10, at_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    slope = (at_200 - at_10) / 190
    shift = math.exp(slope * steps + at_200 - 200 * slope)
    inner = [1 - step / steps for step in range(1, steps)]
    return [1.0, *(shift / (shift + 1 / level - 1) for level in inner), 0.0]


def test_noise_and_noise_levels_are_those_of_comfyui(klein: Path) -> None:
    base = load_klein(ModelConfig(str(klein)), CPU, torch.float32)
    noise: list[torch.Tensor] = []
    base.denoiser.register_forward_pre_hook(
        lambda _, __, inputs: noise.append(inputs["hidden_states"]), with_kwargs=True
    )
    base.sample_latents(["a cup"], [7], ImageSettings(RESOLUTION, steps=6, guidance=1.0))
    expected = levels_of_comfyui(tokens=16, steps=6)
    torch.testing.assert_close(base.pipeline.scheduler.sigmas, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    drawn = torch.randn((1, 16, 4, 4), generator=torch.manual_seed(7))  # of the size of EmptyFlux2LatentImage
    assert torch.equal(noise[0], drawn.flatten(2).transpose(1, 2))


def test_a_base_that_comfyui_s_nodes_do_not_fit_has_no_workflow(klein: Path) -> None:
    base = load_klein(ModelConfig(str(klein)), CPU, torch.float32)
    asked = "a fox", 0, ImageSettings(RESOLUTION), "mine", ()
    assert base.describe_image(*asked) is None, "16 channels instead of 128"
    whole = tiny_random_klein(channels=32, levels=4)
    assert wrap_pipeline(whole).describe_image(*asked) is not None
    whole.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert wrap_pipeline(whole).describe_image(*asked) is None, "other noise levels"


def test_a_finished_run_has_a_workflow_of_its_first_preview(icons: Path, tmp_path: Path) -> None:
    tiny_random_klein(channels=32, levels=4).save_pretrained(tmp_path / "base")
    settings = {
        "pretrained_model_name_or_path": str(tmp_path / "base"),
        "instance_data_dir": str(icons),
        "output_dir": str(tmp_path / "fox"),
        "validation_prompt": "an icon of a fox",
        "num_validation_images": 1,
        "max_train_steps": 1,
        "seed": 3,
        "report_to": "none",
    }
    run = train(TrainConfig.from_dict(settings)).parent
    api = json.loads((run / "fox.comfyui_api.json").read_text(encoding="utf-8"))
    assert only(api, "LoraLoaderModelOnly")["lora_name"] == "fox.safetensors"
    assert only(api, "UNETLoader")["unet_name"] == "BASE.safetensors"
    assert (only(api, "RandomNoise")["noise_seed"], only(api, "Flux2Scheduler")["steps"]) == (0, 50)
    assert json.loads(Image.open(run / "fox.png").info["prompt"]) == api
    assert json.loads((run / "fox.comfyui.json").read_text(encoding="utf-8"))["version"] == 0.4
    assert not list(run.glob("*.parameters.txt")), "A1111 has no FLUX.2"
