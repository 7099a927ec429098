"""A short training on the tiny base that can be watched, killed and started again: what `benchmarks.soak` kills.

Most starts are forks of this process, which has imported everything, and cost no import; a real start is the script as
a user starts it. Both train on one thread, so that they end in the same bits. Elsewhere than on Linux all are real.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from benchmarks.soak_judge import Left, Progress
from flatlora_diffusion.storage.atomic_io import file_sha256
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir

ROOT = Path(__file__).parents[1]
ICONS = ROOT / "samples" / "icons_3d"
CAN_FORK = sys.platform == "linux"
STEPS = 7  # so that the last one has no checkpoint of its own
PATIENCE = 1800.0  # seconds until a run counts as hung, on any machine
PROMPT = "3d icon of a crown"
SETTINGS = {
    "max_train_steps": STEPS,
    "train_batch_size": 1,
    "rank": 2,
    "resolution": 32,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 2,
    "validation_prompt": PROMPT,
    "num_validation_images": 1,
    "validation_epochs": 1,
    "save_dtype": "fp32",
    "report_to": "none",
    "seed": 0,
}
# What a user may keep in a run folder; none of it is a name that a run writes.
USERS_FILES = {
    "notes.txt": b"the third try, with a lower learning rate\n",
    f"checkpoint-2-best/{LORA_FILE}": b"a copy of the user's own",
    "checkpoint-old/state.safetensors": b"another",
    "images-mine/crown.png": b"no picture, but the user's",
    "earlier-notes/2.txt": b"two\n",
    "my.safetensors": b"a LoRA of someone else\n",
}


class Process(Protocol):
    """What a fork and a `subprocess.Popen` have in common."""

    pid: int

    def poll(self) -> int | None: ...
    def send_signal(self, number: int, /) -> None: ...
    def kill(self) -> None: ...


@dataclass
class Forked:
    """A child of this process; its exit code is read as Popen reads it."""

    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int, /) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@dataclass
class Scene:
    """A folder with images and, on what may be a disk of its own, a run folder that holds files of the user."""

    folder: Path
    has_users_files: bool = True
    runs: list[Started] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.icons, self.disk = self.folder / "icons", self.folder / "disk"
        self.run, self.cache = self.disk / "run", self.disk / "cache"
        for folder in (self.icons, self.disk):
            folder.mkdir(parents=True)

    def furnish(self) -> None:
        """Put the user's files there."""
        for name in ("bread", "crown", "taxi"):
            for ending in (".png", ".txt"):
                shutil.copy(ICONS / f"{name}{ending}", self.icons)
        self.run.mkdir()
        for name, content in USERS_FILES.items() if self.has_users_files else ():
            path = self.run / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        self._before = self._hashes([*self.icons.iterdir(), *(path for path in self.run.rglob("*") if path.is_file())])

    def touched(self) -> list[str]:
        """The user's files that are gone or different, relative to the scene."""
        now = self._hashes([path for path in self.folder.rglob("*") if path.is_file()])
        return sorted(name for name, digest in self._before.items() if now.get(name) != digest)

    def arguments(self, *more: str) -> list[str]:
        settings = {**SETTINGS, "instance_data_dir": self.icons, "output_dir": self.run}
        settings |= {"embedding_cache_dir": self.cache}
        flags = ["--cache_latents", "--cache_text_embeddings", "--push_to_hub", *more]
        return [*(f"--{name}={value}" for name, value in settings.items()), *flags]

    def start(self, *more: str, is_real: bool = False) -> Started:
        """Begin a run with these further flags."""
        log = self.folder / f"run-{len(self.runs)}.log"
        launch = real if is_real or not CAN_FORK else fork
        self.runs.append(Started(launch(self.arguments(*more), log), log))
        return self.runs[-1]

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave no run behind, whatever went wrong."""
        for run in self.runs:
            run.end()

    def checkpoints(self) -> list[int]:
        """The steps of the run's checkpoints, by their names alone."""
        names = [path.name.removeprefix("checkpoint-") for path in self.run.glob("checkpoint-*")]
        return sorted(int(name) for name in names if name.isdigit())

    def left(self) -> Left:
        return Left(self.checkpoints(), (self.run / LORA_FILE).is_file())

    def progress(self) -> Progress:
        steps = sum(marker.startswith("step-") for marker in self.markers())
        return Progress(steps, self.left())

    def markers(self) -> set[str]:
        """How far the run is, by its files."""
        found = {"cache"} if any(self.cache.glob("latent-*")) else set()
        found |= {"lora"} if (self.run / LORA_FILE).is_file() else set()
        with suppress(OSError):
            for line in RunDir(self.run).events_file.read_bytes().splitlines():
                with suppress(ValueError):
                    event = json.loads(line)
                    found.add("-".join(str(event[name]) for name in ("event", "step") if name in event))
        return found

    def _hashes(self, paths: Sequence[Path]) -> dict[str, str]:
        return {path.relative_to(self.folder).as_posix(): file_sha256(path) for path in paths}


