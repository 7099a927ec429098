"""Parsing of flags: every spelling of a flag, and error messages."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.commands.flags import flags_of, read_flags, with_values
from flatlora_diffusion.commands.train_flags import Sources, parse_training
from flatlora_diffusion.config import (
    CompareConfig,
    ConfigError,
    ExportConfig,
    FlatnessConfig,
    GenerateConfig,
    TrainConfig,
)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        (["--rank", "8"], "rank", 8),
        (["--rank=8"], "rank", 8),
        (["--rank", "2", "--rank", "8"], "rank", 8),
        (["--learning-rate", "1e-3"], "learning_rate", 1e-3),
        (["--learning_rate=1"], "learning_rate", 1.0),
        (["--sigma", "None"], "sigma", None),
        (["--optimizer", "AdamW"], "optimizer", "adamw"),
        (["--offload"], "offload", True),
        (["--offload", "False"], "offload", False),
        (["--offload=true"], "offload", True),
        (["--no_prodigy_decouple"], "prodigy_decouple", False),
        (["--no-prodigy-decouple"], "prodigy_decouple", False),
        (["--prodigy_decouple", "False"], "prodigy_decouple", False),
        (["--instance_prompt", "a -- b = c"], "instance_prompt", "a -- b = c"),
        (["--instance_prompt=--rank"], "instance_prompt", "--rank"),
        (["--instance_prompt", "-1 degrees"], "instance_prompt", "-1 degrees"),
        (["--instance_prompt="], "instance_prompt", ""),
        (["--instance_prompt", "two\nlines=1"], "instance_prompt", "two\nlines=1"),
        (["--validation_prompt", "a", "--validation_prompt", "b"], "validation_prompt", "a\nb"),
    ],
)
def test_every_spelling_of_a_flag_is_read(line: list[str], name: str, value: object) -> None:
    read = read_flags(line, flags_of(TrainConfig()))
    assert read == {name: value}
    assert type(read[name]) is type(value)


def test_several_values_are_separated_by_spaces_and_may_be_negative() -> None:
    flags = flags_of(GenerateConfig())
    line = ["--strengths", "-0.5", "-1e-3", ".5", "--lora", "a", "b", "--seeds=3", "--prompts", "an owl", "--merge"]
    read = read_flags([*line, "--clip_skip", "1"], flags)
    assert read == {
        "strengths": (-0.5, -1e-3, 0.5),
        "lora": ("a", "b"),
        "seeds": (3,),
        "prompts": ("an owl",),
        "merge": True,
        "clip_skip": 1,
    }
    config: GenerateConfig = with_values(GenerateConfig(), read)
    assert (config.lora, config.model.clip_skip) == (("a", "b"), 1)


def test_words_without_a_flag_are_the_file_or_the_runs_in_any_position() -> None:
    export, flatness = flags_of(ExportConfig()), flags_of(FlatnessConfig())
    for line in (["x", "--layout", "both", "--overwrite"], ["--layout", "both", "--overwrite", "x"]):
        assert read_flags(line, export, "file") == {"file": "x", "layout": "both", "overwrite": True}
    assert read_flags(["a", "--seed", "1", "b"], flatness, "runs") == {"runs": ("a", "b"), "seed": 1}
    for line, first in ((["x", "y"], "file"), (["y"], None), (["--overwrite", "y"], None)):
        with pytest.raises(ConfigError, match="'y'"):
            read_flags(line, export, first)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("train --rank 5000", "--rank 5000 1 1024"),
        ("train --rank=0", "--rank 0 1 1024"),
        ("train --learning_rate -1", "--learning_rate -1 0 10"),
        ("train --learning_rate nan", "--learning_rate nan finite"),
        ("train --rank a", "--rank a whole number"),
        ("train --sigma much", "--sigma much number"),
        ("train --rank", "--rank value"),
        ("train --rank --offload", "--rank value"),
        ("train --offload=maybe", "--offload maybe true false"),
        ("train --method sgd", "--method sgd lora flat-lora"),
        ("train --max_train_stpes 3", "--max_train_stpes --max_train_steps"),
        ("train --no_rank", "--no_rank"),
        ("train icons", "icons"),
        ("compare --num_seeds 0", "--num_seeds 0 1 1000"),
        ("compare --arms", "arms"),
        ("generate --seeds 1 -1", "--seeds -1 0"),
        ("generate --seeds 1 1", "--seeds 1 twice"),
        ("generate --clip_skip 99", "--clip_skip 99 0 11"),
        ("resize x --rank 0", "--rank 0 1 1024"),
        ("doctor --port 0", "--port 0 1 65535"),
        ("flatness run --radii 11", "--radii 11 0 10"),
        ("caption x --tag_threshold 2", "--tag_threshold 2 0 1"),
        ("app --port 0", "port 0 1 65535"),
        ("app --port a", "--port a"),
        ("app --nonsense", "--nonsense"),
    ],
)
def test_an_error_has_flag_value_and_allowed_values_in_one_sentence(
    capsys: pytest.CaptureFixture[str], line: str, parts: str
) -> None:
    assert main(line.split()) == 2
    printed = capsys.readouterr()
    (sentence,) = (printed.out + printed.err).splitlines()
    assert sentence.startswith("error: ")
    assert set(parts.split()) <= set(re.split(r"[\s=:;,?']+", sentence)), sentence


def test_no_flag_of_a_comparison_is_ambiguous() -> None:
    """Those of the comparison, of its trainings and of their sources are read together."""
    of_each = [set(flags_of(settings)) for settings in (CompareConfig(), TrainConfig(), Sources())]
    assert sum(map(len, of_each)) == len(set.union(*of_each))


def test_all_settings_are_flags_with_their_defaults() -> None:
    flags = flags_of(TrainConfig())
    assert {name: flag.default for name, flag in flags.items()} == TrainConfig().to_dict()
    assert set(flags_of(FlatnessConfig())) == {item.name for item in fields(FlatnessConfig)}


def test_flags_override_a_file_and_can_reset_its_switches_and_values(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"offload": true, "sigma": 0.2, "rank": 8}')
    config = parse_training(["--config", str(file), "--no_offload", "--sigma", "None"])[0]
    assert (config.model.offload, config.perturb.sigma, config.adapter.rank) == (False, None, 8)
