"""Whether all that is needed is here: `examine` finds the facts, `doctor` prints them; nothing is downloaded."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flatlora_diffusion.commands.help_page import Page
from flatlora_diffusion.commands.verb_settings import verb_settings
from flatlora_diffusion.config import (
    METHODS,
    SAMPLES,
    TINY,
    DoctorConfig,
    ModelConfig,
    RunError,
    TrainConfig,
    shipped,
)
from flatlora_diffusion.sdxl.base_title import TINY_TITLE
from flatlora_diffusion.storage.saved_config import opened
from flatlora_diffusion.storage.versions import LOCK, PROGRAM, installed, last_tested, required

if TYPE_CHECKING:
    import torch

_GIB = 2**30
_LEAST_MEMORY, _LEAST_DISK = 1 * _GIB, 1 * _GIB  # what the tiny base and a few of its runs take
_GPU_BUILD = "install the PyTorch build for it, see https://pytorch.org/get-started"
_PIPELINE_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, what was found, and what to do about it."""

    level: Literal["ok", "note", "problem"]
    subject: str
    fact: str
    remedy: str = ""


def doctor(arguments: list[str]) -> int:
    """Print one line for each finding; the exit code is 1 if there is a problem."""
    text = "Look whether all that a training needs is here, and say what to do if not; nothing is downloaded."
    found = []
    for finding in examine(verb_settings(DoctorConfig(), Page("doctor", text), arguments), Path.cwd()):
        remedy = finding.remedy and f": {finding.remedy}"
        print(f"{finding.level:<9}{finding.subject:<16}{finding.fact}{remedy}", flush=True)
        found.append(finding)
    problems = sum(finding.level == "problem" for finding in found)
    print(f"\n{problems or 'no'} problem{'' if problems == 1 else 's'}")
    return 1 if problems else 0


def examine(asked: DoctorConfig, folder: Path) -> Iterator[Finding]:
    """All findings for a training with `asked.config` in `folder`. Raises ConfigError for settings that are none."""
    config = TrainConfig() if asked.config is None else TrainConfig().updated_from(Path(asked.config))
    model = TrainConfig.from_dict(opened(config.to_dict())).model
    yield python()
    yield from libraries()
    yield from devices()
    yield memory()
    yield disk(folder)
    yield working_folder(folder)
    yield base(model)
    if model.pretrained_vae_model_name_or_path is not None:
        yield weights("VAE", model.pretrained_vae_model_name_or_path)
    for name in asked.encoders:
        yield weights("encoder", str(SAMPLES / "tiny_sdxl" / "judge") if name == "judge" else name, named=name)
    yield app()
    yield port(asked.port)
    if asked.gpu:
        yield from gpu()


def python() -> Finding:
    """The interpreter; pip has seen to it that it is not too old."""
    mine, theirs = f"{sys.version_info[0]}.{sys.version_info[1]}", last_tested().get("python", "")
    level: Literal["ok", "note"] = "ok" if mine == theirs else "note"
    return Finding(level, "Python", f"{sys.version.split()[0]} in {sys.prefix}, last tested with {theirs or 'none'}")


def libraries() -> Iterator[Finding]:
    """A line for each library that is missing or outside of its range, then one for all others."""
    from packaging.utils import canonicalize_name

    others, last = [], last_tested()
    for library in required():
        name, have = library.name, installed(library.name)
        if have is None:
            yield Finding("problem", "libraries", f"{name} is not installed", f'pip install "{library}"')
        elif not library.specifier.contains(have, prereleases=True):
            fact = f"{name} {have} is outside of {library.specifier}"
            yield Finding("problem", "libraries", fact, f'pip install "{library}"')
        elif canonicalize_name(name) in last and have.partition("+")[0] != last[canonicalize_name(name)]:
            others.append(f"{name} {have} (tested: {last[canonicalize_name(name)]})")
    if others:
        remedy = f"if something fails, pip install -c {shipped(LOCK)} {PROGRAM}"
        yield Finding("note", "libraries", f"others than last tested: {', '.join(others)}", remedy)
    else:
        yield Finding("ok", "libraries", "as last tested")


def devices() -> Iterator[Finding]:
    """What torch computes on; each GPU is tried."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its own libraries does not load
        yield Finding("problem", "torch", f"cannot be imported ({_first_line(error)})", _GPU_BUILD)
        return
    has_nvidia = shutil.which("nvidia-smi") is not None
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            yield _gpu(torch.device("cuda", number))
    elif torch.backends.mps.is_available():
        yield Finding("ok", "torch", f"{torch.__version__} computes on this Mac's GPU")
    elif has_nvidia and torch.version.cuda is None:
        fact = f"{torch.__version__} computes on the CPU alone, though there is an NVIDIA driver"
        yield Finding("problem", "torch", fact, _GPU_BUILD)
    elif has_nvidia:
        fact = f"{torch.__version__} finds no GPU, though there is an NVIDIA driver"
        yield Finding("problem", "torch", fact, f"update the driver to one for CUDA {torch.version.cuda}")
    else:
        remedy = "enough for the demo; real SDXL needs a GPU"
        yield Finding("note", "torch", f"{torch.__version__} computes on the CPU", remedy)


def _gpu(device: torch.device) -> Finding:
    import torch

    fact = f"{torch.__version__} computes on {torch.cuda.get_device_name(device)}"
    try:
        torch.ones(2, 2, device=device).square().sum().item()
        free, total = (size / _GIB for size in torch.cuda.mem_get_info(device))
    except RuntimeError as error:  # a build without kernels for this GPU, or a GPU that others fill
        return Finding("problem", "torch", f"{fact}, which fails ({_first_line(error)})", _GPU_BUILD)
    return Finding("ok", "torch", f"{fact}, {free:.1f} of {total:.1f} GiB free")


def memory() -> Finding:
    import psutil

    free = psutil.virtual_memory().available
    if free < _LEAST_MEMORY:
        return Finding("problem", "memory", f"{free / _GIB:.1f} GiB free", "close other programs, 1 GiB is needed")
    return Finding("ok", "memory", f"{free / _GIB:.1f} GiB free")


def disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    if free < _LEAST_DISK:
        fact = f"{free / _GIB:.1f} GiB free in {folder}"
        return Finding("problem", "disk", fact, "make room or work in another folder, 1 GiB is needed")
    return Finding("ok", "disk", f"{free / _GIB:.1f} GiB free in {folder}")


def working_folder(folder: Path) -> Finding:
    """Runs are written below it unless a flag says otherwise."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Finding("ok", "working folder", f"{folder} can be written to")
    except OSError as error:
        fact = f"{folder} cannot be written to ({error.strerror})"
        return Finding("problem", "working folder", fact, "start in a folder of your own")


