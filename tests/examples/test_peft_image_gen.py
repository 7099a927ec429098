"""PEFT's image benchmark with Flat-LoRA: its model class at a tiny size, its target modules, dtypes and optimizer."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import normal, seeded
from torch import Tensor
from torch.nn import functional as F

from examples.peft_image_gen import run_flat_lora
from examples.peft_image_gen.run_flat_lora import SETTINGS, main, perturbed
from flatlora_diffusion import FlatLora

EXAMPLE = Path(__file__).parents[2] / "examples" / "peft_image_gen"
EXPERIMENT = EXAMPLE / "experiments" / "lora" / "flux2-klein-flat-sigma0.1"
NOISE = json.loads((EXPERIMENT / SETTINGS).read_text(encoding="utf-8"))
STEPS, IMAGE, TEXT = 4, 16, 6  # optimizer steps; tokens of a picture and of a prompt


@pytest.fixture
def flats(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FlatLora]]:
    """The perturbations that were made, detached at the end: one that follows any optimizer outlives its model."""
    made: list[FlatLora] = []

    class Noted(FlatLora):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            made.append(self)

    monkeypatch.setattr(run_flat_lora, "FlatLora", Noted)
    yield made
    for flat in made:
        flat.detach()


@pytest.fixture(scope="module")
def klein() -> Flux2Transformer2DModel:
    """A random FLUX.2 klein of two blocks of each kind, in bf16 and with checkpointing as the benchmark loads it."""
    with seeded(1):
        model = Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
    model.to(torch.bfloat16).enable_gradient_checkpointing()
    return model


def adapted(klein: Flux2Transformer2DModel) -> PeftModel:
    with seeded(2):
        return get_peft_model(copy.deepcopy(klein), LoraConfig.from_pretrained(EXPERIMENT)).train()


def make_optimizer(model: PeftModel, *, optimizer_type: str, max_steps: int, **options: Any) -> tuple[Any, None]:
    """As the benchmark's: all parameters, the frozen ones too."""
    return getattr(torch.optim, optimizer_type)(model.parameters(), **options), None


def predict(model: PeftModel, noisy: Tensor, moment: Tensor) -> Tensor:
    places = [torch.zeros(2, count, 4) for count in (TEXT, IMAGE)]
    places[1][..., 1], places[1][..., 2] = torch.arange(IMAGE) // 4, torch.arange(IMAGE) % 4
    found = model(
        hidden_states=noisy.bfloat16(),
        timestep=moment.bfloat16(),
        guidance=None,
        encoder_hidden_states=normal(7, 2, TEXT, 24).bfloat16(),
        txt_ids=places[0],
        img_ids=places[1],
        return_dict=False,
    )[0]
    return found.float()


def trained(
    model: PeftModel,
    make: Callable[..., Any],
    opened: Callable[[int], AbstractContextManager[None]] = lambda step: nullcontext(),
) -> dict[str, Tensor]:
    """The LoRA after STEPS steps of flow matching with the optimizer of `make`, as the benchmark calls it."""
    optimizer, _ = make(model, optimizer_type="AdamW", max_steps=STEPS, lr=0.01, weight_decay=1e-4)
    for step in range(STEPS):
        latents, noise = normal(10 + step, 2, IMAGE, 16), normal(20 + step, 2, IMAGE, 16)
        moment = torch.rand(2, generator=torch.Generator().manual_seed(30 + step))
        part = moment.view(2, 1, 1)
        optimizer.zero_grad(set_to_none=True)
        with opened(step):
            loss = F.mse_loss(predict(model, (1 - part) * latents + part * noise, moment), noise - latents)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if "lora_" in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def test_sigma_0_trains_plain_lora_bit_for_bit(klein: Flux2Transformer2DModel, flats: list[FlatLora]) -> None:
    plain = trained(adapted(klein), make_optimizer)
    assert {weight.dtype for weight in plain.values()} == {torch.float32}
    assert same(plain, trained(adapted(klein), perturbed(make_optimizer, NOISE | {"sigma": 0.0})))
    assert len(flats) == 1


def test_flat_lora_trains_as_two_lines_in_the_loop_and_leaves_w_as_it_was(
    klein: Flux2Transformer2DModel, flats: list[FlatLora]
) -> None:
    model = adapted(klein)
    found = trained(model, perturbed(make_optimizer, NOISE))
    by_hand = adapted(klein)
    flat = FlatLora(by_hand, total_steps=STEPS, **NOISE)
    assert same(found, trained(by_hand, make_optimizer, flat.perturb))
    assert not same(found, trained(adapted(klein), make_optimizer))
    before = klein.state_dict()
    after = {name.replace(".base_layer", ""): one for name, one in model.base_model.model.state_dict().items()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    targets = {name.removesuffix(".base_layer") for name, _ in by_hand.named_modules() if name.endswith(".base_layer")}
    assert {f"base_model.model.{name}" for name in flats[0].layers} == targets


def test_evaluation_sees_no_noise(klein: Flux2Transformer2DModel, flats: list[FlatLora]) -> None:
    model = adapted(klein)
    trained(model, perturbed(make_optimizer, NOISE | {"schedule": "constant"}))
    noisy, moment = normal(40, 2, IMAGE, 16), torch.tensor([0.3, 0.6])
    with torch.no_grad():
        model.train()
        assert not torch.equal(predict(model, noisy, moment), predict(model.eval(), noisy, moment))
        evaluated = predict(model, noisy, moment)
        flats[0].detach()
        assert torch.equal(predict(model, noisy, moment), evaluated)


@pytest.mark.parametrize("has_noise", [True, False])
def test_run_py_runs_with_its_arguments_and_is_perturbed_where_the_experiment_says_so(
    has_noise: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flats: list[FlatLora]
) -> None:
    (tmp_path / "utils.py").write_text(
        "import torch\ndef get_optimizer_and_scheduler(model, *, max_steps, **options):\n"
        "    return torch.optim.SGD(model.parameters(), lr=0.1), None\n"
    )
    (tmp_path / "run.py").write_text(
        "import json, sys\nfrom peft import LoraConfig, get_peft_model\nfrom torch import nn\n"
        "from utils import get_optimizer_and_scheduler\n"
        "model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=['0']))\n"
        "get_optimizer_and_scheduler(model, max_steps=7)\n"
        "print(json.dumps([__name__, *sys.argv]), file=open('told.json', 'w'))\n"
    )
    (tmp_path / "experiment").mkdir()
    if has_noise:
        (tmp_path / "experiment" / SETTINGS).write_text('{"sigma": 0.05}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "utils", raising=False)
    arguments = ["-v", "--bucket_name", "me/mine", "experiment/", "--clean"]
    try:
        main(arguments)
    finally:
        sys.modules.pop("utils", None)
    assert json.loads((tmp_path / "told.json").read_text()) == ["__main__", "run.py", *arguments]
    assert [(flat.config.sigma, flat.config.total_steps) for flat in flats] == ([(0.05, 7)] if has_noise else [])
