"""Pictures of finished `generate` jobs, found by their full settings, so that none is drawn twice."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from PIL import Image

from flatlora_diffusion.config import ModelConfig
from flatlora_diffusion.families.paths import base_path
from flatlora_diffusion.gallery.png_text import SETTINGS

from ..process.database import Job
from ..process.file_cache import file_hash
from ..queue.queue import JobQueue

_IDENTITY = "base_identity"
PRECISIONS = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}  # of the computing, and what each is called
_MODELS = ("--pretrained_model_name_or_path", "--pretrained_vae_model_name_or_path")
_REVISION = "--revision"
_READ = ("*.safetensors", "*.json", "*.bin")
_SAMPLE_BYTES = 2**16  # from both ends of each file, as all of SDXL would take minutes


@dataclass(frozen=True)
class Drawing:
    """The settings that all pictures of a comparison share.

    Attributes:
        base: arguments of `generate` that name the base model.
        precision: compute precision, as `generate` calls it.
        identity: hash of the base at that path.
    """

    base: tuple[str, ...]
    resolution: int
    steps: int
    guidance: float
    precision: str
    identity: str


@dataclass(frozen=True)
class Picture:
    """All settings of one picture.

    Attributes:
        lora: SHA-256 of the LoRA file; None, with strength 0, for the base.
    """

    drawing: Drawing
    prompt: str
    seed: int
    lora: str | None = None
    strength: float = 0.0

    @property
    def key(self) -> str:
        """A name for it, the same in every session."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class DrawOrder:
    """One `generate` job: prompts x seeds with the base, and with each LoRA at each strength."""

    drawing: Drawing
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    loras: tuple[str, ...] = ()
    strengths: tuple[float, ...] = (1.0,)

    def arguments(self) -> list[str]:
        """The command line after `python -m flatlora_diffusion`; no prompt may start with a dash, as a flag does."""
        drawing = self.drawing
        values: dict[str, Sequence[Any]] = {
            "resolution": [drawing.resolution],
            "num_inference_steps": [drawing.steps],
            "guidance_scale": [drawing.guidance],
            "mixed_precision": [drawing.precision],
            "prompts": self.prompts,
            "seeds": self.seeds,
            "lora": self.loras,
            "strengths": self.strengths,
        }
        flags = [part for name, many in values.items() if many for part in (f"--{name}", *map(str, many))]
        return ["generate", *drawing.base, *flags]

    @classmethod
    def of(cls, job: Job) -> DrawOrder | None:
        """The order of a job; None for other jobs."""
        arguments, identity = job.settings, job.about.get(_IDENTITY)
        if job.kind != "generate" or not isinstance(arguments, list) or identity is None:
            return None
        return cls.read(arguments, identity)

    @property
    def about(self) -> dict[str, str]:
        """The job's details that its arguments do not contain."""
        return {_IDENTITY: self.drawing.identity}

    @classmethod
    def read(cls, arguments: Sequence[str], identity: str) -> DrawOrder | None:
        """Parse an order from its arguments; None for other command lines."""
        if not {"--resolution", "--mixed_precision", "--prompts"} <= set(arguments):
            return None
        start = arguments.index("--resolution")
        values: dict[str, list[str]] = {}
        for part in arguments[start:]:
            if part.startswith("--"):
                last = values.setdefault(part[2:], [])
            else:
                last.append(part)
        drawing = Drawing(
            tuple(arguments[1:start]),
            int(values["resolution"][0]),
            int(values["num_inference_steps"][0]),
            float(values["guidance_scale"][0]),
            values["mixed_precision"][0],
            identity,
        )
        return cls(
            drawing,
            tuple(values["prompts"]),
            tuple(map(int, values["seeds"])),
            tuple(values.get("lora", ())),
            tuple(map(float, values["strengths"])),
        )

    def pictures(self) -> list[Picture]:
        """The pictures of the job, without those of deleted LoRA files."""
        shares: list[tuple[str | None, float]] = [(None, 0.0)]
        for path in self.loras:
            if Path(path).is_file():
                shares += [(file_hash(Path(path)), strength) for strength in self.strengths if strength]
        return [
            Picture(self.drawing, prompt, seed, lora, strength)
            for prompt in self.prompts
            for seed in self.seeds
            for lora, strength in shares
        ]