def base(model: ModelConfig) -> Finding:
    """The base and its text encoders: a file, a folder, or a hub id that was downloaded before."""
    name = model.pretrained_model_name_or_path
    if name == TINY:
        return weights("base", str(SAMPLES / "tiny_sdxl"), _PIPELINE_PARTS, named=TINY_TITLE)
    if name.lower().endswith(".safetensors"):
        if Path(name).is_file():
            return Finding("ok", "base", f"{name} is here")
        return Finding("problem", "base", f"{name} does not exist", "give another --pretrained_model_name_or_path")
    return weights("base", name, _PIPELINE_PARTS, model.revision, model.variant)


def weights(
    subject: str,
    name: str,
    parts: tuple[str, ...] = (".",),
    revision: str | None = None,
    variant: str | None = None,
    named: str | None = None,
) -> Finding:
    """Whether each of `parts`, folders of a model or of a pipeline of models, has its weights."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    file, what, folder = "config.json" if parts == (".",) else "model_index.json", named or name, Path(name)
    is_hub = not folder.is_dir()
    if is_hub:
        try:
            cached = try_to_load_from_cache(name, file, revision=revision)
        except HFValidationError:
            return Finding("problem", subject, f"{what} is neither a folder nor a hub id", "give the right path")
        folder = Path(cached if isinstance(cached, str) else f"{constants.HF_HUB_CACHE}/nowhere/{file}").parent
    lacks = [part for part in parts if not _has_weights(folder / part, variant)]
    if (folder / file).is_file() and not lacks:
        return Finding("ok", subject, f"{what} is {'downloaded' if is_hub else 'here'}")
    if not is_hub:
        missing = file if not (folder / file).is_file() else f"weights (.safetensors) in {', '.join(lacks)}"
        return Finding("problem", subject, f"{what} has no {missing}", "give a folder saved by diffusers")
    if constants.HF_HUB_OFFLINE:
        fact = f"{what} is not downloaded, and HF_HUB_OFFLINE forbids it"
        return Finding("problem", subject, fact, f"unset HF_HUB_OFFLINE, or run `hf download {name}` where you may")
    return Finding(
        "note", subject, f"{what} is not downloaded", f"the first run does it, into {constants.HF_HUB_CACHE}"
    )


def _has_weights(folder: Path, variant: str | None) -> bool:
    """Files are called `model.safetensors`, `model.fp16.safetensors` or `model.fp16-00001-of-00002.safetensors`."""
    kinds = {file.stem.partition(".")[2].partition("-")[0] for file in folder.glob("*.safetensors")}
    return (variant or "") in kinds


def app() -> Finding:
    if find_spec("gradio") is None:
        return Finding("note", "app", "needs gradio", 'pip install "flatlora-diffusion[app]"')
    return Finding("ok", "app", f"gradio {installed('gradio')} is here")


def port(number: int) -> Finding:
    with socket.socket() as tried:
        if os.name != "nt":  # there it would let two programs have one port
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("127.0.0.1", number))
        except OSError as error:
            fact = f"{number} cannot be used ({error.strerror})"
            return Finding("problem", "port", fact, "unless it is the app itself, start it with another --port")
    return Finding("ok", "port", f"{number} is free for the app")


def gpu() -> Iterator[Finding]:
    """The first steps of a training of SDXL's size on the GPU, as they check themselves."""
    import torch

    if not torch.cuda.is_available():
        yield Finding("problem", "gpu", "there is no CUDA device to train on", "see the line torch above")
        return
    from flatlora_diffusion.training.gpu_check import gpu_check_configs

    for config in gpu_check_configs():
        yield from drilled(config)


def drilled(config: TrainConfig) -> Iterator[Finding]:
    """A line for each thing that three steps of `config`, with random weights, have shown of this device."""
    from flatlora_diffusion.training.gpu_check import run_gpu_check

    subject = f"gpu, {METHODS[config.perturb.method].title}"
    try:
        checks = run_gpu_check(config)
    except RunError as error:
        yield Finding("problem", subject, str(error))
        return
    for check in checks:
        level: Literal["ok", "problem"] = "ok" if check.is_right else "problem"
        yield Finding(
            level, subject, check.message, "" if check.is_right else "please report this with the lines above"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
