"""The model card: valid front matter for the hub, working code, and no data from the user's machine."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from huggingface_hub import ModelCard
from PIL import Image
from tiny_runs import save_lora

from flatlora_diffusion.adapter.layers import lora_layers
from flatlora_diffusion.adapter.lora import add_lora
from flatlora_diffusion.adapter.new_tokens import add_tokens, embedding_parameters, save_embeddings
from flatlora_diffusion.config import AdapterConfig, TokenConfig, TrainConfig
from flatlora_diffusion.families.sdxl.labels import SDXL_LABELS
from flatlora_diffusion.lora_files.metadata import TrainingSummary
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.training.model_card import usage_code, write_model_card

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run on two images with two previews."""
    run = RunDir(tmp_path / "my icons")
    run.start({"note": "settings"}, [{"id": "private-name-0.png"}, {"id": "private-name-1.png"}])
    run.images.mkdir()
    for index in range(2):
        Image.new("RGB", (8, 8)).save(run.images / f"final-{index}.png")
    return run


def config(**settings: Any) -> TrainConfig:
    return TrainConfig().replace(max_train_steps=500, resolution=64, seed=7, instance_prompt="a TOK icon", **settings)


def facts(trigger: str = "TOK", step: int = 500, class_images: int = 0) -> TrainingSummary:
    return TrainingSummary(
        None, SDXL_LABELS, step, 1, 2, class_images, trigger, predicts_v=False, zero_terminal_snr=False
    )


def card(
    run: RunDir, config: TrainConfig, training: TrainingSummary | None = None, prompt: str = "a TOK fox"
) -> ModelCard:
    pictures = [(run.images / f"final-{index}.png", prompt) for index in range(2)]
    path = write_model_card(run, config, pictures, training or facts())
    assert path == run.folder / "README.md"
    return ModelCard.load(path)


