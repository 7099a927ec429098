"""The run folder: the only interface between the trainer and everything that reads a run.

config.json       the resolved settings, without absolute paths
manifest.json     names, hashes and sizes of the training images
events.jsonl      one JSON object per line: hashes of the initial state, every optimizer step with the hash of its
                  random draws, the end of the run
checkpoint-N/     LoRA file and optimizer state after N steps
images/           preview images
NAME.safetensors  the LoRA for other tools, with NAME.json and NAME.png; pytorch_lora_weights.safetensors for diffusers
merged/           the pipeline that full fine-tuning saves
NAME.comfyui.json, NAME.comfyui_api.json, NAME.parameters.txt  settings to reproduce NAME.png in ComfyUI and in A1111
stop, save        files that request to stop, or to save a checkpoint, after the current step
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flatlora_diffusion.config import (
    ConfigError,
    RunError,
    TrainConfig,
    removed_settings,
    settings_with,
    with_legacy_defaults,
)
from flatlora_diffusion.storage.atomic_io import concerns_folder, remove_partial_files, write_json
from flatlora_diffusion.storage.formatting import slug
from flatlora_diffusion.storage.saved_config import changed_names, expand_paths, portable
from flatlora_diffusion.storage.separate_folders import relation

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that stock pipelines load
EMBEDDINGS_FILE = "pytorch_lora_weights_emb.safetensors"  # embeddings of new tokens
MERGED = "merged"  # the pipeline that full fine-tuning saves
KOHYA_COPY = "pytorch_lora_weights_kohya.safetensors"  # the name that diffusers' script gives the file for other tools
_RUN_FILES = ("events.jsonl", "images", "README.md", "logs", LORA_FILE, EMBEDDINGS_FILE, KOHYA_COPY)
# These files make a folder a run. Written first and moved last, so that an interruption leaves a recognizable run.
_IDENTITY = ("config.json", "manifest.json")
MEMBER = "member-"  # of the LoRAs that --members averages
COMFYUI, COMFYUI_API, A1111_TEXT = ".comfyui.json", ".comfyui_api.json", ".parameters.txt"
BESIDE_LORA = (".json", ".png", COMFYUI, COMFYUI_API, A1111_TEXT)  # suffixes of the files beside the LoRA file
# Stems of a run's other files, and device names that Windows reserves.
_RESERVED = re.compile(r"config|manifest|state|pytorch_lora_weights.*|con|prn|aux|nul|(com|lpt)\d", re.IGNORECASE)
_LONGEST_NAME = 80
_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")  # but not a user's checkpoint-100-best
_PARTIAL_CHECKPOINT = re.compile(r"\.checkpoint-[0-9]+\.(part|old)")  # left by a killed run

Event = dict[str, Any]


class RunDir:
    """The folder of a run; it defines all file names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_file = folder / "config.json"
        self.manifest_file = folder / "manifest.json"
        self.events_file = folder / "events.jsonl"
        self.images = folder / "images"
        self.stop_file = folder / "stop"
        self.stop_files = [self.stop_file]  # a request in any of these stops the run
        self.save_file = folder / "save"

    def check_new(self, config: Mapping[str, Any]) -> None:
        """Raise ConfigError if a new run in this folder would move or overwrite files that are not of a run."""
        existing = self._existing_files(config)
        if existing and not self._holds_run():
            names = ", ".join(path.name for path in existing)
            raise ConfigError(
                f"output_dir={str(self.folder)!r} holds {names}, which a run would overwrite, but no earlier run; "
                "give a new folder, for example one inside it"
            )
        lora_file = self.folder / f"{self.lora_name(config.get('output_name'))}.safetensors"
        for name in settings_with("read_at_runtime"):
            value = config.get(name)
            if not value:
                continue
            if any(relation(Path(value), path) in ("is", "lies in") for path in existing):
                raise ConfigError(
                    f"{name}={value!r} is among the files of an earlier run in output_dir, which a new run moves "
                    "away; give another output_dir"
                )
            if relation(Path(value), lora_file) == "is":
                raise ConfigError(
                    f"{name}={value!r} is the file that the run would write; give another output_dir or output_name"
                )

    def start(self, config: Mapping[str, Any], manifest: list[dict[str, Any]]) -> None:
        """Create the folder of a new run. An earlier run in it is moved to `earlier-N/`, never overwritten."""
        self.check_new(config)
        with self.writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._archive(self._existing_files(config))
            write_json(self.manifest_file, manifest)
            write_json(self.config_file, portable(config))

    def clean(self) -> None:
        """Delete stop and save requests, and partial files of killed runs."""
        self.stop_file.unlink(missing_ok=True)
        self.save_file.unlink(missing_ok=True)
        remove_partial_files(self.images)
        for path in self.folder.iterdir():
            if _PARTIAL_CHECKPOINT.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def member(self, number: int) -> RunDir:
        """Return the folder of a member of --members; a request to stop this run stops it too."""
        member = RunDir(self.folder / f"{MEMBER}{number}")
        member.stop_files.append(self.stop_file)
        return member

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Convert an OSError of the run folder to a RunError."""
        try:
            yield
        except OSError as error:
            if not concerns_folder(error, self.folder):
                raise
            raise RunError(f"the run folder cannot be written: {error.strerror or error}") from error

    def archive_checkpoints_after(self, step: int) -> None:
        """Move the checkpoints after `step` to `earlier-N/`: a run resumed there does not reproduce them."""
        with self.writing():
            self._archive([path for path in self.checkpoints() if _step_of(path) > step])

    def lora_name(self, output_name: str | None) -> str:
        """Return the stem of the LoRA file for other tools: `output_name`, or else the folder's name."""
        return file_name(output_name or self.folder.resolve().name)

    def weight_files(self) -> list[str]:
        """Return the names of the run's LoRA and embedding files that exist."""
        names = [name for name in _RUN_FILES if name.endswith(".safetensors")]
        saved = json.loads(self.config_file.read_text(encoding="utf-8"))
        names.append(f"{self.lora_name(saved.get('output_name'))}.safetensors")
        return sorted(name for name in names if (self.folder / name).is_file())

    def update(self, config: Mapping[str, Any]) -> None:
        """Save the settings of a resumed run."""
        with self.writing():
            write_json(self.config_file, portable(config))

    def take_save_request(self) -> bool:
        """Remove the request to save a checkpoint; returns whether there was a request."""
        is_requested = self.save_file.exists()
        self.save_file.unlink(missing_ok=True)
        return is_requested

    def add_event(self, event: Mapping[str, Any]) -> None:
        with self.writing():
            append_event(self.events_file, event)

    def events(self) -> list[dict[str, Any]]:
        """Return all complete events so far, including steps that were repeated after a resume."""
        return read_events(self.events_file)

    def steps(self) -> list[dict[str, Any]]:
        """Return one event per step in order; the last one of steps that were repeated after a resume."""
        return valid_events(self.events(), "step")

    def ending(self) -> dict[str, Any] | None:
        """Return the event `finished` or `stopped` that ended the run; None while it runs and after a crash."""
        events = [event for event in self.events() if event["event"] in ("step", "stopped", "finished")]
        return events[-1] if events and events[-1]["event"] != "step" else None

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended with a result that is still there."""
        ending = self.ending()
        return ending is not None and ending["event"] == "finished" and (self.folder / LORA_FILE).is_file()

    def holdout_losses(self) -> dict[int, float]:
        """Return the loss of the held-out images by step, without steps that a resume has undone."""
        return {event["step"]: event["loss"] for event in valid_events(self.events(), "holdout")}

    def image_losses(self) -> list[dict[str, Any]]:
        """Return the losses of each training image, one event per step, without steps that a resume has undone."""
        return valid_events(self.events(), "image_losses")

    def manifest(self) -> list[dict[str, Any]]:
        manifest: list[dict[str, Any]] = json.loads(self.manifest_file.read_text(encoding="utf-8"))
        return manifest

    def config(self) -> dict[str, Any]:
        """Return the saved settings. Raises ConfigError if the folder has no run."""
        if not self.config_file.is_file():
            raise ConfigError(
                f"output_dir={str(self.folder)!r} holds no run to resume; leave --resume_from_checkpoint out"
            )
        return expand_paths(with_legacy_defaults(json.loads(self.config_file.read_text(encoding="utf-8"))))

    def removed_settings(self) -> list[str]:
        """`name=value` for each saved setting that this version does not have."""
        is_there = self.config_file.is_file()
        return removed_settings(json.loads(self.config_file.read_text(encoding="utf-8"))) if is_there else []

    def with_saved_settings(self, config: TrainConfig) -> TrainConfig:
        """Return `config` with the saved value of each setting that is None."""
        given, saved = config.to_dict(), self.config()
        epochs = given["num_train_epochs"]
        # The saved number of steps was computed from the saved number of epochs.
        if epochs not in (TrainConfig().optim.num_train_epochs, saved.get("num_train_epochs")):
            saved.pop("max_train_steps", None)
        return config.replace(
            **{name: saved[name] for name, value in given.items() if value is None and name in saved}
        )

    def changed_settings(self, config: TrainConfig, ignored: Collection[str] = ()) -> list[str]:
        """Return `name=saved, not now` for each changed setting that affects the steps already taken."""
        now, saved = config.to_dict(), {**TrainConfig().to_dict(), **self.config()}
        return [f"{name}={saved[name]!r}, not {now[name]!r}" for name in changed_names(now, saved, ignored)]

    def checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        paths = [path for path in self.folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
        return sorted((path for path in paths if path.is_dir()), key=_step_of)

    def last_checkpoint_text(self) -> str:
        """Return a clause that names the last checkpoint."""
        checkpoints = self.checkpoints()
        return f"the last good checkpoint is {checkpoints[-1].name}" if checkpoints else "no checkpoint was saved yet"

    def checkpoint(self, name: str) -> Path:
        """Return the checkpoint called `name`, or the newest for `latest`. Raises ConfigError if there is none."""
        checkpoints = self.checkpoints()
        if name == "latest" and checkpoints:
            return checkpoints[-1]
        checkpoint = self.folder / Path(name).name
        if checkpoint not in checkpoints:
            names = ", ".join(path.name for path in checkpoints) or "none"
            raise ConfigError(f"resume_from_checkpoint={name!r} is not in {self.folder}; checkpoints there: {names}")
        return checkpoint

    @contextmanager
    def new_checkpoint(self, step: int, limit: int | None, keep: Collection[int] = ()) -> Iterator[Path]:
        """Yield a temporary folder for checkpoint `step`; on success it gets its name and old checkpoints are deleted.

        Args:
            limit: how many checkpoints remain; None for all.
            keep: steps whose checkpoints remain beyond the limit.
        """
        final, temporary = self.folder / f"checkpoint-{step}", self.folder / f".checkpoint-{step}.part"
        with self.writing():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            try:
                yield temporary
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)  # on a full disk the next checkpoint needs the space
                raise
            self._remove(final)
            os.replace(temporary, final)
            for old in self.checkpoints()[:-limit] if limit is not None else []:
                if _step_of(old) not in keep:
                    self._remove(old)

    def _remove(self, checkpoint: Path) -> None:
        """Delete a checkpoint, after a rename so that a partly deleted folder is no checkpoint."""
        if checkpoint.is_symlink():
            checkpoint.unlink()  # its target belongs to the user
        elif checkpoint.exists():
            old = self.folder / f".{checkpoint.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            os.replace(checkpoint, old)
            shutil.rmtree(old, ignore_errors=True)

    def _holds_run(self) -> bool:
        """Whether the folder has a run of this program or of diffusers' script."""
        return self._has_manifest() or (self.folder / LORA_FILE).is_file() or bool(self.checkpoints())

    def _has_manifest(self) -> bool:
        """Whether manifest.json is of a run; web applications have files of that name too."""
        try:
            rows = json.loads(self.manifest_file.read_bytes())
        except (OSError, ValueError):
            return False
        return isinstance(rows, list) and all(isinstance(row, dict) and "sha256" in row for row in rows)

    def _existing_files(self, config: Mapping[str, Any]) -> list[Path]:
        """Return the existing files and folders that a run would write, in the order in which to move them."""
        names: set[str] = set()
        earlier: dict[str, Any] = {}
        if self._holds_run():
            earlier = json.loads(self.config_file.read_text(encoding="utf-8")) if self.config_file.exists() else {}
            names = {self.lora_name(values.get("output_name")) for values in (config, earlier)}
            names.add(file_name(Path(earlier.get("output_dir", "")).name))  # the folder may have been renamed
        saves_merged = any(values.get("adapter") == "full" for values in (config, earlier))
        files = [
            *_RUN_FILES,
            *([MERGED] if saves_merged else []),
            *sorted(name + ending for name in names for ending in (".safetensors", *BESIDE_LORA)),
            *_IDENTITY,
        ]
        return self.checkpoints() + [self.folder / name for name in files if (self.folder / name).exists()]

    def _archive(self, paths: list[Path]) -> None:
        """Move `paths` to a new folder `earlier-N/`."""
        if not paths:
            return
        number = 1
        while (self.folder / f"earlier-{number}").exists():
            number += 1
        earlier = self.folder / f"earlier-{number}"
        earlier.mkdir()
        for path in paths:
            os.replace(path, earlier / path.name)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def file_name(text: str) -> str:
    """Return `text` as a file name that is valid on any system and in a prompt of A1111.

    It has letters, digits, `-`, `_` and inner `.` only.
    """
    name = slug(text).strip("-.")[:_LONGEST_NAME].rstrip("-.") or "lora"
    return f"lora-{name}" if _RESERVED.fullmatch(name.split(".")[0]) else name


