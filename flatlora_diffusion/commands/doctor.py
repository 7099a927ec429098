"""`doctor`: checks the installation, the devices and the models without downloading anything."""

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

from flatlora_diffusion.commands.help_page import HelpPage
from flatlora_diffusion.commands.verb_settings import verb_settings
from flatlora_diffusion.config import (
    INCLUDED_BASES,
    METHODS,
    SAMPLES,
    DoctorConfig,
    ModelConfig,
    RunError,
    TrainConfig,
    shipped,
)
from flatlora_diffusion.families.base_title import included_title
from flatlora_diffusion.families.paths import base_path
from flatlora_diffusion.families.registry import family_of
from flatlora_diffusion.storage.formatting import first_line
from flatlora_diffusion.storage.saved_config import expand_paths
from flatlora_diffusion.storage.versions import LOCK, PROGRAM, installed_version, last_tested, required

if TYPE_CHECKING:
    import torch

_GIB = 2**30
_MIN_MEMORY, _MIN_DISK = 1 * _GIB, 1 * _GIB  # enough for the tiny base and a few of its runs
_GPU_BUILD = "install the PyTorch build for it, see https://pytorch.org/get-started"


@dataclass(frozen=True)
class Finding:
    """A line of the report: the subject, the fact about it, and how to fix it."""

    level: Literal["ok", "note", "problem"]
    subject: str
    fact: str
    remedy: str = ""


def doctor(arguments: list[str]) -> int:
    """Print a line for each finding; return 1 if there is a problem."""
    text = "Check the installation for training and suggest fixes; nothing is downloaded."
    problems = 0
    for finding in examine(verb_settings(DoctorConfig(), HelpPage("doctor", text), arguments), Path.cwd()):
        remedy = finding.remedy and f": {finding.remedy}"
        print(f"{finding.level:<9}{finding.subject:<16}{finding.fact}{remedy}", flush=True)
        problems += finding.level == "problem"
    print(f"\n{problems or 'no'} problem{'' if problems == 1 else 's'}")
    return 1 if problems else 0


def examine(options: DoctorConfig, folder: Path) -> Iterator[Finding]:
    """Yield all findings for a training with `options.config` in `folder`. Raises ConfigError for invalid settings."""
    config = TrainConfig() if options.config is None else TrainConfig().updated_from(Path(options.config))
    model = TrainConfig.from_dict(expand_paths(config.to_dict())).model
    yield python()
    yield from libraries()
    yield from devices()
    yield memory()
    yield disk(folder)
    yield working_folder(folder)
    yield base(model)
    if model.pretrained_vae_model_name_or_path is not None:
        yield weights("VAE", model.pretrained_vae_model_name_or_path)
    for name in options.encoders:
        yield weights("encoder", str(SAMPLES / "tiny_sdxl" / "judge") if name == "judge" else name, named=name)
    yield app()
    yield port(options.port)
    if options.gpu:
        yield from gpu()


def python() -> Finding:
    """Compare the interpreter with the last tested version; pip has checked the minimum."""
    version, tested = f"{sys.version_info[0]}.{sys.version_info[1]}", last_tested().get("python", "")
    level: Literal["ok", "note"] = "ok" if version == tested else "note"
    return Finding(level, "Python", f"{sys.version.split()[0]} in {sys.prefix}, last tested with {tested or 'none'}")


def libraries() -> Iterator[Finding]:
    """Yield a problem for each missing or unsupported library, then a line for all untested versions."""
    from packaging.utils import canonicalize_name

    untested, tested = [], last_tested()
    for library in required():
        name, version = library.name, installed_version(library.name)
        if version is None:
            yield Finding("problem", "libraries", f"{name} is not installed", f'pip install "{library}"')
        elif not library.specifier.contains(version, prereleases=True):
            fact = f"{name} {version} is outside of {library.specifier}"
            yield Finding("problem", "libraries", fact, f'pip install "{library}"')
        elif canonicalize_name(name) in tested and version.partition("+")[0] != tested[canonicalize_name(name)]:
            untested.append(f"{name} {version} (tested: {tested[canonicalize_name(name)]})")
    if untested:
        remedy = f"if something fails, pip install -c {shipped(LOCK)} {PROGRAM}"
        yield Finding("note", "libraries", f"untested versions: {', '.join(untested)}", remedy)
    else:
        yield Finding("ok", "libraries", "as last tested")


def devices() -> Iterator[Finding]:
    """Name the devices that torch uses, after a trial computation on each GPU."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch does not load
        yield Finding("problem", "torch", f"cannot be imported ({first_line(error)})", _GPU_BUILD)
        return
    has_nvidia = shutil.which("nvidia-smi") is not None
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            yield _gpu(torch.device("cuda", number))
    elif torch.backends.mps.is_available():
        yield Finding("ok", "torch", f"{torch.__version__} computes on this Mac's GPU")
    elif has_nvidia and torch.version.cuda is None:
        fact = f"{torch.__version__} computes on the CPU only, though there is an NVIDIA driver"
        yield Finding("problem", "torch", fact, _GPU_BUILD)
    elif has_nvidia:
        fact = f"{torch.__version__} finds no GPU, though there is an NVIDIA driver"
        yield Finding("problem", "torch", fact, f"update the driver to one for CUDA {torch.version.cuda}")
    else:
        remedy = "enough for the demo; a real base needs a GPU"
        yield Finding("note", "torch", f"{torch.__version__} computes on the CPU", remedy)


def _gpu(device: torch.device) -> Finding:
    import torch

    fact = f"{torch.__version__} computes on {torch.cuda.get_device_name(device)}"
    try:
        torch.ones(2, 2, device=device).square().sum().item()
        free, total = (size / _GIB for size in torch.cuda.mem_get_info(device))
    except RuntimeError as error:  # a build without kernels for this GPU, or a GPU whose memory is in use
        return Finding("problem", "torch", f"{fact}, which fails ({first_line(error)})", _GPU_BUILD)
    return Finding("ok", "torch", f"{fact}, {free:.1f} of {total:.1f} GiB free")


def memory() -> Finding:
    import psutil

    free = psutil.virtual_memory().available
    if free < _MIN_MEMORY:
        return Finding("problem", "memory", f"{free / _GIB:.1f} GiB free", "close other programs; 1 GiB is needed")
    return Finding("ok", "memory", f"{free / _GIB:.1f} GiB free")


def disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    if free < _MIN_DISK:
        fact = f"{free / _GIB:.1f} GiB free in {folder}"
        return Finding("problem", "disk", fact, "free some space or work in another folder; 1 GiB is needed")
    return Finding("ok", "disk", f"{free / _GIB:.1f} GiB free in {folder}")


def working_folder(folder: Path) -> Finding:
    """Check that runs can be written to the working folder."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Finding("ok", "working folder", f"{folder} is writable")
    except OSError as error:
        fact = f"{folder} is not writable ({error.strerror})"
        return Finding("problem", "working folder", fact, "work in a folder of your own")


