"""`compare`: arms trained as one experiment, measured alike, and the report of it.

ARM/seed-N/     the run folders;  pictures/, measured/: what is not drawn or measured twice
compare.png     the same prompts and seeds by the base and each arm, before anything is measured
compare.html    the verdict, pictures, numbers with intervals, proof: one file that needs no network
compare.json    every figure and hash
compare.md      the table

The report is written when the arms are measured, and again with the nulls. After a stop the same command goes on.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from flatlora_diffusion.compare.arms import Planned
from flatlora_diffusion.compare.conditions import proof
from flatlora_diffusion.compare.examiner import OWN_METRICS, TRAIN, Examiner, Figures
from flatlora_diffusion.compare.experiment import Experiment, outlook, read_experiment
from flatlora_diffusion.compare.findings import Values, paired_rows, table, verdict
from flatlora_diffusion.compare.material import free_device
from flatlora_diffusion.compare.nulls import Ends, null_rows
from flatlora_diffusion.compare.overfit import advise
from flatlora_diffusion.compare.page.page import GRID, PAGE, write_compare_page
from flatlora_diffusion.compare.progress import do_pieces
from flatlora_diffusion.compare.trajectory import Point
from flatlora_diffusion.config import CompareConfig, TrainConfig
from flatlora_diffusion.evaluation.metrics import described
from flatlora_diffusion.gallery.grid import labelled_grid
from flatlora_diffusion.ground.run_lock import alone_in
from flatlora_diffusion.ground.saved_settings import portable
from flatlora_diffusion.ground.versions import versions
from flatlora_diffusion.training.stopping import interrupted_as

logger = logging.getLogger(__name__)


def compare(config: TrainConfig, own: CompareConfig) -> Path:
    """Train all arms, nulls and seeds below `output_dir`, measure them and write the report; returns the folder.

    Finished runs with the same settings are not trained again. Raises ConfigError for wrong input and for runs that
    cannot be compared, RunError when one could not be trained.
    """
    with alone_in(Path(config.run.output_dir), "output_dir"):
        return _compare(read_experiment(config, own))


def _compare(experiment: Experiment) -> Path:
    """The phases in their order: what there is to look at comes before what takes long."""
    out = experiment.out
    for line in outlook(experiment):
        logger.info("%s", line)
    with interrupted_as(lambda: f"with what is done kept in {out}: the same command goes on from there"):
        experiment.train(experiment.main)
        result = _examine_arms(experiment)
        free_device()  # for the trainings to come
        experiment.train(experiment.nulls)
        _examine_nulls(experiment, result)
    return out


def _examine_arms(experiment: Experiment) -> dict[str, Any]:
    """Draw the grid, measure the arms and write the report without nulls; returns what was found."""
    out = experiment.out
    examiner, sdxl = experiment.examiner(experiment.main)
    logger.info("Drawing the same prompts with the base and each LoRA")
    do_pieces(sdxl.unet, experiment.to_draw(examiner))
    pictures = _pictures(experiment.first, examiner)
    _save_grid(out, pictures, experiment)
    logger.info("Look at %s", out / GRID)
    logger.info("Measuring the base and each LoRA")
    do_pieces(sdxl.unet, experiment.to_measure(examiner))
    result = {"settings": _settings(experiment), "pictures": pictures, **_measure(experiment, examiner)}
    _write(out, result)
    logger.info("Look at %s: all but the nulls is there", out / PAGE)
    return result


def _examine_nulls(experiment: Experiment, result: Mapping[str, Any]) -> None:
    """Measure the nulls and write the whole report."""
    examiner, sdxl = experiment.examiner(experiment.runs)
    logger.info("Measuring the nulls")
    do_pieces(sdxl.unet, experiment.to_measure_nulls(examiner))
    values = {arm: {int(seed): figures for seed, figures in found.items()} for arm, found in result["values"].items()}
    for planned in experiment.nulls:
        values[planned.arm.key] = {planned.seed: examiner.losses(planned)}
    ends = {planned.arm.key: _ends(planned, examiner) for planned in (*experiment.first, *experiment.nulls)}
    more = {
        "arms": [*result["arms"], *(asdict(planned.arm) for planned in experiment.nulls)],
        "values": _by_text(values),
        "proof": proof(experiment.runs),
        "nulls": null_rows(ends, values, experiment.main[0].seed),
    }
    _write(experiment.out, {**result, **more})


def _write(out: Path, result: Mapping[str, Any]) -> None:
    """Write the report of `result`."""
    (out / "compare.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    names = {arm["key"]: arm["name"] for arm in result["arms"] if arm["role"] == "arm"}
    (out / "compare.md").write_text(table(names, result["metrics"], result["base"], result["values"]) + "\n", "utf-8")
    write_compare_page(result, out)


def _settings(experiment: Experiment) -> dict[str, Any]:
    """What the comparison was made with: the arms' settings, its own, and the image sets by their hashes."""
    precision = experiment.main[0].run.config()["mixed_precision"]
    mine = {
        name: Path(value).name if name.endswith(("_dir", "_file")) and value else value
        for name, value in asdict(experiment.own).items()
    }
    sets = {
        f"{name} images": f"{len(one.samples)}, {one.sha256[:16]}" for name, one in experiment.material.sets.items()
    }
    return {**portable(experiment.config.to_dict()), "mixed_precision": precision, **mine, **sets}


