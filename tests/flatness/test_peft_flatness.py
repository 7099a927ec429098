"""Flatness of PEFT models: equal to W' + t d by hand, and the model is unchanged."""

from __future__ import annotations

import ast
import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_by_hand import add_to_base, lora_layers, merged_weight
from module_surface import surface as left_behind
from peft import LoHaConfig, LoraConfig, get_peft_model
from PIL import Image
from tiny_adapters import adalora_case, full_case
from tiny_models import Adapter, Case, add_second_adapter, clip_case, llama_case, randomize_adapters, t5_case, toy_case
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from flatlora_diffusion import ConfigError, FlatLora, LandscapeConfig, peft_flatness
from flatlora_diffusion.charts.palette import FLAT_LORA, LORA
from flatlora_diffusion.flatness import peft_models
from flatlora_diffusion.flatness.landscape import Landscape, axis, direction
from flatlora_diffusion.storage.rng import FLATNESS

ROOT = Path(__file__).parents[2]
QUICK = LandscapeConfig(seed=5, sigmas=(0.2,), rise_draws=2, extent=0.5, surface_points=3, slice_directions=2)
CASES = {"t5": t5_case, "llama": llama_case, "clip": clip_case, "toy with convolutions": toy_case}


def undrawn(models: Mapping[str, nn.Module], loss: Any, folder: Path) -> list[Landscape]:
    """The figures; charts take longer than all else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft_models, "write_landscape", lambda *_: None)
        return peft_flatness(models, loss, folder, QUICK)


def measured(case: Case, folder: Path) -> Landscape:
    (result,) = undrawn({"LoRA": case.model}, case.loss, folder)
    return result


def clean(case: Case, merge: bool = False) -> float:
    """The loss of the model itself, or of what PEFT's own merging leaves of it."""
    with torch.no_grad():
        return float(case.loss(case.model.merge_and_unload() if merge else None))


def moved(case: Case, steps: Mapping[str, Tensor]) -> float:
    """The loss of a copy of the model to whose W the steps were added, by hand; so it is at W' + steps."""
    with torch.no_grad():
        return float(case.loss(add_to_base(copy.deepcopy(case.model), steps)))


def merged_by_hand(model: nn.Module) -> dict[str, Tensor]:
    return {name: merged_weight(layer) for name, layer in lora_layers(model).items()}


