"""The run folder: the only contract between the trainer and everything that looks at a run.

config.json       the settings, resolved; no absolute paths
manifest.json     names, hashes and sizes of the training images
events.jsonl      one JSON object per line, appended: the hashes of what it starts from, every optimizer step with the
                  hash of its draws, then how the run ended
checkpoint-N/     LoRA file and optimizer state after N steps
images/           preview images
NAME.safetensors  the LoRA for other tools, with NAME.json and NAME.png; pytorch_lora_weights.safetensors for diffusers
merged/           the pipeline that full fine-tuning leaves
NAME.comfyui.json, NAME.comfyui_api.json, NAME.parameters.txt  what draws NAME.png in ComfyUI and in A1111
holdout-fold-N/   the run that holds out a part of the images, to find how many steps are best
stop, save        files that ask a run to stop, or to save a checkpoint, after the step it is at
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
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
from flatlora_diffusion.storage.atomic_io import is_of, remove_half_written, write_json
from flatlora_diffusion.storage.events import append_event, counting, read_events
from flatlora_diffusion.storage.saved_config import altered, opened, portable
from flatlora_diffusion.storage.separate_folders import relation

LORA_FILE = "pytorch_lora_weights.safetensors"  # what a stock pipeline looks for
EMBEDDINGS_FILE = "pytorch_lora_weights_emb.safetensors"  # those of new tokens
MERGED = "merged"  # the pipeline that full fine-tuning leaves
KOHYA_COPY = "pytorch_lora_weights_kohya.safetensors"  # the name that diffusers' script gives the file for other tools
_RUN_FILES = ("events.jsonl", "images", "README.md", "logs", LORA_FILE, EMBEDDINGS_FILE, KOHYA_COPY)
# What makes a folder a run: written first and moved away last, so that it is known for one whatever cuts that off.
_IDENTITY = ("config.json", "manifest.json")
FOLD = "holdout-fold-"
MEMBER = "member-"  # of the LoRAs that --members averages
COMFYUI, COMFYUI_API, A1111_TEXT = ".comfyui.json", ".comfyui_api.json", ".parameters.txt"
BESIDE_LORA = (".json", ".png", COMFYUI, COMFYUI_API, A1111_TEXT)  # the endings of what stands with the LoRA's file
# Stems that a run's other files have, and those that Windows keeps for devices.
_TAKEN_NAMES = re.compile(r"config|manifest|state|pytorch_lora_weights.*|con|prn|aux|nul|(com|lpt)\d", re.IGNORECASE)
_LONGEST_NAME = 80
_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")  # and not a user's checkpoint-100-best
_HALF_CHECKPOINT = re.compile(r"\.checkpoint-[0-9]+\.(part|old)")  # of a run that was killed


class RunDir:
    """One run's folder; all file names are decided here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_file = folder / "config.json"
        self.manifest_file = folder / "manifest.json"
        self.events_file = folder / "events.jsonl"
        self.images = folder / "images"
        self.stop_file = folder / "stop"
        self.stop_files = [self.stop_file]  # those that it obeys
        self.save_file = folder / "save"

    def check_new(self, config: Mapping[str, Any]) -> None:
        """Raises ConfigError if a new run in this folder would move away or overwrite what no run has made."""
        present = self._present(config)
        if present and not self._holds_run():
            names = ", ".join(path.name for path in present)
            raise ConfigError(
                f"output_dir={str(self.folder)!r} holds {names}, where a run writes files of its own, but no earlier "
                "run; give a new folder, such as one inside of it"
            )
        own = self.folder / f"{self.lora_name(config.get('output_name'))}.safetensors"
        for name in settings_with("read_at_runtime"):
            given = config.get(name)
            if not given:
                continue
            if any(relation(Path(given), path) in ("is", "lies in") for path in present):
                raise ConfigError(
                    f"{name}={given!r} lies where output_dir has the files of an earlier run, which a new one moves "
                    "aside; give another output_dir"
                )
            if relation(Path(given), own) == "is":
                raise ConfigError(
                    f"{name}={given!r} is the file that the run would write; give another output_dir or output_name"
                )

    def start(self, config: Mapping[str, Any], manifest: list[dict[str, Any]]) -> None:
        """Make the folder for a new run. An earlier run in it is moved aside to `earlier-N/`, never overwritten."""
        self.check_new(config)
        with self.writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._move_aside(self._present(config))
            write_json(self.manifest_file, manifest)
            write_json(self.config_file, portable(config))

    def clean(self) -> None:
        """Forget requests to runs that have ended, and what they have left half-written in folders of the run."""
        self.stop_file.unlink(missing_ok=True)
        self.save_file.unlink(missing_ok=True)
        remove_half_written(self.images)
        for path in self.folder.iterdir():
            if _HALF_CHECKPOINT.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def fold(self, number: int) -> RunDir:
        """The folder of one of --holdout_folds, which obeys a request to stop this run, too."""
        return self._inner(f"{FOLD}{number}")

    def member(self, number: int) -> RunDir:
        """The folder of one of --members, which obeys a request to stop this run, too."""
        return self._inner(f"{MEMBER}{number}")

    def _inner(self, name: str) -> RunDir:
        inner = RunDir(self.folder / name)
        inner.stop_files.append(self.stop_file)
        return inner

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Raises RunError in place of an OSError of the run folder."""
        try:
            yield
        except OSError as error:
            if not is_of(error, self.folder):
                raise
            raise RunError(f"the run folder cannot be written: {error.strerror or error}") from error

    def forget_after(self, step: int) -> None:
        """Move the checkpoints of later steps aside: what goes on from `step` is another run than they belong to."""
        with self.writing():
            self._move_aside([path for path in self.checkpoints() if _step_of(path) > step])

    def lora_name(self, output_name: str | None) -> str:
        """The name of the LoRA in other tools, which is its file's name: the one given or else the folder's."""
        return file_name(output_name or self.folder.resolve().name)

    def weight_files(self) -> list[str]:
        """The names of the run's own LoRA and embedding files that are there, without anything else's."""
        names = [name for name in _RUN_FILES if name.endswith(".safetensors")]
        saved = json.loads(self.config_file.read_text(encoding="utf-8"))
        names.append(f"{self.lora_name(saved.get('output_name'))}.safetensors")
        return sorted(name for name in names if (self.folder / name).is_file())

    def update(self, config: Mapping[str, Any]) -> None:
        """Save the settings that a resumed run has from now on."""
        with self.writing():
            write_json(self.config_file, portable(config))

    def takes_save_request(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        is_asked = self.save_file.exists()
        self.save_file.unlink(missing_ok=True)
        return is_asked

    def add_event(self, event: Mapping[str, Any]) -> None:
        with self.writing():
            append_event(self.events_file, event)

    def events(self) -> list[dict[str, Any]]:
        """All complete events so far, those of steps that were taken again too."""
        return read_events(self.events_file)

    def steps(self) -> list[dict[str, Any]]:
        """The event of each step once, in their order; of steps that were taken again after a resume, the last."""
        return counting(self.events(), "step")

    def ending(self) -> dict[str, Any] | None:
        """The event `finished` or `stopped` that ended the run; None while it goes on, and after a crash."""
        told = [event for event in self.events() if event["event"] in ("step", "stopped", "finished")]
        return told[-1] if told and told[-1]["event"] != "step" else None

    def holdout_losses(self) -> dict[int, float]:
        """The loss of the held-out images by step; what came after the step that was resumed from counts no more."""
        return {event["step"]: event["loss"] for event in counting(self.events(), "holdout")}

    def manifest(self) -> list[dict[str, Any]]:
        manifest: list[dict[str, Any]] = json.loads(self.manifest_file.read_text(encoding="utf-8"))
        return manifest

    def config(self) -> dict[str, Any]:
        """The saved settings. Raises ConfigError when the folder holds no run."""
        if not self.config_file.is_file():
            raise ConfigError(
                f"output_dir={str(self.folder)!r} holds no run to resume; leave --resume_from_checkpoint out"
            )
        return opened(with_legacy_defaults(json.loads(self.config_file.read_text(encoding="utf-8"))))

    def removed_settings(self) -> list[str]:
        """`name=value` for each saved setting that this version does not have."""
        is_there = self.config_file.is_file()
        return removed_settings(json.loads(self.config_file.read_text(encoding="utf-8"))) if is_there else []

    def filled_in(self, config: TrainConfig) -> TrainConfig:
        """`config` with the saved value of each setting that it leaves open.

        Another number of epochs settles the steps: those that are saved are the ones that the earlier epochs made.
        """
        given, saved = config.to_dict(), self.config()
        epochs = given["num_train_epochs"]
        if epochs not in (TrainConfig().optim.num_train_epochs, saved.get("num_train_epochs")):
            saved.pop("max_train_steps", None)
        return config.replace(
            **{name: saved[name] for name, value in given.items() if value is None and name in saved}
        )

    def changed_settings(self, config: TrainConfig, but: Collection[str] = ()) -> list[str]:
        """`name=saved, not now` for each setting that would alter the steps already taken, those in `but` left out."""
        now, saved = config.to_dict(), {**TrainConfig().to_dict(), **self.config()}
        return [f"{name}={saved[name]!r}, not {now[name]!r}" for name in altered(now, saved, but)]

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        found = [path for path in self.folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
        return sorted((path for path in found if path.is_dir()), key=_step_of)

    def last_checkpoint(self) -> str:
        """Which checkpoint is the last, in words."""
        kept = self.checkpoints()
        return f"the last good checkpoint is {kept[-1].name}" if kept else "no checkpoint was saved yet"

    def checkpoint(self, name: str) -> Path:
        """The checkpoint called `name`, or the newest for `latest`. Raises ConfigError when there is none."""
        checkpoints = self.checkpoints()
        if name == "latest" and checkpoints:
            return checkpoints[-1]
        wanted = self.folder / Path(name).name
        if wanted not in checkpoints:
            known = ", ".join(path.name for path in checkpoints) or "none"
            raise ConfigError(f"resume_from_checkpoint={name!r} is not in {self.folder}; checkpoints there: {known}")
        return wanted

    @contextmanager
    def new_checkpoint(self, step: int, limit: int | None, keep: Collection[int] = ()) -> Iterator[Path]:
        """A folder to write checkpoint `step` into. It gets its name when all is written; then old ones go.

        Those of the steps `keep` stay, beyond the limit.
        """
        final, aside = self.folder / f"checkpoint-{step}", self.folder / f".checkpoint-{step}.part"
        with self.writing():
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            try:
                yield aside
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)  # on a full disk it would take what the next one needs
                raise
            self._remove(final)
            os.replace(aside, final)
            for old in self.checkpoints()[:-limit] if limit is not None else []:
                if _step_of(old) not in keep:
                    self._remove(old)

    def _remove(self, checkpoint: Path) -> None:
        """Delete a checkpoint; while that goes on it counts as none."""
        if checkpoint.is_symlink():
            checkpoint.unlink()  # where it leads is the user's
        elif checkpoint.exists():
            old = self.folder / f".{checkpoint.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            os.replace(checkpoint, old)
            shutil.rmtree(old, ignore_errors=True)

    def _holds_run(self) -> bool:
        """Whether a run of this program, or of diffusers' script, has been here."""
        return self._has_manifest() or (self.folder / LORA_FILE).is_file() or bool(self.checkpoints())

    def _has_manifest(self) -> bool:
        """Whether there is a manifest.json of a run's kind; web pages have files of that name too."""
        try:
            rows = json.loads(self.manifest_file.read_bytes())
        except (OSError, ValueError):
            return False
        return isinstance(rows, list) and all(isinstance(row, dict) and "sha256" in row for row in rows)

    def _present(self, config: Mapping[str, Any]) -> list[Path]:
        """What is in the folder already of all that a run writes, in the order in which to move it away."""
        names: set[str] = set()
        earlier: dict[str, Any] = {}
        if self._holds_run():
            earlier = json.loads(self.config_file.read_text(encoding="utf-8")) if self.config_file.exists() else {}
            names = {self.lora_name(values.get("output_name")) for values in (config, earlier)}
            names.add(file_name(Path(earlier.get("output_dir", "")).name))  # if the folder was renamed since
        leaves_merged = any(values.get("adapter") == "full" for values in (config, earlier))
        files = [
            *_RUN_FILES,
            *([MERGED] if leaves_merged else []),
            *sorted(name + ending for name in names for ending in (".safetensors", *BESIDE_LORA)),
            *_IDENTITY,
        ]
        return self.checkpoints() + [self.folder / name for name in files if (self.folder / name).exists()]

    def _move_aside(self, paths: list[Path]) -> None:
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
    """`text` as a file's name on any system and in a prompt of A1111: letters, digits, `-`, `_` and inner `.`."""
    name = re.sub(r"[^\w.-]+", "-", text).strip("-.")[:_LONGEST_NAME].rstrip("-.") or "lora"
    return f"lora-{name}" if _TAKEN_NAMES.fullmatch(name.split(".")[0]) else name