def _measure(experiment: Experiment, examiner: Examiner) -> dict[str, Any]:
    """Every figure of the arms, and what follows from them."""
    arms, main, first = experiment.arms, experiment.main, experiment.first
    values: dict[str, dict[int, Figures]] = {}
    walks: dict[str, dict[int, list[Point]]] = {}
    base = examiner.base()
    for planned in main:
        values.setdefault(planned.arm.key, {})[planned.seed] = examiner.run(planned)
        walks.setdefault(planned.arm.key, {})[planned.seed] = examiner.trajectory(planned)
    metrics = _metrics([base, *(figures for by_seed in values.values() for figures in by_seed.values())])
    rows = paired_rows(arms, [metric["key"] for metric in metrics], values, walks)
    swept = {planned.arm.key: examiner.strengths(planned) for planned in first}
    return {
        "arms": [asdict(arm) for arm in arms],
        "seeds": list(dict.fromkeys(planned.seed for planned in main)),
        "metrics": metrics,
        "base": base,
        "values": _by_text(values),
        "trajectories": {
            arm: {str(seed): [asdict(point) for point in walk] for seed, walk in by_seed.items()}
            for arm, by_seed in walks.items()
        },
        "groups": _groups(main, examiner),
        "paired": rows,
        "verdict": verdict(rows, {arm.key: arm.name for arm in arms}),
        "proof": proof(main),
        "nulls": [],
        "advice": [_advice(planned, walks, swept) for planned in first],
        "strengths": {arm: {f"{at:g}": figures for at, figures in found.items()} for arm, found in swept.items()},
        "device": _device(),
        "versions": {"python": platform.python_version(), **versions()},
    }


def _metrics(figures: Sequence[Figures]) -> list[dict[str, Any]]:
    """What each measured figure is, ours first."""
    keys = dict.fromkeys(key for found in figures for key in found)
    ours = [dict(metric._asdict()) for metric in OWN_METRICS if metric.key in keys]
    return ours + described([key for key in keys if key not in {metric.key for metric in OWN_METRICS}])


def _advice(
    planned: Planned, walks: Mapping[str, Mapping[int, Sequence[Point]]], swept: Mapping[str, Mapping[float, Figures]]
) -> dict[str, Any]:
    losses = {strength: figures["heldout_loss"] for strength, figures in swept[planned.arm.key].items()}
    advice = advise(walks[planned.arm.key][planned.seed], losses)
    return {"arm": planned.arm.key, "seed": planned.seed, **asdict(advice)}


def _ends(planned: Planned, examiner: Examiner) -> Ends:
    """What a run came to: its weights and the pictures of its prompts."""
    return Ends(planned.lora, examiner.pictures(planned.lora, examiner.themes.seeds[0]))


def _groups(main: Sequence[Planned], examiner: Examiner) -> dict[str, Any]:
    """The held-out loss by concept group: of the base, and of each arm and seed."""
    found: dict[str, Any] = {group: {"base": loss, "values": {}} for group, loss in examiner.groups(None).items()}
    for planned in main:
        for group, loss in examiner.groups(planned.lora).items():
            found[group]["values"].setdefault(planned.arm.key, {})[str(planned.seed)] = loss
    return found


def _pictures(first: Sequence[Planned], examiner: Examiner) -> dict[str, Any]:
    """The pictures of the base and of each arm at its first seed, as names below the report's folder."""
    seed = examiner.themes.seeds[0]
    files = [examiner.pictures(None, seed), *(examiner.pictures(planned.lora, seed) for planned in first)]
    return {
        "prompts": list(examiner.themes.style),
        "columns": ["Base", *(planned.arm.name for planned in first)],
        "files": [["/".join(file.parts[-3:]) for file in column] for column in files],
    }


def _save_grid(out: Path, pictures: Mapping[str, Any], experiment: Experiment) -> None:
    is_new = not set(pictures["prompts"]) & {sample.caption for sample in experiment.material.sets[TRAIN].samples}
    rows = [[Image.open(out / file).convert("RGB") for file in column] for column in pictures["files"]]
    steps = experiment.config.optim.max_train_steps
    caption = f"same prompts, seeds and settings; {steps} steps" + "; none of these was trained on" * is_new
    grid = labelled_grid(rows, pictures["columns"], pictures["prompts"], caption=caption)
    grid.save(out / GRID)


def _by_text(values: Values) -> dict[str, dict[str, Figures]]:
    return {arm: {str(seed): figures for seed, figures in by_seed.items()} for arm, by_seed in values.items()}


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {platform.machine()}, {torch.get_num_threads()} thread(s)"