def test_a_failed_card_keeps_the_previous_card(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    before = card(run, config()).text

    def fail(*args: Any) -> None:
        raise OSError("full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="full"):
        card(run, config(), facts("other"))
    assert ModelCard.load(run.folder / "README.md").text == before


def python_of(text: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return str(code)


def draw(code: str) -> bytes:
    """The image that a card's code saves in the working folder."""
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})
    with Image.open("image.png") as image:
        return image.tobytes()


def test_front_matter(run: RunDir) -> None:
    data = card(run, config(pretrained_model_name_or_path=SDXL)).data.to_dict()
    assert data == {
        "license": "openrail++",
        "library_name": "diffusers",
        "base_model": SDXL,
        "tags": ["text-to-image", "diffusers", "lora", "flat-lora", "stable-diffusion-xl", "template:sd-lora"],
        "instance_prompt": "a TOK icon",
        "widget": [{"text": "a TOK fox", "output": {"url": f"images/final-{index}.png"}} for index in range(2)],
    }


def test_a_plain_lora_is_not_called_flat(run: RunDir) -> None:
    written = card(run, config(method="lora"))
    assert "flat-lora" not in written.data.to_dict()["tags"]
    assert "lora" in written.data.to_dict()["tags"]
    assert "| method | lora |" in written.text
    assert "sigma" not in written.text
    assert "2409.14396" not in written.text


def test_a_card_counts_what_was_trained_on_and_the_steps_of_the_result(run: RunDir) -> None:
    """Held-out and class images are in the manifest too, and a result may be an earlier checkpoint."""
    held_out = [{"id": f"private-{index}.png", "is_held_out": True} for index in range(3)]
    run.manifest_file.write_text(json.dumps([{"id": "class-0.png"}, *run.manifest(), *held_out]))
    text = card(run, config(), facts(step=40, class_images=1)).text
    assert re.findall(r"(\d+) images?\b", text) == ["2", "1"]
    assert "| steps | 40 of 500 |" in text
    assert "| steps | 500 |" in card(run, config()).text


@pytest.mark.parametrize(
    ("base", "license_name", "hub_id"),
    [
        ("tiny", "apache-2.0", None),
        ("stabilityai/stable-diffusion-xl-refiner-1.0", "openrail++", "stabilityai/stable-diffusion-xl-refiner-1.0"),
        ("someone/sdxl-tune", "other", "someone/sdxl-tune"),
        ("/home/jane/bases/my-sdxl", "other", None),
        ("bases/my-sdxl.safetensors/", "other", "unused"),
    ],
)
def test_the_licence_and_the_base_where_they_are_known(
    run: RunDir, base: str, license_name: str, hub_id: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if hub_id == "unused":  # a relative path looks like a hub id; the file decides
        monkeypatch.chdir(tmp_path)
        (tmp_path / "bases").mkdir()
        (tmp_path / "bases" / "my-sdxl.safetensors").touch()
        base, hub_id = base.rstrip("/"), None
    written = card(run, config(pretrained_model_name_or_path=base))
    assert written.data.to_dict()["license"] == license_name
    assert written.data.to_dict().get("base_model") == hub_id
    assert f"| base | `{hub_id or Path(base).name}` |" in written.text


def test_no_path_name_caption_or_token_is_in_it(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "bases" / "my-sdxl").mkdir(parents=True)
    settings = config(
        pretrained_model_name_or_path=str(tmp_path / "bases" / "my-sdxl"),
        instance_data_dir=str(tmp_path / "pictures"),
        class_data_dir=str(tmp_path / "classes"),
        class_prompt="an icon",
        with_prior_preservation=True,
        init_lora=str(tmp_path / "previous.safetensors"),
        output_dir=str(run.folder),
        hub_token="hf_secret",
        hub_model_id="club/foxes",
    )
    card(run, settings, facts(class_images=100))
    text = (run.folder / "README.md").read_text(encoding="utf-8")
    for word in (
        str(tmp_path),
        tmp_path.name,
        "bases",
        "my-sdxl",
        "pictures",
        "classes",
        "previous",
        "my icons",
        "private",
        "hf_s",
    ):
        assert word not in text
    assert "A LoRA for an SDXL base in a local folder, trained with" in text
    assert "| base | an SDXL base in a local folder |" in text
    assert "Trained on 2 images, and on 100 images of the class" in text


def test_the_settings_that_matter_are_listed(run: RunDir) -> None:
    settings = config(
        sigma=0.05, rank=8, lora_alpha=16.0, learning_rate=2e-4, train_batch_size=1, gradient_accumulation_steps=4
    )
    text = card(run, settings).text
    for row in (
        "base | `tiny`",
        "method | flat-lora",
        "sigma | 0.05, cosine",
        "draws of eps | low_rank",
        "rank | 8",
        "alpha | 16",
        "learning rate | 0.0002, constant",
        "steps | 500",
        "batch size | 1 x 4 accumulated",
        "resolution | 64",
        "seed | 7",
    ):
        assert f"| {row} |" in text
    assert f"torch {torch.__version__}" in text


def test_the_pictures_are_shown_under_their_prompts(run: RunDir) -> None:
    text = card(run, config(), prompt="a <s0> fox | `red`\nand blue").text
    prompt = r"`a <s0> fox \| 'red' and blue`"
    assert f"| {prompt} | {prompt} |\n| --- | --- |\n" in text
    assert "| ![final-0](images/final-0.png) | ![final-1](images/final-1.png) |" in text


def test_a_card_without_pictures_has_no_widget(run: RunDir) -> None:
    written = ModelCard.load(write_model_card(run, config(), [], facts(trigger="")))
    assert "widget" not in written.data.to_dict()
    assert "images/" not in written.text
    assert "the captions of the images share no words" in written.text


def test_other_programs_get_the_copy_made_for_them(run: RunDir) -> None:
    assert "Put `my-icons.safetensors` into the LoRA folder of ComfyUI" in card(run, config()).text
    assert "Put `Foxes.safetensors` into" in card(run, config(output_name="Foxes")).text
    assert "plain LoRA" not in card(run, config()).text
    assert "made of a DoRA" in card(run, config(use_dora=True)).text


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"adapter": "full", "method": "lora"}])
def test_the_card_names_what_the_file_for_other_programs_lacks(run: RunDir, settings: dict[str, Any]) -> None:
    run.add_event({"event": "proof", "missed_by_plain_lora": 0.2251})
    assert "missing 22.5 %" in card(run, config(**settings)).text
    run.add_event({"event": "proof", "missed_by_plain_lora": 0.00003})
    assert "missing less than 0.1 %" in card(run, config(**settings)).text


