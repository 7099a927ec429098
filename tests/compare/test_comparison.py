"""What a comparison says of given figures: pairs, verdicts, nulls; and what it is measured with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from flatlora_diffusion.compare.arms import parse_arm
from flatlora_diffusion.compare.evaluator import FORGETTING, HELDOUT, TRAIN, names_of
from flatlora_diffusion.compare.findings import metrics_table, paired_rows, verdict
from flatlora_diffusion.compare.inputs import SAMPLE_ICONS, read_inputs
from flatlora_diffusion.compare.trajectory import TrajectoryPoint
from flatlora_diffusion.config import CompareConfig, ConfigError, TrainConfig
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.evaluation.crossed_statistics import crossed_difference

ARMS = [parse_arm("lora"), parse_arm("flat-lora"), parse_arm("flat-lora:perturb_noise=iid")]
NAMES = {arm.key: arm.name for arm in ARMS}


def values(*differences: float) -> dict[str, dict[int, dict[str, float]]]:
    seeds = range(len(differences))
    lora = {seed: {"heldout_loss": 0.1 + 0.01 * seed, "drift": 0.5} for seed in seeds}
    flat = {seed: {"heldout_loss": 0.1 + 0.01 * seed + differences[seed]} for seed in seeds}
    return {"lora": lora, "flat-lora": flat, ARMS[2].key: {0: {"heldout_loss": 0.3}}}


def test_every_arm_is_paired_with_the_first_by_seed_and_metric() -> None:
    rows = paired_rows(ARMS, ["heldout_loss", "drift"], values(-0.001, -0.002, -0.003), {}, {})
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
    rows = paired_rows(ARMS[:2], [], values(0.0), {}, {"lora": {0: lora}, "flat-lora": {0: flat}})
    found = {row["matched"]: row["mean"] for row in rows}
    assert found == pytest.approx({"clean loss": -0.1, "seconds": 0.15})


def test_an_arm_with_steps_of_its_own_is_compared_at_the_ends() -> None:
    arms = [ARMS[0], parse_arm("flat-lora:max_train_steps=1")]
    found = {"lora": values(0.1)["lora"], arms[1].key: values(0.1)["flat-lora"]}
    (row,) = paired_rows(arms, ["heldout_loss"], found, {}, {})
    assert row["matched"] == "ends"
    assert "max_train_steps 1 \N{MINUS SIGN} LoRA in held-out loss" in verdict(
        [row], {arm.key: arm.name for arm in arms}
    )


def of_images(*differences: Sequence[float]) -> dict[str, dict[int, dict[str, list[float]]]]:
    """LoRA at 0.5 on every image, and what Flat-LoRA differs by, a list for each seed."""
    flat = {seed: {"heldout_loss": [0.5 + one for one in own]} for seed, own in enumerate(differences)}
    lora = {seed: {"heldout_loss": [0.5] * len(own)} for seed, own in enumerate(differences)}
    return {"lora": lora, "flat-lora": flat}


SPREAD = np.linspace(-0.001, 0.001, 20)


@pytest.mark.parametrize(
    ("differences", "said", "scope"),
    [
        ([[-0.001, 0.0, -0.002]], "One seed and 3 images cannot tell", "--num_seeds 5 or 5 held-out images or more"),
        ([SPREAD], "No difference found", "this training, over 20 images"),
        ([SPREAD - 0.01], "Flat-LoRA predicts unseen images better in this training", "--num_seeds 5"),
        ([SPREAD + 0.01, SPREAD + 0.011, SPREAD + 0.012], "LoRA predicts", "other images like these, from 3 seeds"),
        ([SPREAD, SPREAD - 0.001, SPREAD + 0.001], "No difference found", "from 3 seeds and 20 images"),
    ],
)
def test_the_verdict_says_what_the_interval_allows(differences: list[Any], said: str, scope: str) -> None:
    means = [float(np.mean(own)) for own in differences]
    (row,) = paired_rows(ARMS[:2], ["heldout_loss"], values(*means), of_images(*differences), {})
    found = verdict([row], NAMES)
    assert found.startswith(said)
    assert scope in found
    expected = crossed_difference([list(own) for own in differences])
    assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high))
    assert row["images"] == len(differences[0])
    if row["low"] is not None:
        assert number_after("± ", found) == pytest.approx((row["high"] - row["low"]) / 2, rel=0.1)
    if said.startswith("No difference"):
        assert number_after("a difference of ", found) == pytest.approx(row["detectable"], rel=0.1)


def number_after(start: str, text: str) -> float:
    return float(text.split(start)[1].split()[0])


def test_the_shares_of_the_uncertainty_are_shown() -> None:
    seeds_alone = [[shift] * 20 for shift in (0.001, 0.002, 0.003)]
    rows = paired_rows(ARMS[:2], ["heldout_loss"], values(0.001, 0.002, 0.003), of_images(*seeds_alone), {})
    assert "100% comes from the seeds and 0% from the images" in verdict(rows, NAMES)


def test_a_metric_that_is_no_loss_has_its_interval_over_seeds() -> None:
    rows = paired_rows(ARMS[:2], ["heldout_loss"], values(-0.001, -0.0011, -0.0009), {}, {})
    low, high = stats.t.interval(0.95, 2, loc=-0.001, scale=stats.sem([-0.001, -0.0011, -0.0009]))
    assert (rows[0]["low"], rows[0]["high"]) == pytest.approx((low, high))
    assert verdict(rows, NAMES).startswith("Flat-LoRA predicts unseen images better")


def test_a_single_arm_has_no_verdict() -> None:
    assert "Only one arm" in verdict(paired_rows(ARMS[:1], ["heldout_loss"], values(0.0), {}, {}), NAMES)


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
    material = read_inputs(icons_config(), CompareConfig(num_prompts=3, pictures_per_prompt=2, guidance_scale=3))
    assert (len(material.sets[TRAIN].samples), len(material.sets[HELDOUT].samples)) == (23, 64)
    assert set(material.sets[HELDOUT].groups) >= {"animals and plants", "food and drink"}
    flat = material.sets[FORGETTING]
    assert sorted(flat.groups) == sorted(["noto", "twemoji", "fluent-flat"] * 11)
    assert all("flat icon" in sample.caption for sample in flat.samples)
    assert material.prompts.style[0] == "a TOK icon of a peach, in the style of TOK"
    assert (len(material.prompts.style), len(material.prompts.unrelated)) == (3, 3)
    assert material.prompts.guidance == material.prompts.trajectory_subset.guidance == 3
    (tmp_path / "own.txt").write_text("a cow\n\na fox\na cow\n", encoding="utf-8")
    own = CompareConfig(num_prompts=3, unrelated_prompts_file=str(tmp_path / "own.txt"))
    assert read_inputs(icons_config(), own).prompts.unrelated == ("a cow", "a fox")
    assert len(material.prompts.keys(material.prompts.style)) == 6
    names = names_of(material.heldout, material.sets[HELDOUT].samples)
    assert names["a TOK icon of a dog, in the style of TOK"] == "dog"


@pytest.mark.parametrize("column", ["text", "prompt", "caption"])
def test_names_are_found_wherever_the_captions_stand(icons: Path, tmp_path: Path, column: str) -> None:
    Image.open(icons / "icon-0.png").save(tmp_path / "a.png")
    row = {"file_name": "a.png", column: "an icon of  a dog", "name": "dog"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert names_of(tmp_path, load_samples(tmp_path).samples) == {"an icon of a dog": "dog"}


def test_held_out_images_that_prove_nothing_are_refused(icons: Path, tmp_path: Path) -> None:
    mine = icons_config(instance_data_dir=str(icons), instance_prompt="an icon")
    with pytest.raises(ConfigError, match="heldout_dir is missing"):
        read_inputs(mine, CompareConfig())
    with pytest.raises(ConfigError, match=r"heldout_dir has images that are trained on: icon-0\.png"):
        read_inputs(mine, CompareConfig(heldout_dir=str(icons)))
    with pytest.raises(ConfigError, match="train_text_encoder_ti"):
        read_inputs(icons_config(train_text_encoder_ti=True), CompareConfig())
    (tmp_path / "none.txt").write_text("\n \n", encoding="utf-8")
    for name in ("none.txt", "missing.txt"):
        with pytest.raises(ConfigError, match=f"{name}.*one prompt per line"):
            read_inputs(icons_config(), CompareConfig(prompts_file=str(tmp_path / name)))


@pytest.mark.parametrize("setting", ["instance_data_dir", "heldout_dir", "forgetting_dir"])
@pytest.mark.parametrize("output", ["images", "images/out", "."])
def test_an_experiment_in_its_image_folder_is_refused(icons: Path, tmp_path: Path, setting: str, output: str) -> None:
    """The grid and the charts would be images of the next comparison."""
    folders = dict.fromkeys(("instance_data_dir", "heldout_dir", "forgetting_dir"), str(icons))
    folders[setting] = str(shutil.copytree(icons, tmp_path / "images"))
    config = icons_config(instance_data_dir=folders["instance_data_dir"], output_dir=str(tmp_path / output))
    own = CompareConfig(heldout_dir=folders["heldout_dir"], forgetting_dir=folders["forgetting_dir"])
    with pytest.raises(ConfigError, match=rf"output_dir=.*{setting}="):
        read_inputs(config, own)


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
    material = read_inputs(mine, CompareConfig(heldout_dir=str(heldout), num_prompts=2))
    assert material.prompts.style == ("an icon of icon-0", "an icon of icon-1")
