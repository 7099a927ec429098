"""Every command in README and docs parses, and the Python examples run."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import toy_case
from torch import nn

from app.settings import parse_settings
from flatlora_diffusion import FlatLora
from flatlora_diffusion.commands import command_line, doctor, lora_verbs
from flatlora_diffusion.commands.command_line import main, train_main
from flatlora_diffusion.commands.verb_settings import verb_settings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = r"(?:flatlora|python train_dreambooth_flatlora\.py) [^`\n]*"
README = (ROOT / "README.md").read_text(encoding="utf-8")


class ParsedError(Exception):
    """The settings are understood, and no more is to be done."""


def commands() -> list[str]:
    """Each line in a block, and what is quoted with flags in a text; those with `...` are but parts."""
    found: dict[str, None] = {}
    for page in PAGES:
        text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
        found |= dict.fromkeys(re.findall(rf"^(?:    )?({COMMAND})$", text, re.MULTILINE))
        found |= dict.fromkeys(re.findall(rf"`({COMMAND} --[^`\n]*)`", text))
    return [command for command in found if " ..." not in command and " --help" not in command]


@pytest.fixture
def only_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(parse: Callable[..., Any]) -> Callable[..., Any]:
        def parsed(*args: Any, **more: Any) -> Any:
            parse(*args, **more)
            raise ParsedError

        return parsed

    for module in (command_line, doctor, lora_verbs):
        monkeypatch.setattr(module, "verb_settings", stop(verb_settings))
    for name in ("parse_comparison", "parse_training"):
        monkeypatch.setattr(command_line, name, stop(getattr(command_line, name)))
    app = SimpleNamespace(main=stop(lambda arguments: parse_settings(arguments, {})))
    monkeypatch.setattr(command_line, "import_module", lambda name: app)  # which has two names, by its installation


def test_the_documentation_has_commands() -> None:
    verbs = {command.split()[1] for command in commands()}
    assert verbs >= {"train", "compare", "generate", "flatness", "app", "export", "merge", "caption"}


@pytest.mark.usefixtures("only_parsed")
@pytest.mark.parametrize("command", commands())
def test_every_documented_command_parses(command: str) -> None:
    program, *arguments = shlex.split(command, comments=True)
    start = main if program == "flatlora" else lambda rest: train_main(rest[1:])
    with pytest.raises(ParsedError):
        start(arguments)


def test_the_readme_s_loop_trains() -> None:
    (code,) = re.findall(r"```python\n([^`]*flat\.perturb\([^`]*)```", README)
    case = toy_case()
    trained = [parameter for parameter in case.model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    losses: list[float] = []

    def loss_of(model: nn.Module, batch: int) -> torch.Tensor:
        loss = nn.functional.mse_loss(case.predict(model), case.target)
        losses.append(float(loss.detach()))
        return loss

    optimizer = torch.optim.SGD(trained, lr=0.01)
    names: dict[str, Any] = {"model": case.model, "optimizer": optimizer, "batches": range(3), "loss_of": loss_of}
    exec(code, names)
    assert len(losses) == 3
    assert not any(torch.equal(old, new) for old, new in zip(before, trained, strict=True))
    FlatLora(case.model)  # it would be refused beside another


def test_the_two_lines_for_other_trainers_follow_an_optimizer() -> None:
    text = (ROOT / "docs" / "in_other_trainers.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n([^`]*flat\.follow\([^`]*)```", text)
    case = toy_case()
    optimizer = torch.optim.SGD([p for p in case.model.parameters() if p.requires_grad], lr=0.01)
    names: dict[str, Any] = {"model": case.model, "optimizer": optimizer}
    exec(code, names)
    case.model.train()
    case.loss().backward()
    optimizer.step()
    assert names["flat"].step == 1


def test_the_lines_for_diffusers_scripts_ramp_sigma_over_the_script_s_steps() -> None:
    text = (ROOT / "docs" / "in_other_trainers.md").read_text(encoding="utf-8")
    (hunk,) = re.findall(r"```diff\n([^`]*)```", text)
    lines = [line for line in hunk.splitlines() if " ..." not in line]
    case = toy_case()
    names: dict[str, Any] = {
        "args": SimpleNamespace(max_train_steps=30, seed=None),
        "math": math,
        "num_update_steps_per_epoch": 4,
        "optimizer": torch.optim.SGD([p for p in case.model.parameters() if p.requires_grad], lr=0.01),
        "unet": case.model,
        "unwrap_model": lambda model: model,
    }
    exec("\n".join(line[1:].strip() for line in lines), names)
    assert names["args"].num_train_epochs == 8, "the lines around it are those of the script"
    names["flat"].detach()
    assert "total_steps=args.max_train_steps" in lines[-2]