def test_the_code_loads_from_the_hub_what_goes_there() -> None:
    settings = config(pretrained_model_name_or_path=SDXL, variant="fp16", push_to_hub=True, hub_model_id="club/foxes")
    code = usage_code(settings, [], "TOK")
    assert f'from_pretrained("{SDXL}", variant="fp16")' in code
    assert 'load_lora_weights("club/foxes", weight_name="pytorch_lora_weights.safetensors")\n' in code
    with_tokens = usage_code(settings.replace(train_text_encoder_ti=True), [], "TOK")
    assert 'hf_hub_download("club/foxes", "pytorch_lora_weights_emb.safetensors")' in with_tokens
    compile(with_tokens, "README.md", "exec")


def test_the_code_of_a_single_file_base() -> None:
    code = usage_code(config(pretrained_model_name_or_path="/x/my-sdxl.safetensors"), [], "")
    assert 'StableDiffusionXLPipeline.from_single_file("my-sdxl.safetensors").to(device, dtype)' in code


def test_the_code_samples_as_the_base_was_trained() -> None:
    code = usage_code(config(prediction_type="v_prediction", zero_terminal_snr=True, clip_skip=1), [], "TOK")
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert f"changes = {changes}\n" in code
    assert "num_inference_steps=25, clip_skip=1)" in code
    assert "scheduler" not in usage_code(config(), [], "TOK")


@pytest.mark.usefixtures("short_drawings")
@pytest.mark.parametrize("is_pivotal", [False, True])
def test_the_code_draws_with_the_lora(
    run: RunDir, base: Path, monkeypatch: pytest.MonkeyPatch, is_pivotal: bool
) -> None:
    """Run the code verbatim in the LoRA's folder, next to the base."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    if is_pivotal:
        add_tokens(pipeline, TokenConfig(), seed=0)
        save_embeddings(pipeline, run.folder)
    add_lora(pipeline.unet, AdapterConfig(), seed=0)
    for layer in lora_layers(pipeline.unet).values():
        torch.nn.init.constant_(layer.lora_B["default"].weight, 0.3)
    save_lora(pipeline, run.folder)
    shutil.copytree(base, run.folder / "BASE_FOLDER")
    monkeypatch.chdir(run.folder)

    # Another scheduler and layer than the base's, so that their lines run too.
    own = {"prediction_type": "v_prediction", "zero_terminal_snr": True, "clip_skip": 0} if is_pivotal else {}
    settings = config(pretrained_model_name_or_path=str(base), train_text_encoder_ti=is_pivotal, **own)
    written = card(run, settings)
    code = python_of(written.text)
    image = draw(code)
    without = [line for line in code.splitlines() if "load_lora_weights" not in line]
    assert draw("\n".join(without)) != image
    if is_pivotal:
        assert 'pipeline(prompt="a <s0><s1> fox"' in code
        assert written.data.to_dict()["instance_prompt"] == "a <s0><s1> icon"
        assert written.data.to_dict()["widget"][0]["text"] == "a <s0><s1> fox"
        loaded: dict[str, Any] = {}
        exec(compile(code, "README.md", "exec"), loaded)
        assert loaded["pipeline"].scheduler.config.rescale_betas_zero_snr
        for part, rows in embedding_parameters(pipeline).items():
            table = getattr(loaded["pipeline"], part).get_input_embeddings().weight
            assert torch.equal(table[-len(rows) :], rows)