def base(model: ModelConfig) -> Finding:
    """Check the base: a file, a folder, or a downloaded hub id."""
    name = model.pretrained_model_name_or_path
    if name in INCLUDED_BASES:
        return weights("base", base_path(name), family_of(model).parts, named=included_title(model))
    if name.lower().endswith(".safetensors"):
        if Path(name).is_file():
            return Finding("ok", "base", f"{name} exists")
        return Finding("problem", "base", f"{name} does not exist", "give another --pretrained_model_name_or_path")
    return weights("base", name, family_of(model).parts, model.revision, model.variant)


def weights(
    subject: str,
    name: str,
    parts: tuple[str, ...] = (".",),
    revision: str | None = None,
    variant: str | None = None,
    named: str | None = None,
) -> Finding:
    """Check that each of `parts`, the folders of a model or pipeline, has weights.

    Args:
        name: A folder or a hub id.
        named: The model's name in the report, if it is not `name`.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    file, label, folder = "config.json" if parts == (".",) else "model_index.json", named or name, Path(name)
    is_hub = not folder.is_dir()
    if is_hub:
        try:
            cached = try_to_load_from_cache(name, file, revision=revision)
        except HFValidationError:
            return Finding("problem", subject, f"{label} is neither a folder nor a hub id", "give the right path")
        folder = Path(cached if isinstance(cached, str) else f"{constants.HF_HUB_CACHE}/nowhere/{file}").parent
    without_weights = [part for part in parts if not _has_weights(folder / part, variant)]
    if (folder / file).is_file() and not without_weights:
        return Finding("ok", subject, f"{label} {'is downloaded' if is_hub else 'exists'}")
    if not is_hub:
        missing = file if not (folder / file).is_file() else f"weights (.safetensors) in {', '.join(without_weights)}"
        return Finding("problem", subject, f"{label} has no {missing}", "give a folder saved by diffusers")
    if constants.HF_HUB_OFFLINE:
        fact = f"{label} is not downloaded, and HF_HUB_OFFLINE forbids it"
        return Finding("problem", subject, fact, f"unset HF_HUB_OFFLINE, or run `hf download {name}` while online")
    remedy = f"the first run downloads it to {constants.HF_HUB_CACHE}"
    return Finding("note", subject, f"{label} is not downloaded", remedy)


def _has_weights(folder: Path, variant: str | None) -> bool:
    # File names: model.safetensors, model.fp16.safetensors or model.fp16-00001-of-00002.safetensors.
    variants = {file.stem.partition(".")[2].partition("-")[0] for file in folder.glob("*.safetensors")}
    return (variant or "") in variants


def app() -> Finding:
    if find_spec("gradio") is None:
        return Finding("note", "app", "needs gradio", 'pip install "flatlora-diffusion[app]"')
    return Finding("ok", "app", f"gradio {installed_version('gradio')} is installed")


def port(number: int) -> Finding:
    with socket.socket() as probe:
        if os.name != "nt":  # on Windows this would let two programs share a port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError as error:
            fact = f"{number} cannot be used ({error.strerror})"
            return Finding("note", "port", fact, "start the app with another --port, unless it is already running")
    return Finding("ok", "port", f"{number} is free for the app")


def gpu() -> Iterator[Finding]:
    """Train the first steps of a model of SDXL's size on the GPU, and report their self-checks."""
    import torch

    if not torch.cuda.is_available():
        yield Finding("problem", "gpu", "there is no CUDA device to train on", "see the line about torch above")
        return
    from flatlora_diffusion.training.gpu_check import gpu_check_configs

    for config in gpu_check_configs():
        yield from gpu_check_findings(config)


def gpu_check_findings(config: TrainConfig) -> Iterator[Finding]:
    """A line for each thing that three steps of `config`, with random weights, have shown of this device."""
    from flatlora_diffusion.training.gpu_check import run_gpu_check

    subject = f"gpu, {METHODS[config.perturb.method].title}"
    try:
        checks = run_gpu_check(config)
    except RunError as error:
        yield Finding("problem", subject, str(error))
        return
    for check in checks:
        # Trainings are right with a wrong estimate of memory, and with a rho that half precision rounds away.
        failed: Literal["note", "problem"] = "note" if check.name in ("cost", "rise") else "problem"
        remedy = "" if check.is_right else "please report this with the lines above"
        yield Finding("ok" if check.is_right else failed, subject, check.message, remedy)
