"""What a comparison says of given figures: pairs, verdicts, nulls; and what it is measured with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flatlora_diffusion.compare.arms import parse_arm
from flatlora_diffusion.compare.evaluator import FORGETTING, HELDOUT, TRAIN, names_of
from flatlora_diffusion.compare.findings import metrics_table, paired_rows, verdict
from flatlora_diffusion.compare.material import SAMPLE_ICONS, read_material
from flatlora_diffusion.compare.trajectory import TrajectoryPoint
from flatlora_diffusion.config import CompareConfig, ConfigError, TrainConfig
from flatlora_diffusion.data.dataset import load_samples

ARMS = [parse_arm("lora"), parse_arm("flat-lora"), parse_arm("flat-lora:perturb_noise=iid")]
NAMES = {arm.key: arm.name for arm in ARMS}


def values(*differences: float) -> dict[str, dict[int, dict[str, float]]]:
    seeds = range(len(differences))
    lora = {seed: {"heldout_loss": 0.1 + 0.01 * seed, "drift": 0.5} for seed in seeds}
    flat = {seed: {"heldout_loss": 0.1 + 0.01 * seed + differences[seed]} for seed in seeds}
    return {"lora": lora, "flat-lora": flat, ARMS[2].key: {0: {"heldout_loss": 0.3}}}


def test_every_arm_is_paired_with_the_first_by_seed_and_metric() -> None:
    rows = paired_rows(ARMS, ["heldout_loss", "drift"], values(-0.001, -0.002, -0.003), {})
    assert [(row["arm"], row["against"], row["metric"], row["n"]) for row in rows] == [
        ("flat-lora", "lora", "heldout_loss", 3),
        (ARMS[2].key, "lora", "heldout_loss", 1),
    ]
    assert rows[0]["differences"] == pytest.approx([-0.001, -0.002, -0.003])
    assert rows[0]["mean"] == pytest.approx(-0.002)
    assert rows[1]["low"] is None


def test_trajectories_are_matched_at_equal_loss_and_seconds() -> None:
    lora = [TrajectoryPoint(0, 0, 1.0, 1.0), TrajectoryPoint(4, 10, 0.5, 0.6)]
    flat = [TrajectoryPoint(0, 0, 1.0, 1.0), TrajectoryPoint(4, 20, 0.5, 0.5)]
    rows = paired_rows(ARMS[:2], [], values(0.0), {"lora": {0: lora}, "flat-lora": {0: flat}})
    found = {row["matched"]: row["mean"] for row in rows}
    assert found == pytest.approx({"clean loss": -0.1, "seconds": 0.15})


def test_an_arm_with_steps_of_its_own_is_compared_at_the_ends() -> None:
    arms = [ARMS[0], parse_arm("flat-lora:max_train_steps=1")]
    found = {"lora": values(0.1)["lora"], arms[1].key: values(0.1)["flat-lora"]}
    (row,) = paired_rows(arms, ["heldout_loss"], found, {})
    assert row["matched"] == "ends"
    assert "max_train_steps 1's held-out loss differs" in verdict([row], {arm.key: arm.name for arm in arms})


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ((-0.001,), "One seed cannot tell: Flat-LoRA's held-out loss differs from LoRA's by \N{MINUS SIGN}0.0010"),
        (
            (-0.001, -0.001),
            "2 seeds cannot tell: Flat-LoRA's held-out loss differs from LoRA's by \N{MINUS SIGN}0.0010 with each",
        ),
        (
            (-0.001, 0.002, -0.0015),
            "No difference found: Flat-LoRA's held-out loss differs from LoRA's by \N{MINUS SIGN}0.0002",
        ),
        ((-0.001, -0.0011, -0.0009), "Flat-LoRA predicts images it never saw better"),
        ((0.001, 0.0011, 0.0009), "LoRA predicts images it never saw better"),
    ],
)
def test_the_verdict_says_what_the_interval_allows(differences: tuple[float, ...], said: str) -> None:
    rows = paired_rows(ARMS[:2], ["heldout_loss"], values(*differences), {})
    found = verdict(rows, NAMES)
    assert found.startswith(said)
    if rows[0]["low"] is not None:
        assert "95 % interval" in found
        assert "3 seeds" in found
    if found.startswith("No difference"):
        assert f"a difference of {rows[0]['detectable']:.4f} would have been found" in found


def test_a_single_arm_has_no_verdict() -> None:
    assert "One arm alone" in verdict(paired_rows(ARMS[:1], ["heldout_loss"], values(0.0), {}), NAMES)


def test_the_table_has_means_and_leaves_out_what_is_missing() -> None:
    metrics = [
        {"key": "heldout_loss", "name": "held-out loss", "digits": 3},
        {"key": "drift", "name": "drift", "digits": 1},
    ]
    lines = metrics_table(NAMES, metrics, {"heldout_loss": 0.2}, values(0.01, 0.03)).splitlines()
    assert lines[0] == "| | Base | LoRA | Flat-LoRA | Flat-LoRA, perturb_noise iid |"
    assert lines[2] == "| held-out loss | 0.200 | 0.105 | 0.125 | 0.300 |"
    assert lines[3] == "| drift |  | 0.5 |  |  |"


def icons_config(**more: Any) -> TrainConfig:
    return TrainConfig.from_dict({"instance_data_dir": str(SAMPLE_ICONS), "seed": 0, **more})


def test_the_sample_icons_bring_their_own_heldout_images_and_prompts(tmp_path: Path) -> None:
    material = read_material(icons_config(), CompareConfig(num_prompts=3, pictures_per_prompt=2, guidance_scale=3))
    assert (len(material.sets[TRAIN].samples), len(material.sets[HELDOUT].samples)) == (23, 64)
    assert set(material.sets[HELDOUT].groups) >= {"animals and plants", "food and drink"}
    flat = material.sets[FORGETTING]
    assert sorted(flat.groups) == sorted(["noto", "twemoji", "fluent-flat"] * 11)
    assert all("flat icon" in sample.caption for sample in flat.samples)
    assert material.prompts.style[0] == "a TOK icon of a peach, in the style of TOK"
    assert (len(material.prompts.style), len(material.prompts.unrelated)) == (3, 3)
    assert material.prompts.guidance == material.prompts.few.guidance == 3
    (tmp_path / "own.txt").write_text("a cow\n\na fox\na cow\n", encoding="utf-8")
    own = CompareConfig(num_prompts=3, unrelated_prompts_file=str(tmp_path / "own.txt"))
    assert read_material(icons_config(), own).prompts.unrelated == ("a cow", "a fox")
    assert len(material.prompts.keys(material.prompts.style)) == 6
    names = names_of(material.heldout, material.sets[HELDOUT].samples)
    assert names["a TOK icon of a dog, in the style of TOK"] == "dog"


@pytest.mark.parametrize("column", ["text", "prompt", "caption"])
def test_names_are_found_wherever_the_captions_stand(icons: Path, tmp_path: Path, column: str) -> None:
    Image.open(icons / "icon-0.png").save(tmp_path / "a.png")
    row = {"file_name": "a.png", column: "an icon of  a dog", "name": "dog"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert names_of(tmp_path, load_samples(tmp_path).samples) == {"an icon of a dog": "dog"}


def test_material_that_proves_nothing_is_refused(icons: Path, tmp_path: Path) -> None:
    mine = icons_config(instance_data_dir=str(icons), instance_prompt="an icon")
    with pytest.raises(ConfigError, match="heldout_dir is missing: give a folder of captioned images"):
        read_material(mine, CompareConfig())
    with pytest.raises(ConfigError, match=r"heldout_dir has images that are trained on: icon-0\.png"):
        read_material(mine, CompareConfig(heldout_dir=str(icons)))
    with pytest.raises(ConfigError, match="train_text_encoder_ti cannot be used in a comparison"):
        read_material(icons_config(train_text_encoder_ti=True), CompareConfig())
    (tmp_path / "none.txt").write_text("\n \n", encoding="utf-8")
    for name in ("none.txt", "missing.txt"):
        with pytest.raises(ConfigError, match=f"{name}.*one prompt per line"):
            read_material(icons_config(), CompareConfig(prompts_file=str(tmp_path / name)))


@pytest.mark.parametrize("setting", ["instance_data_dir", "heldout_dir", "forgetting_dir"])
@pytest.mark.parametrize("output", ["images", "images/out", "."])
def test_an_experiment_is_not_written_amid_the_images_that_it_reads(
    icons: Path, tmp_path: Path, setting: str, output: str
) -> None:
    """The grid and the charts would be images of the next comparison."""
    folders = dict.fromkeys(("instance_data_dir", "heldout_dir", "forgetting_dir"), str(icons))
    folders[setting] = str(shutil.copytree(icons, tmp_path / "images"))
    config = icons_config(instance_data_dir=folders["instance_data_dir"], output_dir=str(tmp_path / output))
    own = CompareConfig(heldout_dir=folders["heldout_dir"], forgetting_dir=folders["forgetting_dir"])
    with pytest.raises(ConfigError, match=rf"output_dir=.*{setting}="):
        read_material(config, own)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ()}, "arms is empty"),
        ({"arms": ("lora", "lora")}, "arms has 'lora' twice"),
        ({"encoders": ()}, "encoders is empty"),
    ],
)
def test_arms_and_encoders_are_given_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CompareConfig(**changes)


def test_without_prompts_the_captions_are_drawn(icons: Path, tmp_path: Path) -> None:
    heldout = tmp_path / "heldout"
    heldout.mkdir()
    for index, file in enumerate(sorted(icons.glob("*.png"))):
        Image.open(file).rotate(90 * (index + 1)).save(heldout / file.name)
    rows = [{"file_name": file.name, "text": f"an icon of {file.stem}"} for file in sorted(heldout.iterdir())]
    (heldout / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    mine = icons_config(instance_data_dir=str(icons), instance_prompt="an icon")
    material = read_material(mine, CompareConfig(heldout_dir=str(heldout), num_prompts=2))
    assert material.prompts.style == ("an icon of icon-0", "an icon of icon-1")