def append_event(path: Path, event: Mapping[str, Any]) -> None:
    """Append one event and flush it."""
    with open(path, "ab+") as handle:
        if handle.tell() > 0:
            handle.seek(-1, os.SEEK_END)
            if handle.read() != b"\n":  # a power cut or a full disk truncated the last event
                handle.write(b"\n")
        handle.write(json.dumps(event).encode() + b"\n")


def read_events(path: Path) -> list[Event]:
    """Return all complete events so far, without truncated lines."""
    if not path.exists():
        return []
    events = []
    for line in path.read_bytes().splitlines():
        with suppress(ValueError):
            events.append(json.loads(line))
    return events


def apply_event(by_step: dict[int, Event], event: Event, kind: str) -> None:
    """Add an event of this kind to `by_step`, keyed by the number of completed steps; the latest comes last.

    A `resumed` event removes the events after the step that the run was resumed from.
    """
    if event["event"] == "resumed":
        for later in [done for done in by_step if done > event["step"]]:
            del by_step[later]
    elif event["event"] == kind:
        done = event["step"] + (kind == "step")  # only `step` events have an index, which starts at 0
        by_step.pop(done, None)
        by_step[done] = event


def valid_events(events: Iterable[Event], kind: str) -> list[Event]:
    """Return the valid events of a kind, one per step, ordered by step."""
    by_step: dict[int, Event] = {}
    for event in events:
        apply_event(by_step, event, kind)
    return [by_step[done] for done in sorted(by_step)]
