"""What the pages say of the demo's settings is what `demo_preset` measured, and the best row is found by its rule."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.demo_preset import TOLD, best_first, plain
from flatlora_diffusion.commands.command_line import DEMO_GUIDANCE
from flatlora_diffusion.config import TrainConfig, preset_file

ROOT = Path(__file__).parents[1]
RESULT = json.loads((ROOT / "benchmarks" / "demo_preset.json").read_text(encoding="utf-8"))


def text_of(name: str) -> str:
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def test_of_rows_that_pictures_cannot_tell_apart_the_one_with_the_lowest_loss_is_best() -> None:
    surest = {"goals": 2, "style": 0.5 + 0.2 * TOLD, "loss": 0.94}
    lower = {"goals": 2, "style": 0.5, "loss": 0.93}
    sure, met = {"goals": 2, "style": 0.5 + TOLD, "loss": 0.95}, {"goals": 3, "style": 0.1, "loss": 1.0}
    assert best_first([surest, lower, sure, met]) == [met, sure, lower, surest]


def test_the_demo_has_the_settings_of_the_best_row() -> None:
    best, reported = best_first(plain(RESULT["rows"]))[0], RESULT["reported"]
    assert {key: best[key] for key in ("variation", "steps", "guidance")} == {
        key: reported[key] for key in ("variation", "steps", "guidance")
    }
    demo = TrainConfig().updated_from(preset_file("demo"))
    assert (best["variation"], best["steps"]) == ("conv rank 16", demo.optim.max_train_steps)
    assert (demo.adapter.lora_target_modules, demo.adapter.rank) == ("conv", 16)
    assert float(DEMO_GUIDANCE) == best["guidance"]


def test_pages_say_what_was_measured() -> None:
    base, lora = RESULT["reported"]["base"], RESULT["reported"]["LoRA"]
    style = (lora["style_probability"], base["style_probability"])
    said = (
        f"LoRA has 3D {style[0]:.2f} (base {style[1]:.2f}), the right name for {100 * lora['name_found']:.1f} % "
        f"({100 * base['name_found']:.1f} %) and {lora['loss'] / base['loss']:.3f} of the base's loss"
    )
    assert said in text_of("README.md")
    assert f"is {style[0]:.2f}, the base's {style[1]:.2f})" in text_of("CHANGELOG.md")
    table = text_of("docs/metrics.md").partition("How the demo's settings were chosen")[2].partition("## ")[0]
    rows = re.findall(r"\| (\d+) \| ([\d.]+) \| (0\.\d+) \| (\d+) % \((\d+) %\) \| ([\d.]+) \|", table)
    measured = {
        (
            f"{row['steps']}",
            f"{row['guidance']:g}",
            f"{row['style']:.3f}",
            f"{100 * row['names']:.0f}",
            f"{100 * row['base_names']:.0f}",
            f"{row['loss']:.3f}",
        )
        for row in RESULT["rows"]
    }
    assert len(rows) == 13
    assert set(rows) <= measured
    assert f"Some of the {len(RESULT['rows'])} rows" in table
    sam = RESULT["reported_of_sam"]
    found = sam["LoRA"]
    assert (
        f"it then has 3D {found['style_probability']:.2f}, {100 * found['name_found']:.1f} % of the names and "
        f"{found['loss'] / sam['base']['loss']:.3f} of the base's loss"
    ) in table