@dataclass
class Started:
    """A run that was begun, and what it says on standard error."""

    process: Process
    log: Path

    def is_running(self) -> bool:
        return self.process.poll() is None

    def is_done(self) -> bool:
        """Whether it has ended, or said its last word and only takes leave."""
        return not self.is_running() or b"LoRA saved in" in self.log.with_suffix(".out").read_bytes()

    def wait(self) -> int | None:
        """The exit code; None for a run that hung and had to be killed."""
        end = time.monotonic() + PATIENCE
        while self.is_running():
            if time.monotonic() > end:
                self.end()
                return None
            time.sleep(0.005)
        return self.process.poll()

    def end(self) -> None:
        """Kill it, unless it has ended."""
        if self.is_running():
            self.process.kill()
            while self.is_running():
                time.sleep(0.005)

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")


def fork(arguments: Sequence[str], log: Path) -> Forked:
    """A run in a fork of this process, which has one thread and has imported what a run needs."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(log, "wb") as errors, open(log.with_suffix(".out"), "wb") as output:
        pid = os.fork()
        if pid == 0:
            _be_the_script(arguments, output, errors)
    return Forked(pid)


def real(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """The script as a user starts it."""
    command = [sys.executable, "train_dreambooth_flatlora.py", *arguments]
    with open(log, "wb") as errors, open(log.with_suffix(".out"), "wb") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=errors)


def _be_the_script(arguments: Sequence[str], output: IO[bytes], errors: IO[bytes]) -> None:
    """Run the script and end this process as the interpreter would; never returns."""
    from flatlora_diffusion.commands.command_line import train_main

    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.chdir(ROOT)
        os.dup2(output.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        code = train_main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def ready_to_start() -> Iterator[None]:
    """The environment of all runs, with a hub on localhost to upload to; on Linux their imports are done here."""
    hub = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "fake_hub.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert hub.stdout is not None
    try:
        os.environ.update(
            HF_ENDPOINT=hub.stdout.readline().strip(),
            HF_HUB_OFFLINE="0",
            HF_HUB_DISABLE_XET="1",  # large files go over plain HTTP, which the fake can take
            HF_HUB_DISABLE_TELEMETRY="1",
            HF_TOKEN="hf_soak",
            NO_PROXY="127.0.0.1",
            OMP_NUM_THREADS="1",
            PYTHONUNBUFFERED="1",
            TOKENIZERS_PARALLELISM="false",
        )
        if CAN_FORK:
            _import_what_a_run_needs()
        yield
    finally:
        hub.communicate()


def _import_what_a_run_needs() -> None:
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", DIFFUSERS_VERBOSITY="error", TRANSFORMERS_VERBOSITY="error")
    from diffusers import StableDiffusionXLPipeline  # noqa: F401 (with its parts, which it would import when loaded)

    import flatlora_diffusion.training.trainer  # noqa: F401

    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: a fork would have only one of them"
