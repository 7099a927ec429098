"""`--help` is short and about the given verb; `--help-all` is complete."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from flatlora_diffusion.commands.command_line import main, train_main
from flatlora_diffusion.commands.flags import flags_of
from flatlora_diffusion.config import SAMPLES, CompareConfig, GenerateConfig, TrainConfig

ROOT = Path(__file__).parents[2]


def helped(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(main(list(arguments)))
    assert stop.value.code == 0
    return capsys.readouterr().out


def flags_in(text: str) -> set[str]:
    """What is listed, not what a help text mentions."""
    return set(re.findall(r"^  --(\w+)", text, re.MULTILINE))


def test_the_help_of_train_shows_common_flags_and_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    text = helped(capsys, "train", "--help")
    shown = flags_in(text)
    assert 15 <= len(shown) <= 25
    assert {"instance_data_dir", "output_dir", "pretrained_model_name_or_path", "method", "rank", "seed"} <= shown
    words = set(re.findall(r"\w+", text))
    assert {file.stem for file in (SAMPLES / "presets").glob("*.json")} <= words
    assert "--help-all" in text


@pytest.mark.parametrize("flag", ["--help-all", "--help_all"])
def test_help_all_shows_every_flag_also_for_the_script(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    of_train = {*TrainConfig().to_dict(), "preset", "config", "workers", "cluster"}
    text = helped(capsys, "train", flag)
    assert flags_in(text) == of_train
    assert "more flags" not in text
    with pytest.raises(SystemExit):
        train_main([flag])
    assert flags_in(capsys.readouterr().out) == of_train
    assert flags_in(helped(capsys, "compare", flag)) == of_train | set(flags_of(CompareConfig()))


def test_the_help_of_each_flag_has_bounds_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(helped(capsys, "generate", "--help").split())
    assert flags_in(helped(capsys, "generate", "--help")) == set(flags_of(GenerateConfig()))
    assert "denoising steps; default: 25, FLUX.2 klein 50, distilled 4 (1 to 1000)" in text
    assert "(0 or more; default: 0)" in text
    assert "{no,fp16,bf16}" in text
    assert "[SEED ...]" in text


def test_no_help_imports_torch_and_a_closed_pipe_is_no_error() -> None:
    program = (
        "import sys\n"
        "from flatlora_diffusion.commands.command_line import _verbs, main\n"
        "for verb in _verbs():\n"
        "    try:\n"
        "        main([verb, '--help'])\n"
        "    except SystemExit as end:\n"
        "        assert end.code in (0, None), (verb, end.code)\n"
        "print({'torch', 'diffusers', 'transformers', 'gradio'} & set(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "set()\n")
    command = [sys.executable, "-u", "-m", "flatlora_diffusion", "train", "--help-all"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
