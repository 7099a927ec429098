"""No verb overwrites its inputs under any name, and --overwrite replaces only outputs of the verb."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lora_layouts import adapted, factors, kohya, peft, saved
from safetensors.torch import load_file, save_file

from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.lora_tools.outputs import replace_folder

Contents = dict[str, bytes]


@pytest.fixture(scope="module")
def checkpoint(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as one file."""
    from diffusers import StableDiffusionXLPipeline

    from flatlora_diffusion.families.sdxl.single_file import save_single_file

    path = tmp_path_factory.mktemp("checkpoint") / "sdxl.safetensors"
    return save_single_file(StableDiffusionXLPipeline.from_pretrained(base), path)


@pytest.fixture(scope="module")
def filled(base: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the verbs read: a base, a tuned one, a checkpoint, two LoRAs and their new tokens."""
    folder = tmp_path_factory.mktemp("desk")
    whole = factors(adapted(base, ("to_q", "to_v"), ()))
    saved(kohya(whole), folder / "fox.safetensors")
    (folder / "run").mkdir()
    saved(peft(whole, {"unet": 3.0}), folder / "run" / "pytorch_lora_weights.safetensors")
    for name in ("fox_emb.safetensors", "run/pytorch_lora_weights_emb.safetensors"):
        save_file({"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 32)}, folder / name)
    shutil.copytree(base, folder / "base")
    shutil.copytree(base, folder / "tuned")
    unet = folder / "tuned" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(unet)
    save_file(weights | {name: value * 1.1 for name, value in weights.items() if "to_q" in name}, unet)
    shutil.copy(checkpoint, folder / "sdxl.safetensors")
    return folder


@pytest.fixture
def desk(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, in which the verbs are given."""
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> Contents:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def error_message(capsys: pytest.CaptureFixture[str], line: str) -> str:
    assert main(line.split()) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


MERGE = "merge --overwrite --base base --lora fox.safetensors"
SINGLE = f"{MERGE} --single_file"
EXTRACT = "extract --base base --tuned tuned --overwrite"
OF_FILES = "extract --base sdxl.safetensors --tuned tuned --single_file_config base --overwrite"
UNET = "unet/diffusion_pytorch_model.safetensors"
READ = [
    f"{SINGLE} --output fox.safetensors",
    f"{SINGLE} --output base/{UNET}",
    "merge --overwrite --base sdxl.safetensors --single_file_config base --lora run --single_file"
    " --output sdxl.safetensors",
    f"{MERGE} --output base",
    f"{MERGE} --output base/../base/",
    f"{MERGE.replace('fox', 'base/unet/fox')} --output base",
    f"{EXTRACT} --output tuned/{UNET}",
    f"{EXTRACT} --output base/{UNET}",
    f"{OF_FILES} --output sdxl.safetensors",
    "export fox.safetensors --base base --overwrite --output fox.safetensors",
    f"export fox.safetensors --base base --overwrite --output base/{UNET}",
    "import run --base base --overwrite --output run/pytorch_lora_weights.safetensors",
    "resize fox.safetensors --rank 2 --base base --overwrite --output fox.safetensors",
    "average fox.safetensors run --base base --overwrite --output run/pytorch_lora_weights.safetensors",
    "average fox.safetensors run --base base --overwrite --output fox.safetensors",
    "average fox.safetensors run --base base --overwrite --output fox_emb.safetensors",
]


def test_inputs_are_never_overwritten(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(desk / "fox.safetensors", desk / "base" / "unet" / "fox.safetensors")
    before = contents(desk)
    for line in READ:
        assert "is an input" in error_message(capsys, line), line
        assert contents(desk) == before, line


def test_an_input_is_recognized_through_a_link(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = desk / "other.safetensors"
    for line, target in (
        (f"{SINGLE} --output", "fox.safetensors"),
        (f"{EXTRACT} --output", f"tuned/{UNET}"),
        ("export fox.safetensors --base base --overwrite --output", "fox.safetensors"),
        ("import fox.safetensors --base base --overwrite --output", "fox.safetensors"),
        ("resize fox.safetensors --base base --overwrite --output", "fox.safetensors"),
        ("average fox.safetensors run --base base --overwrite --output", "fox.safetensors"),
    ):
        links: list[Callable[[Path], None]] = [other.symlink_to, other.hardlink_to]
        for link in links[: 1 if "/" in target else 2]:  # another name outside of a folder leaves what is in it
            link(desk / target)
            before = contents(desk)
            assert "is an input" in error_message(capsys, f"{line} other.safetensors"), line
            assert contents(desk) == before, line
            other.unlink()


def test_a_folder_that_contains_or_links_to_an_input_is_not_replaced(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (desk / "base-again").symlink_to(desk / "base", target_is_directory=True)
    assert "is an input" in error_message(capsys, f"{MERGE} --output base-again")
    shutil.copytree(desk / "base", desk / "models")
    shutil.move(desk / "base", desk / "models" / "base")
    before = contents(desk)
    line = f"{MERGE.replace('--base base', '--base models/base')} --output models"
    assert "holds models/base, which is an input" in error_message(capsys, line)
    assert contents(desk) == before


def test_names_in_other_case_are_the_same_file_on_a_case_insensitive_disk(
    desk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def same(one: os.PathLike[str], other: os.PathLike[str]) -> bool:
        return os.fspath(one).lower() == os.fspath(other).lower()

    shutil.copy(desk / "fox.safetensors", desk / "FOX.safetensors")
    monkeypatch.setattr(os.path, "samefile", same)  # a disk of Windows or of a Mac
    line = "export fox.safetensors --base base --overwrite --output"
    assert "is an input" in error_message(capsys, f"{line} FOX.safetensors")


def test_a_model_folder_is_replaced_only_if_it_contains_nothing_else(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(f"{MERGE} --output merged".split()) == 0
    for name in ("notes.txt", "unet/owl.safetensors", "photos/fox.png"):
        (desk / "merged" / name).parent.mkdir(exist_ok=True)
        (desk / "merged" / name).write_bytes(b"the user's")
        before = contents(desk)
        assert f"contains {name}, which is no part of a model" in error_message(capsys, f"{MERGE} --output merged")
        assert contents(desk) == before
        (desk / "merged" / name).unlink()
    (desk / "merged" / "vae").rename(desk / "vae")
    (desk / "merged" / "vae").symlink_to(desk / "vae", target_is_directory=True)
    assert "contains vae" in error_message(capsys, f"{MERGE} --output merged")
    (desk / "merged" / "vae").unlink()
    assert main(f"{MERGE}@2 --output merged".split()) == 0
    assert (desk / "merged" / "vae" / "config.json").is_file()


@pytest.mark.parametrize(
    ("line", "other"),
    [
        (f"{SINGLE} --output", "run/pytorch_lora_weights.safetensors"),
        (f"{SINGLE} --output", "notes"),
        (f"{EXTRACT} --output", "sdxl.safetensors"),
        (f"{EXTRACT} --output", "notes"),
        ("export fox.safetensors --base base --overwrite --output", "sdxl.safetensors"),
        ("import fox.safetensors --base base --overwrite --output", f"tuned/{UNET}"),
        ("resize fox.safetensors --base base --overwrite --output", "notes"),
        ("average fox.safetensors run --base base --overwrite --output", "out.safetensors"),
    ],
)
def test_a_file_of_another_kind_is_not_replaced(
    desk: Path, capsys: pytest.CaptureFixture[str], line: str, other: str
) -> None:
    if other == "notes":
        (desk / (other := "notes.safetensors")).write_text("not even tensors")
    if other == "out.safetensors":  # of which the average would write the embeddings beside it
        shutil.copy(desk / "sdxl.safetensors", desk / "out_emb.safetensors")
    before = contents(desk)
    assert "--overwrite replaces" in error_message(capsys, f"{line} {other}")
    assert contents(desk) == before


@pytest.mark.parametrize(
    "line",
    [
        f"{SINGLE} --output out.safetensors",
        f"{EXTRACT} --output out.safetensors",
        "export fox.safetensors --base base --overwrite --layout both --output out",
        "import fox.safetensors --base base --overwrite --output out.safetensors",
        "resize fox.safetensors --rank 2 --base base --overwrite --output out.safetensors",
        "average fox.safetensors run --rank 4 --base base --overwrite --output out.safetensors",
    ],
)
def test_overwrite_replaces_an_earlier_output_of_the_verb(desk: Path, line: str) -> None:
    for _ in range(2):
        assert main(line.split()) == 0
    assert main([word for word in line.split() if word != "--overwrite"]) == 2


@pytest.mark.parametrize("is_link", [False, True])
def test_an_earlier_model_remains_until_the_new_model_is_complete(
    desk: Path, monkeypatch: pytest.MonkeyPatch, is_link: bool
) -> None:
    shutil.copytree(desk / "base", desk / "new")
    output = desk / "tuned"
    if is_link:
        output.rename(desk / "away")
        output.symlink_to(desk / "away", target_is_directory=True)
    before, real = contents(output), os.replace

    def fails(source: Path, target: Path) -> None:
        if Path(source) == desk / "new":
            raise PermissionError(13, "Permission denied")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(PermissionError):
            replace_folder(desk / "new", output)
    assert contents(output) == before
    replace_folder(desk / "new", output)
    assert not output.is_symlink()
    assert contents(output) == contents(desk / "base")
    assert not is_link or contents(desk / "away") == before
    assert not list(desk.glob("*.earlier"))


def test_files_added_to_the_folder_meanwhile_are_not_removed(desk: Path) -> None:
    shutil.copytree(desk / "base", desk / "new")
    (desk / "tuned" / "notes.txt").write_text("while the sums were formed")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        replace_folder(desk / "new", desk / "tuned")
    assert (desk / "tuned" / "notes.txt").is_file()