def along(weights: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    result = direction({f"{name}.weight": weight for name, weight in weights.items()}, QUICK.seed, index)
    return {name.removesuffix(".weight"): step for name, step in result.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_surface_is_the_loss_at_w_prime_and_steps_added_by_hand(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    case.model.eval()
    result, weights = measured(case, tmp_path), merged_by_hand(case.model)
    one, two = along(weights, 0), along(weights, 1)
    for row, b in enumerate(axis(0.5, 3)):
        for column, a in enumerate(axis(0.5, 3)):
            expected = moved(case, {layer: a * one[layer] + b * two[layer] for layer in weights})
            assert result.surface[row][column] == pytest.approx(expected, rel=1e-4), (a, b)
    assert result.loss == pytest.approx(clean(case), rel=1e-5)
    for layer, step in one.items():  # as long as the rows of W', not of W or of A and B
        torch.testing.assert_close(step.flatten(1).norm(dim=1), weights[layer].flatten(1).norm(dim=1))
    assert result.slices[0] == pytest.approx(result.surface[1])
    assert result.slices[1] == pytest.approx([row[1] for row in result.surface])


@pytest.mark.parametrize("name", CASES)
def test_the_rise_is_that_of_the_noise_of_training(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    case.model.eval()
    flat = FlatLora(case.model, sigma=0.2, schedule="constant", seed=QUICK.seed, prefix=FLATNESS, draw="full")
    draws = [{layer: flat.noise(layer, step=draw) for layer in flat.layers} for draw in range(2)]
    flat.detach()
    still = clean(case)
    for eps, rise in zip(draws, measured(case, tmp_path).rises["filter"][0].values, strict=True):
        both = [moved(case, {layer: sign * one for layer, one in eps.items()}) for sign in (1, -1)]
        assert rise == pytest.approx(sum(both) / 2 - still, rel=1e-2, abs=1e-5)


def test_the_model_is_bit_for_bit_what_it_was(tmp_path: Path) -> None:
    case = t5_case(Adapter(dropout=0.1))
    case.model.train()
    case.model.base_model.model.encoder.eval()
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    modes = [module.training for module in case.model.modules()]
    grads, hung = [one.requires_grad for one in case.model.parameters()], left_behind(case.model)
    state = torch.get_rng_state()

    def fails(model: nn.Module) -> Tensor:
        raise KeyboardInterrupt

    measured(case, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        peft_flatness({"LoRA": case.model}, fails, tmp_path, QUICK)
    after = case.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert [module.training for module in case.model.modules()] == modes
    assert [one.requires_grad for one in case.model.parameters()] == grads
    assert left_behind(case.model) == hung
    assert torch.equal(torch.get_rng_state(), state)


def test_merged_and_unmerged_adapters_give_one_landscape(tmp_path: Path) -> None:
    case = clip_case()
    plain = measured(case, tmp_path)
    case.model.merge_adapter()
    merged = case.model.state_dict()
    before = {name: value.clone() for name, value in merged.items()}
    assert numbers(measured(case, tmp_path)) == pytest.approx(numbers(plain), rel=1e-3, abs=1e-5)
    assert all(torch.equal(value, merged[name]) for name, value in before.items())
    assert clean(clip_case(), merge=True) == pytest.approx(plain.loss, rel=1e-5)


def two_adapters() -> Case:
    case = toy_case()
    add_second_adapter(case)
    return case


def loha_case() -> Case:
    base = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5))
    model = get_peft_model(base, LoHaConfig(r=2, target_modules=["0", "2"], init_weights=False))
    x, y = torch.randn(9, 6, generator=torch.Generator().manual_seed(1)), torch.zeros(9, 5)
    return Case(model, lambda one: one(x), y)


@pytest.mark.parametrize(
    "make",
    [
        lambda: t5_case(Adapter(dora=True)), lambda: toy_case(Adapter(dora=True)), adalora_case,
        lambda: full_case()[0], two_adapters, loha_case, lambda: llama_case(Adapter(bias="all")),
    ],
    ids=["DoRA", "DoRA of convolutions", "AdaLoRA", "full", "two adapters", "LoHa", "biases"],
)  # fmt: skip
def test_w_prime_is_what_any_adapter_makes(make: Any, tmp_path: Path) -> None:
    case = make()
    case.model.eval()
    result = measured(case, tmp_path)
    assert result.loss == pytest.approx(clean(case), rel=1e-4)
    assert result.surface[0][0] != pytest.approx(result.loss, rel=1e-4)


def test_a_switched_off_adapter_is_measured_as_the_base(tmp_path: Path) -> None:
    case = llama_case()
    case.model.eval()
    with case.model.disable_adapter():
        base = clean(case)
        assert measured(case, tmp_path).loss == pytest.approx(base, rel=1e-6)
    assert measured(case, tmp_path).loss != pytest.approx(base, rel=1e-4)


def test_a_weight_that_two_layers_share_moves_only_where_it_is_adapted(tmp_path: Path) -> None:
    case = llama_case(Adapter(targets=("lm_head",)))
    llama = case.model.base_model.model
    llama.model.embed_tokens.weight = llama.lm_head.get_base_layer().weight
    case.model.eval()
    assert measured(case, tmp_path).loss == pytest.approx(clean(case), rel=1e-5)


def test_an_attached_flat_lora_changes_nothing(tmp_path: Path) -> None:
    case = toy_case()
    plain = measured(case, tmp_path)
    flat = FlatLora(case.model, sigma=0.5, schedule="constant", total_steps=4)
    flat.follow(torch.optim.AdamW([one for one in case.model.parameters() if one.requires_grad]))
    case.model.train()
    assert numbers(measured(case, tmp_path)) == numbers(plain)
    flat.detach()


@pytest.fixture(scope="module")
def vits() -> dict[str, nn.Module]:
    """A LoRA and a Flat-LoRA of one ViT, the second without PEFT's wrapper around the model."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=3, **sizes))
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
    wrapped: Any = get_peft_model(copy.deepcopy(base), lora)
    added = copy.deepcopy(base)
    added.add_adapter(lora)
    for seed, model in enumerate((wrapped, added)):
        randomize_adapters(model, seed)
    return {"LoRA": wrapped, "Flat-LoRA": added}


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(3)
    return [
        {"pixel_values": torch.randn(rows, 3, 16, 16, generator=rng), "labels": torch.arange(rows) % 3}
        for rows in (4, 2)
    ]


def test_two_models_come_on_one_page_with_a_file_of_figures(
    vits: dict[str, nn.Module], batches: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    lora, flat = peft_flatness(vits, batches, tmp_path / "new" / "out", QUICK, {"task": "made up"})
    result = json.loads((tmp_path / "new" / "out" / "flatness.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in result["figures"]] == ["LoRA", "Flat-LoRA"]
    assert result["figures"][0]["surface"] == lora.surface != flat.surface
    assert result["losses"] == {"LoRA": lora.loss, "Flat-LoRA": flat.loss}
    assert result["axis"] == [-0.5, 0.0, 0.5]
    assert result["weights"] == 4 * 16 * 16
    assert result["settings"] == {
        "seed": 5, "sigmas": [0.2], "rise_draws": 2, "extent": 0.5, "surface_points": 3, "slice_directions": 2,
    }  # fmt: skip
    assert result["task"] == "made up"
    vits["LoRA"].eval()
    with torch.no_grad():
        expected = sum(float(vits["LoRA"](**batch).loss) for batch in batches) / 2
    assert lora.loss == pytest.approx(expected, rel=1e-5)
    assert Image.open(tmp_path / "new" / "out" / "surface.png").width > 500
    pixels = np.asarray(Image.open(tmp_path / "new" / "out" / "slices.png").convert("RGB")).reshape(-1, 3)
    seen = {f"#{pixel.tobytes().hex()}" for pixel in np.unique(pixels, axis=0)}
    assert {look.tone.light for look in (LORA, FLAT_LORA)} <= seen, "each in its own colour"


def test_draws_are_common_however_peft_is_wrapped_around(
    vits: dict[str, nn.Module], batches: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    wrapped: Any = vits["LoRA"]
    inside = wrapped.base_model.model
    one, two = undrawn({"wrapped": wrapped, "inside": inside}, batches, tmp_path)
    assert numbers(one) == numbers(two)


def test_what_cannot_be_measured_is_said_before_anything_is(
    vits: dict[str, nn.Module], batches: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    def refused(models: Mapping[str, nn.Module], loss: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            peft_flatness(models, loss, tmp_path / "out", QUICK)
        assert not (tmp_path / "out").exists()

    lora, images, draws = vits["LoRA"], [{"pixel_values": batches[0]["pixel_values"]}], iter(range(100))
    refused({}, batches, "no model was given")
    refused({"LoRA": nn.Linear(2, 2)}, batches, "LoRA has no adapted layer")
    refused({"LoRA": lora, "other": toy_case().model}, batches, "other adapts other layers than LoRA")
    refused({"LoRA": lora}, [], "no batch was given")
    refused({"LoRA": lora}, images, "gives no loss for a batch of pixel_values; add labels")
    refused({"LoRA": copy.deepcopy(lora).bfloat16()}, batches, r"LoRA has .*q_proj in bfloat16.*\.float\(\)")
    refused({"LoRA": lora}, lambda model: torch.tensor(float(next(draws))), "the loss of LoRA")
    words = get_peft_model(nn.Sequential(nn.Embedding(5, 4)), LoraConfig(r=2, target_modules=["0"]))
    refused({"LoRA": words}, batches, "LoRA .* Embedding")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"folder='.*out' cannot be written"):
        peft_flatness(vits, batches, tmp_path / "file" / "out", QUICK)


def test_the_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "flatness.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "peft_flatness(" in block]
    assert len(blocks) == 1
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        exec(compile(blocks[0], "docs/flatness.md", "exec"), {})
    (folder,) = tmp_path.iterdir()
    for name in re.findall(r"^(\S+\.(?:png|json)) ", text, re.MULTILINE):
        assert (folder / name).is_file(), name


def test_other_models_are_measured_without_diffusers() -> None:
    """No module that is imported on the way knows images: all of SDXL is above the seam."""
    seen: set[str] = set()
    todo = ["flatlora_diffusion.flatness.peft_models"]
    while todo:
        name = todo.pop()
        path = ROOT / (name.replace(".", "/") + ".py")
        if name in seen or not path.is_file():
            continue
        seen.add(name)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                names += [f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)]
        assert not {one.split(".")[0] for one in names} & {"diffusers", "accelerate", "PIL"}, name
        todo += names
    assert "flatlora_diffusion.flatness.functional" in seen
    assert "flatlora_diffusion.flatness.plots" in seen


def numbers(result: Landscape) -> list[float]:
    rises = [value for rises in result.rises.values() for rise in rises for value in rise.values]
    return [*rises, *(value for row in (*result.slices, *result.surface) for value in row)]
