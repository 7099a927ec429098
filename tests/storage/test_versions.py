"""The version of the program, also without installation."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from patience import HANGS

import flatlora_diffusion
from flatlora_diffusion.storage import versions as versions_module
from flatlora_diffusion.storage.versions import versions

ROOT = Path(__file__).parents[2]

WITHOUT_DISTRIBUTION = """
from importlib.metadata import Distribution, PackageNotFoundError

find = Distribution.from_name

def hide(name):
    if name == "flatlora-diffusion":
        raise PackageNotFoundError(name)
    return find(name)

Distribution.from_name = hide
"""

REPORTS = """
import flatlora_diffusion
from flatlora_diffusion.config import GenerateConfig
from flatlora_diffusion.gallery.png_text import image_text
from flatlora_diffusion.storage.versions import versions
from flatlora_diffusion.compare import comparison as compare
from flatlora_diffusion.flatness import report as flatness_report
from flatlora_diffusion.training import model_card
assert compare.versions is flatness_report.versions is model_card.versions is versions
text = image_text(GenerateConfig(prompts=("x",)), "EulerDiscreteScheduler", "x", 0, [])
assert flatlora_diffusion.__version__.encode() in b"".join(data for _, data, *_ in text.chunks)
print(versions()["flatlora-diffusion"])
"""


@pytest.mark.long
def test_a_checkout_without_installation_knows_its_version() -> None:
    asked = [sys.executable, "-c", WITHOUT_DISTRIBUTION + REPORTS]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    declared = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert declared
    assert done.stdout.splitlines()[-1] == f"{declared[1]}+checkout"


def test_the_versions_are_those_of_the_program_and_its_libraries() -> None:
    result = versions()
    assert list(result) == ["flatlora-diffusion", "torch", "diffusers", "peft", "transformers"]
    assert result["flatlora-diffusion"] == flatlora_diffusion.__version__
    assert all(re.match(r"\d+\.\d+", text) for text in result.values())


def test_a_missing_library_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def hide(name: str) -> str:
        if name == "diffusers":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(versions_module, "version", hide)
    assert list(versions()) == ["flatlora-diffusion", "torch", "peft", "transformers"]
