"""`doctor`: one line per check, and a remedy for each problem."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from packaging.requirements import Requirement

from flatlora_diffusion.commands import doctor
from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.config import INCLUDED_BASES, SAMPLES, ModelConfig
from flatlora_diffusion.storage import versions


def only(findings: Iterable[doctor.Finding]) -> doctor.Finding:
    (found,) = findings
    return found


def level_and_text(finding: doctor.Finding) -> tuple[str, str]:
    """The level and the text of a finding."""
    return finding.level, f"{finding.subject} {finding.fact}: {finding.remedy}"


@pytest.fixture
def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_each_check_prints_a_line_and_problems_set_the_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_port: int
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--port", str(free_port)]) == 0
    *lines, empty, end = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "note"}
    subjects = [line[9:25].strip() for line in lines]
    assert subjects[:2] == ["Python", "libraries"]
    assert subjects[-7:] == ["memory", "disk", "working folder", "base", "encoder", "app", "port"]
    assert (empty, end) == ("", "no problems")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run.json").write_text(json.dumps({"pretrained_model_name_or_path": "gone.safetensors"}))
    assert main(["doctor", "--port", str(free_port), "--config", "run.json"]) == 1
    told = capsys.readouterr().out
    assert "problem  base            gone.safetensors does not exist: give another --pretrained" in told
    assert told.endswith("\n1 problem\n")
    assert main(["doctor", "--config", "nowhere.json"]) == 2


def test_python_is_compared_with_the_tested_version(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = f"{sys.version_info[0]}.{sys.version_info[1]}"
    monkeypatch.setattr(doctor, "last_tested", lambda: {"python": mine})
    assert doctor.python().level == "ok"
    monkeypatch.setattr(doctor, "last_tested", lambda: {"python": "3.99"})
    assert level_and_text(doctor.python())[0] == "note"
    assert "last tested with 3.99" in doctor.python().fact


def test_libraries_that_are_missing_out_of_range_or_untested_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"peft": "0.21.2+local", "torch": "2.13.0+cpu", "transformers": "5.24.0", "huggingface_hub": "2.5.0"}
    asked = map(Requirement, ("peft>=0.20", "torch>=2.6", "transformers>=5.0,<5.24", "huggingface_hub", "scipy>=1.11"))
    monkeypatch.setattr(doctor, "required", lambda: list(asked))
    monkeypatch.setattr(doctor, "installed_version", have.get)
    monkeypatch.setattr(
        doctor, "last_tested", lambda: {"peft": "0.21.2", "torch": "2.13.0", "huggingface-hub": "2.4.0"}
    )
    old, gone, others = map(level_and_text, doctor.libraries())
    assert old[0] == gone[0] == "problem"
    assert 'transformers 5.24.0 is outside of <5.24,>=5.0: pip install "transformers<5.24,>=5.0"' in old[1]
    assert 'scipy is not installed: pip install "scipy>=1.11"' in gone[1]
    assert others[0] == "note"
    assert "huggingface_hub 2.5.0 (tested: 2.4.0): if something fails, pip install -c" in others[1]
    assert "torch" not in others[1].split(":")[1], "a build of its own is no other version"


@pytest.mark.parametrize(
    ("cuda", "has_driver", "level", "sentence"),
    [
        (None, False, "note", "computes on the CPU: enough for the demo"),
        (
            None,
            True,
            "problem",
            "on the CPU only, though there is an NVIDIA driver: install the PyTorch build for it",
        ),
        ("12.6", True, "problem", "no GPU, though there is an NVIDIA driver: update the driver to one for CUDA 12.6"),
    ],
)
def test_a_gpu_that_torch_does_not_use_is_reported(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, has_driver: bool, level: str, sentence: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(shutil, "which", lambda name: name if has_driver else None)
    found = level_and_text(only(doctor.devices()))
    assert found[0] == level
    assert sentence in found[1]


def test_each_gpu_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(*shape: int, device: torch.device) -> torch.Tensor:
        if device.index == 1:
            raise RuntimeError("CUDA error: no kernel image is available\nCompile with ...")
        return torch.zeros(*shape)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**31))
    monkeypatch.setattr(torch, "ones", ones)
    good, bad = map(level_and_text, doctor.devices())
    assert good[0] == "ok"
    assert "computes on GPU 0, 1.0 of 2.0 GiB free" in good[1]
    assert bad[0] == "problem"
    assert "GPU 1, which fails (CUDA error: no kernel image is available): install the PyTorch build" in bad[1]


def test_a_torch_that_does_not_load_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = level_and_text(only(doctor.devices()))
    assert found[0] == "problem"
    assert "torch cannot be imported (import of torch halted" in found[1]
    assert "pytorch.org" in found[1]


def test_too_little_memory_and_disk_are_problems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (doctor.memory().level, doctor.disk(tmp_path).level) == ("ok", "ok")
    little: Any = SimpleNamespace(available=2**29, free=2**29)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: little)
    assert level_and_text(doctor.memory()) == ("problem", "memory 0.5 GiB free: close other programs; 1 GiB is needed")
    assert level_and_text(doctor.disk(tmp_path))[0] == "problem"
    assert f"0.5 GiB free in {tmp_path}: " in level_and_text(doctor.disk(tmp_path))[1]


def test_a_folder_without_write_access_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor.working_folder(tmp_path).level == "ok"

    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    found = level_and_text(doctor.working_folder(tmp_path))
    assert found[0] == "problem"
    assert "is not writable (Permission denied)" in found[1]


def test_a_port_in_use_is_a_note(free_port: int) -> None:
    assert doctor.port(free_port).level == "ok"
    with socket.socket() as other:
        other.bind(("127.0.0.1", free_port))
        other.listen()
        found = level_and_text(doctor.port(free_port))
    assert found[0] == "note"
    assert "another --port" in found[1]


def test_an_app_without_gradio_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.app().level == "ok"
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert level_and_text(doctor.app()) == ("note", 'app needs gradio: pip install "flatlora-diffusion[app]"')


def pipeline(folder: Path, name: str = "model.safetensors") -> Path:
    """What can be seen of a saved pipeline without loading it."""
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (folder / part).mkdir(parents=True)
        (folder / part / name).touch()
    (folder / "model_index.json").touch()
    return folder


def of_base(path: Path | str, variant: str | None = None) -> tuple[str, str]:
    return level_and_text(doctor.base(ModelConfig(pretrained_model_name_or_path=str(path), variant=variant)))


def test_a_missing_base_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert of_base("tiny") == ("ok", "base the tiny demo base exists: ")
    assert of_base(SAMPLES / "tiny_sdxl")[0] == "ok"
    assert of_base(tmp_path) == (
        "problem",
        f"base {tmp_path} has no model_index.json: give a folder saved by diffusers",
    )
    half = pipeline(tmp_path / "half")
    (half / "vae" / "model.safetensors").unlink()
    assert f"{half} has no weights (.safetensors) in vae" in of_base(half)[1]
    assert of_base(half)[0] == "problem"
    assert of_base(tmp_path / "x" / "gone")[0] == "problem"
    assert "gone is neither a folder nor a hub id: give the right path" in of_base(tmp_path / "x" / "gone")[1]
    (tmp_path / "sdxl.safetensors").touch()
    assert of_base(tmp_path / "sdxl.safetensors")[0] == "ok"
    monkeypatch.setitem(INCLUDED_BASES, "tiny", tmp_path)
    assert of_base("tiny")[0] == "problem"


def test_weights_of_another_variant_do_not_count(tmp_path: Path) -> None:
    half = pipeline(tmp_path / "half", "model.fp16-00001-of-00002.safetensors")
    assert of_base(half)[0] == "problem"
    assert of_base(half, variant="fp16")[0] == "ok"
    assert of_base(pipeline(tmp_path / "full", "model-00001-of-00002.safetensors"))[0] == "ok"


def test_a_hub_model_is_downloaded_downloadable_or_unavailable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    level, text = of_base("somebody/sdxl")
    assert level == "note"
    assert f"somebody/sdxl is not downloaded: the first run downloads it to {tmp_path}" in text
    assert level_and_text(doctor.weights("encoder", "somebody/clip"))[0] == "note"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    level, text = of_base("somebody/sdxl")
    assert level == "problem"
    assert "HF_HUB_OFFLINE forbids it: unset HF_HUB_OFFLINE, or run `hf download somebody/sdxl`" in text
    cached = tmp_path / "models--somebody--sdxl"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    pipeline(cached / "snapshots" / "abc")
    assert of_base("somebody/sdxl") == ("ok", "base somebody/sdxl is downloaded: ")


def test_the_required_libraries_of_a_checkout_are_known_without_an_installation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = {one.name for one in versions.required()}
    assert {"torch", "diffusers", "safetensors"} <= names
    assert not names & {"gradio", "pytest"}, "those are extras"

    def gone(name: str) -> None:
        raise versions.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "requires", gone)
    assert {one.name for one in versions.required()} == {"torch", "diffusers", "peft", "transformers"}


def test_without_a_gpu_the_gpu_check_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    level, told = level_and_text(only(doctor.gpu()))
    assert level == "problem"
    assert "there is no CUDA device to train on" in told
