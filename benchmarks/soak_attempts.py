"""Does any command or caption lose what is there? `python -m benchmarks.soak_attempts`

Aims every verb on LoRA files and models at what it reads, with --overwrite and by several spellings of its path;
merges into a folder that holds more than a model; trains into, inside and around a folder of images; starts on a disk
without room; and saves captions on a full disk. Each attempt must be refused in one sentence, and every file must be
as it was. The disks need root on Linux; elsewhere these attempts are left out, and the last line says so. Exit code 1
for any failure.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.soak_disk import IS_ROOT, fill as fill_disk, own_disk
from flatlora_diffusion.commands.command_line import main as flatlora
from flatlora_diffusion.config import SAMPLES, ConfigError
from flatlora_diffusion.storage.atomic_io import file_sha256

ICONS = ("bread", "crown", "taxi")
SESSION = "s" * 16
Files = dict[str, str]


@dataclass(frozen=True)
class Attempt:
    """A command line that must be refused with nothing changed, and what it is about."""

    what: str
    arguments: list[str]


@dataclass(frozen=True)
class Outcome:
    """What was wrong with an attempt; nothing if it was refused in a sentence with every file as it was."""

    what: str
    wrong: tuple[str, ...]


def prepare(folder: Path) -> None:
    """A base, images, a run with its LoRA, another LoRA, and a merged checkpoint, for all attempts to read."""
    shutil.copytree(SAMPLES / "tiny_sdxl", folder / "base", ignore=shutil.ignore_patterns("recipe", "judge", "*.py"))
    (folder / "icons").mkdir()
    for name in ICONS:
        for ending in (".png", ".txt"):
            shutil.copy(SAMPLES / "icons_3d" / f"{name}{ending}", folder / "icons")
    for seed in ("0", "1"):
        _do("train", *_training(folder, f"run-{seed}"), "--seed", seed)
    lora = folder / "run-0" / "pytorch_lora_weights.safetensors"
    tuned = ["--output", str(folder / "tuned.safetensors"), "--single_file"]
    _do("merge", "--base", str(folder / "base"), "--lora", str(lora), *tuned)
    shutil.copy(lora, folder / "base" / "mine.safetensors")
    os.link(lora, folder / "hard-link.safetensors")


def attempts(folder: Path) -> Iterator[Attempt]:
    """Every verb with each spelling of what it reads as its output, and a training amid its images."""
    base, lora = str(folder / "base"), folder / "run-0" / "pytorch_lora_weights.safetensors"
    other, tuned = folder / "run-1" / lora.name, folder / "tuned.safetensors"
    for spelling, output in spellings(lora, folder):
        of_file = {
            "merge": ["--base", base, "--lora", str(lora), "--single_file"],
            "export": [str(lora), "--base", base],
            "import": [str(lora), "--base", base],
            "resize": [str(lora), "--base", base, "--rank", "2"],
            "average": [str(lora), str(other), "--base", base],
        }
        for verb, given in of_file.items():
            yield Attempt(f"{verb} onto its LoRA, {spelling}", [verb, *given, "--output", output, "--overwrite"])
    for spelling, output in spellings(tuned, folder):
        given = ["--base", base, "--tuned", str(tuned), "--single_file_config", base]
        yield Attempt(
            f"extract onto the tuned model, {spelling}", ["extract", *given, "--output", output, "--overwrite"]
        )
        given = ["--base", str(tuned), "--single_file_config", base, "--lora", str(lora), "--single_file"]
        yield Attempt(f"merge onto its base, {spelling}", ["merge", *given, "--output", output, "--overwrite"])
    given = ["--base", str(tuned), "--single_file_config", base, "--lora", f"{base}/mine.safetensors"]
    yield Attempt("merge into a folder with more than a model", ["merge", *given, "--output", base, "--overwrite"])
    for where, output in (("on", "icons"), ("inside", "icons/run"), ("around", ".")):
        yield Attempt(f"train {where} the images", ["train", *_training(folder, output)])


def spellings(path: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """Ways to name a file; links to it only where there can be any."""
    yield "as it is", str(path)
    yield "relative", os.path.relpath(path)
    yield "by way of another folder", str(folder / "icons" / ".." / path.relative_to(folder))
    link = folder / f"link-to-{path.name}"
    with contextlib.suppress(OSError):
        if not link.is_symlink():
            link.symlink_to(path)
        yield "by a link", str(link)
    if path.name.startswith("pytorch"):
        yield "by a hard link", str(folder / "hard-link.safetensors")


def outcome(attempt: Attempt, folder: Path) -> Outcome:
    """Do it in this process, and see what it has changed and what it has said."""
    before = hashes(folder)
    code, said = _run(attempt.arguments)
    after = hashes(folder)
    wrong = [f"{name} is gone or changed" for name, digest in before.items() if after.get(name) != digest]
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if code != ConfigError.exit_code:
        wrong.append(f"it ended with exit code {code}")
    if len(lines) != 1:
        wrong.append(f"it said {len(lines)} sentences of what is wrong")
    return Outcome(attempt.what, tuple(wrong))


def on_a_disk_without_room(folder: Path) -> Iterator[Outcome]:
    """A training that would fail at its first checkpoint, and captions that cannot be written."""
    with small_disk(folder / "disk") as disk:
        fill(disk)
        yield outcome(Attempt("train on a full disk", ["train", *_training(folder, "disk/run")]), folder)
    with small_disk(folder / "captions") as disk:
        yield captions_on(disk)


def captions_on(disk: Path) -> Outcome:
    """Save over a caption when the disk is full, then once more when there is room."""
    from app.uploads.uploads import Uploads

    uploads, wrong = Uploads(disk / "uploads"), []
    image = SAMPLES / "icons_3d" / "bread.png"
    uploads.add(SESSION, [(image.name, Path(shutil.copy(image, disk / "received.png")))])
    (name,) = uploads.captions(SESSION)
    uploads.save_captions(SESSION, {name: "bread"})
    fill(disk)
    text = "a long new caption " * 100
    try:
        uploads.save_captions(SESSION, {name: text})
    except (OSError, ConfigError):
        if uploads.captions(SESSION)[name] != "bread":
            wrong.append("the caption from before is lost")
    else:
        wrong.append("a caption counted as saved on a full disk")
    (disk / "ballast").unlink()
    uploads.save_captions(SESSION, {name: text.strip()})
    if uploads.captions(SESSION)[name] != text.strip():
        wrong.append("the caption was not saved when there was room again")
    return Outcome("a caption on a full disk", tuple(wrong))


def hashes(folder: Path) -> Files:
    """The hash of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    with own_disk(folder):
        yield folder


def fill(disk: Path) -> None:
    fill_disk(disk / "ballast")


def _training(folder: Path, output: str) -> list[str]:
    given = {
        "pretrained_model_name_or_path": folder / "base",
        "instance_data_dir": folder / "icons",
        "output_dir": folder / output,
        "max_train_steps": 1,
        "learning_rate": 0.01,
        "report_to": "none",
    }
    return ["--method", "lora", *(f"--{name}={value}" for name, value in given.items())]


def _do(*arguments: str) -> None:
    code, said = _run(list(arguments))
    assert code == 0, said


def _run(arguments: list[str]) -> tuple[int, str]:
    """The exit code and all that was printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = flatlora(arguments)
    return code, printed.getvalue()


def main() -> int:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        prepare(folder)
        outcomes = [outcome(attempt, folder) for attempt in list(attempts(folder))]
        outcomes += on_a_disk_without_room(folder) if IS_ROOT else []
    for found in outcomes:
        print(f"{'; '.join(found.wrong) or 'refused'}: {found.what}")
    failed = sum(bool(found.wrong) for found in outcomes)
    print(f"{len(outcomes)} attempts, {failed} wrong" + ("" if IS_ROOT else "; no small disk could be had"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
