"""The sentences of the README on the study of where flatness pays say what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from app.train.tab import METHOD_HINT
from benchmarks import paper_text_to_image_page
from benchmarks.paper_results import read
from benchmarks.paper_results_studies import STUDIES, TESTS, points, pooled
from benchmarks.paper_variants_answer import verdict
from benchmarks.paper_variants_figures import METRICS, compared, corrected, headline_rows
from benchmarks.paper_variants_page import read_results, read_shapes
from benchmarks.paper_variants_plan import NOISED, PAPER, STRONG, TWICE
from benchmarks.paper_variants_study import settings_of_preset
from benchmarks.paper_words import SCALE, interval, is_told, signed
from flatlora_diffusion.compare.arms import parse_arm
from flatlora_diffusion.compare.paired import CONFIDENCE, paired_difference
from flatlora_diffusion.config import preset_file

ROOT = Path(__file__).parents[1]


def readme() -> str:
    return " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_the_readme_and_the_app_say_that_lora_is_better_where_both_are_tuned() -> None:
    said = readme()
    result = read_results()["tuned"]
    (pair,) = result["pairs"]
    assert f"{interval(pair['report'], 1)} at the end, {interval(pair['chosen'], 1)} at the checkpoint" in said
    assert "the best of twenty trials each, ten fresh seeds" in said
    assert {len(trials) for trials in result["trials"].values()} == {20}
    assert "LoRA's was better in all ten" in said
    assert len(pair["seeds"]) == 10
    assert min(pair["report"]["differences"] + pair["chosen"]["differences"]) > 0
    assert [corrected(pair[metric])["low"] > 0 for metric in ("report", "chosen")] == [True, True]
    losses = [row["report"] for row in result["rows"] if row["arm"] == pair["against"]]
    assert f"to {SCALE * (result['base']['report'] - sum(losses) / len(losses)):.0f} over the base" in said
    assert "it was no better than LoRA where both were tuned" in METHOD_HINT


def test_the_readme_says_which_rival_methods_ended_better_than_lora() -> None:
    said = readme()
    result = read_results()["methods"]
    pairs = {parse_arm(pair["arm"]).method: pair for pair in result["pairs"] if pair["against"] == "lora"}
    assert {method for method, pair in pairs.items() if pair["report"]["high"] < 0} == {
        *("sam", "lora-sam", "bi-lora", "nbar", "obar")
    }
    assert not any(is_told(pairs[method]["report"]) for method in ("flat-lora", "mixed-noise", "factor-noise"))
    sam = pairs["sam"]
    assert sam["arm"] == "sam:rho=0.125"
    assert f"{interval(sam['report'], 1)} at the end and {interval(sam['chosen'], 1)} at the chosen" in said
    assert f"for {result['cost'][sam['arm']]['ratio'][1]:.1f} times LoRA's time" in said
    assert f"flat icons {interval(sam['flat'], 1)}" in said
    small = [signed(pairs[method]["report"]["mean"], 1) for method in ("lora-sam", "bi-lora", "nbar")]
    assert "LoRA-SAM ({}), Bi-LoRA ({}) and BAR ({}) ended".format(*small) in said


def test_the_readme_says_what_sam_gains_with_fresh_seeds() -> None:
    said = readme()
    result = read_results()["sam"]
    pairs = {(pair["arm"], pair["against"]): pair for pair in result["pairs"]}
    sam, twice = (pairs["sam:rho=0.25", against] for against in ("lora", TWICE))
    assert len(sam["seeds"]) == len(twice["seeds"]) == 5
    for metric in ("report", "chosen"):
        assert corrected(sam[metric])["high"] < 0
    assert f"{interval(sam['report'], 1)} at the end, {interval(sam['chosen'], 1)} at the chosen checkpoint" in said
    losses = [row["report"] for row in result["rows"] if row["arm"] == "lora"]
    share = -sam["report"]["mean"] / (result["base"]["report"] - sum(losses) / len(losses))
    assert f"which is {100 * share:.0f} % of LoRA's gain, {interval(twice['report'], 1)} from LoRA" in said
    tuned = read_results()["tuned"]
    best = tuned["headlines"]["both tuned"][1]
    rows = [row for row in result["rows"] if row["arm"] == sam["arm"]] + tuned["rows"]
    (of_tuned,) = compared(rows, {sam["arm"]: best}, result["base"])
    assert len(of_tuned["seeds"]) == of_tuned["alike"] == 5
    assert f"and {interval(of_tuned['report'], 1)} from the LoRA of twenty trials" in said
    assert twice["report"]["high"] < 0
    forgotten = [row["flat"] - result["base"]["flat"] for row in result["rows"] if row["arm"] == "lora"]
    lost = SCALE * sum(forgotten) / len(forgotten)
    assert f"forgets more, {interval(sam['flat'], 1)} on flat icons, where LoRA forgets {lost:.0f};" in said
    assert f"(loss rise {interval(sam['rise'], 1)})" in said


def test_the_readme_says_how_the_rival_adapters_end_plain_and_flat() -> None:
    said = readme()
    said = said.partition("*Rival adapters*")[2].partition("*Pretrained encoders*")[0]
    pairs = read_results()["adapters"]["pairs"]
    lora = pairs[0]["against"]
    plain = [pair for pair in pairs if pair["against"] == lora and parse_arm(pair["arm"]).method == "lora"]
    flat = [pair for pair in pairs if pair["against"] != lora]
    assert len(plain) == len(flat) == 8
    for pair in plain:
        assert f"{interval(pair['report'], 1)}" in said
    says = [verdict(pair["report"]) for pair in flat]
    counts = (says.count(one) for one in ("better", "worse", "no difference found"))
    assert "better {}, worse {}, no difference found {} times".format(*counts) in said
    means = [pair["report"]["mean"] for pair in flat]
    assert f"{signed(min(means), 1)} to {signed(max(means), 1)}." in said


def test_the_readme_says_which_rho_a_rise_finds_and_where_that_is_too_much() -> None:
    said = readme()
    found = json.loads((ROOT / "benchmarks" / "rho_rise.json").read_text(encoding="utf-8"))
    assert f"`--rho_rise {found['rise']:g}` is the default" in said
    assert all(0.2 < rho < 0.3 for rho in found["rhos"]["attention, batch 2"]), "about 0.25, the best of the trials"
    assert [f"{rho:.1f}" for rho in found["rhos"]["emoji_group"]] == ["0.2"] * 5
    assert "on names of emojis, a task of texts, 0.25 finds rho 0.2, which ruins the training" in said
    swept = json.loads((ROOT / "benchmarks" / "paper_language.json").read_text(encoding="utf-8"))
    assert swept["tables"]["emoji_group"]["sam rho 0.2"]["difference"]["test"]["high"] < -0.1


def test_the_readme_says_that_sam_is_ahead_at_equal_forgetting() -> None:
    said = readme()
    half, whole = (one for one in read_results()["forgetting"]["equal"] if one["arm"] == "sam:rho=0.25")
    assert (half["against"], whole["against"]) == ("lora", "lora")
    assert (half["share"], whole["share"]) == (0.5, 1.0)
    assert f"SAM's at strengths of about {whole['strength']:.2f}: {interval(whole['report'], 1)}; where" in said
    assert f"forget half as much {interval(half['report'], 1)}." in said
    assert whole["report"]["high"] < 0


def test_the_readme_says_where_the_tuned_two_differ() -> None:
    said = readme()
    pairs = {pair["label"]: pair for pair in read_results()["sizes"]["pairs"]}
    assert {label for label, pair in pairs.items() if is_told(pair["report"])} == {
        *("5 images", "600 steps", "150 steps")
    }
    few, long, short = (interval(pairs[label]["report"], 1) for label in ("5 images", "600 steps", "150 steps"))
    assert f"five images, {few} at the end; 600 steps instead of 300, {long}; stopped in time no difference" in said
    assert f"with 150 steps it was worse, {short}" in said
    assert not any(is_told(pairs[label]["chosen"]) for label in ("5 images", "600 steps"))
    assert {len(pair["seeds"]) for pair in pairs.values()} == {3}


def test_the_readme_says_what_the_study_of_icons_found() -> None:
    text = readme()
    said = text.partition("**Does Flat-LoRA generalize better here?**")[2].partition("**What it costs**")[0]
    result = json.loads(paper_text_to_image_page.RESULT.read_text(encoding="utf-8"))
    pair, tuned = result["pairs"][0], result["tuned"]["report"]
    losses = [[run["report"]["all"], run["chosen"]["report"]] for run in result["runs"] if run["arm"] == "lora"]
    end, chosen = (SCALE * sum(column) / len(losses) for column in zip(*losses, strict=True))
    gained = SCALE * result["base"]["report"]["all"] - end
    paper = json.loads(preset_file("paper").read_text(encoding="utf-8"))
    settings = {key: result["settings"][key] for key in ("max_train_steps", "train_batch_size", "learning_rate")}
    assert settings == {"max_train_steps": 300, "train_batch_size": 2, "learning_rate": 1e-3}
    assert not any(settings[key] == paper[key] for key in settings), "so these are not to be called the paper's"
    for words in (
        "*Sigma 0.1*, with the cosine ramp and full draws, 300 steps of batch 2 at a learning rate of 1e-3",
        f"{interval(pair['report'])} at the end",
        f"has gained {gained:.0f} over the base",
        f"{interval(pair['chosen'])} at the checkpoint",
        f"stopping in time gains {end - chosen:.1f}",
        f"better by {SCALE * tuned['mean']:.2f}",
    ):
        assert words in said
    assert tuned["low"] > 0
    cells = [pair for pair in read_results()["map"]["pairs"] if pair["arm"] != PAPER]
    assert "the three that are best on other icons" in said
    assert [len(pair["seeds"]) for pair in cells] == [5] * 3
    assert not any(is_told(pair["report"]) for pair in cells)
    pairs = read_results()["controls"]["pairs"]
    simple = [pair for pair in pairs if pair["against"] == "lora" and pair["arm"].startswith("lora")]
    (better,) = (one for one in simple if is_told(one["report"]) and one["report"]["high"] < 0)
    assert (len(simple), better["arm"]) == (7, "lora:ip_noise_gamma=0.1")
    zeros = [0.0] * len(better["seeds"])
    for_seven = paired_difference(better["report"]["differences"], zeros, 1 - (1 - CONFIDENCE) / len(simple))
    assert for_seven.high is not None
    assert for_seven.high < 0
    assert (
        f"one ended better, noise on the noised images (`--ip_noise_gamma 0.1`, {interval(better['report'], 1)}"
        in said
    )
    again = {(pair["arm"], pair["against"]): pair for pair in read_results()["again"]["pairs"]}
    fresh = again[STRONG, "lora"]
    assert len(fresh["seeds"]) == 10
    for metric in ("stronger", "nf4"):
        assert not is_told(fresh[metric])
    assert f"no difference in held-out loss ({interval(fresh['stronger'], 1)} and {interval(fresh['nf4'], 1)})" in said
    assert f"with ten fresh seeds {interval(again[NOISED, 'lora']['report'], 1)})" in said
    style = {pair["arm"]: pair["report"] for pair in read_results()["domain"]["pairs"]}
    assert f"sigma 0.1 ended {interval(style[PAPER], 1)} from LoRA and sigma 0.4 {interval(style[STRONG], 1)}." in said
    at_equal_loss = [*cells, *read_results()["domain"]["pairs"]]
    assert any(is_told(one["equal_loss"]) and one["equal_loss"]["high"] < 0 for one in at_equal_loss)
    noised = [*better["report"]["differences"], *again[NOISED, "lora"]["report"]["differences"]]
    assert len(noised) == 15
    assert max(noised) < 0
    assert "`--ip_noise_gamma 0.1` gained a little with LoRA in all fifteen seeds" in text
    language, vision = (read()[name]["tables"] for name in STUDIES)
    for metric in TESTS:
        assert points(pooled(language, "flat", metric)) in said
        assert points(pooled(vision, "flat", metric)) in said
    assert f"a sigma of 0.4 ends {points(pooled(language, 'sigma 0.4 cosine', 'test'))} from LoRA" in said


def test_the_readme_says_which_sigmas_are_better_than_lora_and_where() -> None:
    said = readme()
    result = json.loads(paper_text_to_image_page.RESULT.read_text(encoding="utf-8"))
    pairs = [(parse_arm(one["arm"]), one) for one in result["pairs"] if one["against"] == "lora"]
    by_sigma = {arm.changes.get("sigma", 0.1): one for arm, one in pairs if not {*arm.changes} - {"sigma"}}
    assert sorted(by_sigma) == [0.05, 0.1, 0.15, 0.2]
    assert not any(is_told(one["report"]) for one in by_sigma.values())
    assert "From sigma 0.05 to 0.2 it ended neither better nor worse than LoRA on 3D icons;" in said
    better = {sigma for sigma, one in by_sigma.items() if is_told(one["chosen"]) and one["chosen"]["high"] < 0}
    assert better == {0.05, 0.1}
    assert not any(is_told(one["chosen"]) for sigma, one in by_sigma.items() if sigma not in better)
    assert "at the best checkpoint it was better by a trace with 0.05 and 0.1, and no difference was found" in said
    assert "no difference was found with 0.15 and 0.2. In another style 0.1 was better by a trace." in said
    style = {pair["arm"]: pair["report"] for pair in read_results()["domain"]["pairs"]}
    assert style[PAPER]["high"] < 0


def test_where_a_corrected_interval_stands_it_is_called_corrected() -> None:
    """The same differences stand elsewhere with intervals of 95 % each."""
    rows, results = headline_rows(read_results()), read_results()
    own = {
        interval(pair[metric], 1)
        for part in results.values()
        for pair in part.get("pairs", ())
        for metric in METRICS
        if metric in pair
    }
    told = {interval(row, 1) for row in rows} - own
    assert len(told) >= 10
    found = 0
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for section in re.split(r"\n(?=#)", page.read_text(encoding="utf-8")):
            if any(words in section for words in told):
                found += 1
                assert "corrected for" in section or "hold together" in section, (page.name, section[:80])
    assert found >= 3


def test_the_readme_says_that_no_other_shape_of_the_noise_ends_better_than_lora() -> None:
    said, found = readme(), read_shapes()
    assert found is not None
    attention, demo = (
        {pair.removesuffix(" - LoRA"): metrics["heldout"] for pair, metrics in one["differences"].items()}
        for one in found["layers"].values()
    )
    assert f"{interval(attention['more at noisy timesteps'], 1)} where sigma grows with the timestep" in said
    assert f"{interval(attention['more at clean timesteps'], 1)} where it falls" in said
    assert f"{interval(attention['opposite pairs'], 1)} with eps and its opposite in pairs" in said
    assert f"0.4 ends {interval(demo['one sigma'], 1)} there" in said
    assert f"and {interval(demo['more at noisy timesteps'], 1)} where it grows" in said
    shapes = ("more at noisy timesteps", "more at clean timesteps", "opposite pairs")
    assert not any(of_layers[shape]["high"] < 0 for of_layers in (attention, demo) for shape in shapes)


def test_the_readme_says_what_sam_does_with_the_settings_of_the_preset() -> None:
    said, result = readme(), read_results()["preset"]
    assert result["of_preset"] | {"members": 2} == settings_of_preset("quality")  # they were measured one by one
    assert (result["of_preset"]["max_train_steps"], result["of_preset"]["train_batch_size"]) == (1500, 4)
    sam, cautious = result["pairs"]
    assert [len(pair["seeds"]) for pair in (sam, cautious)] == [3, 3]
    for pair in (sam, cautious):
        assert pair["against"] == "lora"
        assert pair["report"]["high"] < 0
        assert f"flat icons {interval(pair['flat'], 1)}" in said
    assert f"SAM {interval(sam['report'], 1)} at the end and {interval(sam['chosen'], 1)} at the chosen" in said
    assert f"0.1` {interval(cautious['report'], 1)} and {interval(cautious['chosen'], 1)}" in said
    assert cautious["report"]["mean"] / sam["report"]["mean"] == pytest.approx(0.5, abs=0.1), "about half"
    forgets = [row["flat"] - result["base"]["flat"] for row in result["rows"] if row["arm"] == "lora"]
    assert cautious["flat"]["mean"] < 0.15 * sum(forgets) / len(forgets), "little more than LoRA"


def test_the_shapes_were_tried_with_the_layers_that_their_names_say() -> None:
    found = read_shapes()
    assert found is not None
    demo = json.loads(preset_file("demo").read_text(encoding="utf-8"))
    expected = [
        {"lora_target_modules": "attn", "rank": 4},
        {key: demo[key] for key in ("lora_target_modules", "rank")},
    ]
    assert [one["settings"] for one in found["layers"].values()] == expected
