"""What does the demo find, and what does a step of each of its arms cost? `flatlora demo`, then this:

    python -m benchmarks.demo_figures

Takes the figures of the demo's report and measures what the report cannot: it has the seconds of trainings that ran
one after the other, so that a machine that changed its speed meanwhile tells arms apart. Here the arms take turns,
step by step. Writes benchmarks/demo_figures.json and the table of docs/demo.md, and names the sentences that the page
lacks.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.train_step import ready_step
from benchmarks.turns import compare
from flatlora_diffusion.compare.arms import parse_arm, plan_runs
from flatlora_diffusion.compare.findings import metrics_table
from flatlora_diffusion.compare.page.page import RESULT
from flatlora_diffusion.config import TrainConfig, preset_file
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.storage.saved_config import expand_paths

FILE = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[1] / "docs" / "demo.md"
LORA, FLAT, AVERAGE = "lora", "flat-lora", "lora:members=3"
MEMBERS = 3
ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}
_TABLE = re.compile(r"^\| \| Base \|.*?\n\n", re.DOTALL | re.MULTILINE)

Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path("outputs/demo"), help="the demo's folder")
    parser.add_argument("--seconds", type=float, default=120, help="time in which the arms take turns")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record.save(FILE, {**of_report(options.report / RESULT), "cost": cost(options.seconds)})
    result = json.loads(FILE.read_text(encoding="utf-8"))
    text = filled(PAGE.read_text(encoding="utf-8"), result)
    PAGE.write_text(text, encoding="utf-8")
    for sentence in sentences(result):
        if sentence not in " ".join(text.split()):
            print(f"docs/demo.md lacks: {sentence}")


def of_report(file: Path) -> Result:
    """What the page says of a report, and the day of it."""
    report = json.loads(file.read_text(encoding="utf-8"))
    kept: Result = {key: report[key] for key in ("seeds", "base")}
    kept["of"] = f"{date.fromtimestamp(file.stat().st_mtime)}"
    kept["metrics"] = [{key: one[key] for key in ("key", "name", "better", "digits")} for one in report["metrics"]]
    kept["values"] = {arm: report["values"][arm] for arm in (LORA, FLAT, AVERAGE)}
    kept["advice"] = {one["arm"]: {key: one[key] for key in ("checkpoint", "over_fit")} for one in report["advice"]}
    return kept


def cost(seconds: float) -> Result:
    """Quartiles of a step's seconds over those of LoRA's, for Flat-LoRA."""
    config = TrainConfig.from_dict(expand_paths(TrainConfig().updated_from(preset_file("demo")).to_dict()))
    samples = load_samples(Path(str(config.data.instance_data_dir))).samples
    with tempfile.TemporaryDirectory() as folder:
        arms = [parse_arm(arm) for arm in (LORA, FLAT)]
        runs = plan_runs(config.replace(output_dir=folder, report_to="none"), arms, [0], 1)
        # More steps than are taken; the noise grows along them, and costs the same at any strength.
        steps = {run.arm.key: ready_step(run.config.replace(max_train_steps=10_000), samples) for run in runs}
        found = compare(steps, seconds)
    return {"turns": found["turns"], FLAT: found[f"{FLAT} / lora"]}


def filled(page: str, result: Result) -> str:
    """The page with the table as the figures are now."""
    return _TABLE.sub(f"{table(result)}\n\n", page, count=1)


def table(result: Result) -> str:
    """The report's own, with arrows for what is better, and the ratio of the turns in place of its seconds."""
    names = {LORA: "LoRA", FLAT: "Flat-LoRA", AVERAGE: f"average of {MEMBERS} LoRAs"}
    ratios = {LORA: 1.0, FLAT: result["cost"][FLAT][1], AVERAGE: float(MEMBERS)}
    time: Result = {"key": "time", "name": "time of the training, LoRA's = 1", "better": "lower", "digits": 2}
    metrics = [time if one["key"] == "seconds_per_step" else one for one in result["metrics"]]
    with_arrows = [{**one, "name": one["name"] + ARROWS[one["better"]]} for one in metrics]
    values = {
        arm: {seed: {**found, "time": ratios[arm]} for seed, found in by_seed.items()}
        for arm, by_seed in result["values"].items()
    }
    return metrics_table(names, with_arrows, result["base"], values)


def sentences(result: Result) -> list[str]:
    """What the page says of the figures, word by word."""
    base, advice, ratios = result["base"], result["advice"], result["cost"]
    of_arms = {arm: next(iter(by_seed.values())) for arm, by_seed in result["values"].items()}
    style = [f"{found['style_probability']:.2f}" for found in of_arms.values()]
    similar = min(found["heldout_similarity"] for found in of_arms.values())
    copied = max(found["memorized_share"] for found in of_arms.values())
    return [
        f"on 2 CPU cores, {result['of']}",
        f"from {base['heldout_similarity']:.3f} to {similar:.3f} at least",
        f"the judge gives a 3D style of {style[0]}, {style[1]} and {style[2]}, where real icons have 0.85",
        f"up to {copied:.0%} lie above the threshold for copies".replace("%", " %"),
        f"step {advice[LORA]['checkpoint']} of 150",
        f"a step of Flat-LoRA takes {ratios[FLAT][1]:.2f} times as long as one of LoRA",
    ]


if __name__ == "__main__":
    main()