class PictureCache:
    """The pictures below the results of a queue. Safe under several threads."""

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self._lock = threading.Lock()
        self._found: dict[Picture, Path] = {}
        self._seen: set[Path] = set()
        self._closed: set[int] = set()

    def find(self, pictures: Iterable[Picture]) -> dict[Picture, Path]:
        """The files of the pictures that exist."""
        with self._lock:
            for job, order in self._orders():
                if job.id not in self._closed:
                    self._look_into(self._queue.output_of(job), order.drawing)
                if job.state not in ("queued", "running"):
                    self._closed.add(job.id)
            return {one: self._found[one] for one in pictures if one in self._found and self._found[one].exists()}

    def jobs_for(self, pictures: Iterable[Picture]) -> list[Job]:
        """The jobs that draw, or have tried to draw, any of `pictures`, the oldest first."""
        wanted = set(pictures)
        return [job for job, order in self._orders() if not wanted.isdisjoint(order.pictures())]

    def pictures_of(self, job: Job) -> list[Picture]:
        """The pictures of a job."""
        order = DrawOrder.of(job)
        return [] if order is None else order.pictures()

    def _orders(self) -> Iterator[tuple[Job, DrawOrder]]:
        for job in self._queue.jobs():
            order = DrawOrder.of(job)
            if order is not None:
                yield job, order

    def _look_into(self, folder: Path, drawing: Drawing) -> None:
        for path in folder.glob("*/*_seed-*.png"):
            if path in self._seen:
                continue
            picture = _read(path, drawing)
            if picture is not None:
                self._seen.add(path)
                self._found[picture] = path


def orders_for(missing: Iterable[Picture], drawing: Drawing, files: Mapping[str, Path]) -> list[DrawOrder]:
    """The fewest orders for the `missing` pictures: prompts with the same gaps share one.

    Args:
        files: LoRA files by their hash.
    """
    gaps: dict[str, set[Picture]] = {}
    for picture in missing:
        gaps.setdefault(picture.prompt, set()).add(picture)
    prompts: dict[tuple[Any, ...], list[str]] = {}
    for prompt, pictures in gaps.items():
        seeds = tuple(sorted({one.seed for one in pictures}))
        loras = tuple(str(file) for sha, file in files.items() if any(one.lora == sha for one in pictures))
        strengths = tuple(sorted({one.strength for one in pictures if one.lora})) or (1.0,)
        prompts.setdefault((seeds, loras, strengths), []).append(prompt)
    return [
        DrawOrder(drawing, tuple(same), seeds, loras, strengths) for (seeds, loras, strengths), same in prompts.items()
    ]


def base_arguments(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The arguments that name the base of a run with `settings`."""
    parts: list[str] = []
    for item in fields(ModelConfig):
        value = settings.get(item.name, item.default)
        if item.name != "pretrained_model_name_or_path" and value == item.default:
            continue
        parts += [f"--{item.name}"] if value is True else [f"--{item.name}", str(value)]
    return tuple(parts)


def _read(path: Path, drawing: Drawing) -> Picture | None:
    """The picture in the file; None for an unfinished file or another precision."""
    try:
        with Image.open(path) as image:
            image.load()
            values = json.loads(image.info[SETTINGS])
    except (OSError, SyntaxError, KeyError):
        return None
    if values.get("mixed_precision") != drawing.precision:
        return None
    used = [(lora["sha256"], lora["strength"]) for lora in values["lora"] if lora["strength"]]
    return Picture(drawing, values["prompt"], values["seed"], *(used[0] if used else ()))


def base_identity(arguments: Sequence[str]) -> str:
    """The hash of the base and VAE that a list of `--flag value` names; it changes with the files at their paths."""
    digest = hashlib.sha256()
    for flag in _MODELS:
        if flag in arguments:
            name = arguments[arguments.index(flag) + 1]
            revision = arguments[arguments.index(_REVISION) + 1] if _REVISION in arguments else None
            digest.update(f"{flag} {_identity(base_path(name), revision)}\n".encode())
    return digest.hexdigest()[:16]


def _identity(name: str, revision: str | None) -> str:
    """The contents of a folder or file; for a hub id, its commit in the local cache."""
    path = Path(name)
    if path.exists():
        files = [path] if path.is_file() else sorted(file for pattern in _READ for file in path.rglob(pattern))
        return _sampled(tuple((str(file), (at := file.stat()).st_size, at.st_mtime_ns) for file in files))
    found = try_to_load_from_cache(name, "model_index.json", revision=revision) if name.count("/") == 1 else None
    commit = Path(found).parent.name if isinstance(found, str) else revision
    return f"{name}@{commit}"


@lru_cache(maxsize=64)
def _sampled(files: tuple[tuple[str, int, int], ...]) -> str:
    """The hash of sizes, beginnings and ends; read again only when a file has changed."""
    digest = hashlib.sha256()
    for name, size, _ in files:
        with open(name, "rb") as file:
            digest.update(f"{size}\n".encode() + file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read())
    return digest.hexdigest()
