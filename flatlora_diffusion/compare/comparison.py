"""`compare`: arms trained as one experiment, measured alike, and the report of it.

compare.html    the verdict, pictures, numbers with intervals, proof: one file that needs no network
compare.json    every figure and hash
compare.md      the table
compare.png     the same prompts and seeds by the base and each arm
ARM/seed-N/     the run folders;  pictures/, measured/: what is not drawn or measured twice
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from flatlora_diffusion.compare.arms import Arm, Planned, null_arms, parse_arm, plan, train_planned
from flatlora_diffusion.compare.conditions import proof
from flatlora_diffusion.compare.examiner import OWN_METRICS, TRAIN, Examiner, Figures
from flatlora_diffusion.compare.findings import Values, paired_rows, table, verdict
from flatlora_diffusion.compare.material import Material, load_examiner, read_material
from flatlora_diffusion.compare.nulls import Ends, null_rows
from flatlora_diffusion.compare.overfit import advise
from flatlora_diffusion.compare.page.page import write_compare_page
from flatlora_diffusion.compare.trajectory import Point
from flatlora_diffusion.config import CompareConfig, ConfigError, TrainConfig
from flatlora_diffusion.data.training_set import load_training_set
from flatlora_diffusion.evaluation.finished_runs import check_images, read_runs
from flatlora_diffusion.evaluation.metrics import described
from flatlora_diffusion.gallery.grid import labelled_grid
from flatlora_diffusion.ground.provenance import base_fingerprint
from flatlora_diffusion.ground.run_lock import alone_in
from flatlora_diffusion.ground.saved_settings import portable
from flatlora_diffusion.ground.versions import versions
from flatlora_diffusion.ground.whole_files import write_text
from flatlora_diffusion.sdxl.pipeline import Sdxl

logger = logging.getLogger(__name__)


def compare(config: TrainConfig, own: CompareConfig) -> Path:
    """Train all arms, nulls and seeds below `output_dir`, measure them and write the report; returns the folder.

    Finished runs with the same settings are not trained again. Raises ConfigError for wrong input and for runs that
    cannot be compared, RunError when one could not be trained.
    """
    with alone_in(Path(config.run.output_dir), "output_dir"):
        return _compare(config, own)


def _compare(config: TrainConfig, own: CompareConfig) -> Path:
    material = read_material(config, own)
    out, seed = Path(config.run.output_dir), config.run.seed
    assert seed is not None
    arms = [parse_arm(text) for text in own.arms]
    seeds = range(seed, seed + own.num_seeds)
    main = plan(config, arms, seeds, own.num_checkpoints)
    null = [*_missing(arms), *null_arms(seed, config.adapter.lora_init_seed)]
    nulls = plan(config, null, [seed], own.num_checkpoints)
    for planned in (*main, *nulls):
        train_planned(planned)
    runs = read_runs([str(planned.run.folder) for planned in (*main, *nulls)])  # refuses what does not fit together
    check_images(runs[0], load_training_set(config.data))
    config = config.replace(mixed_precision=main[0].run.config()["mixed_precision"])  # as accelerate decided it
    examiner, sdxl = load_examiner(config, [*main, *nulls], material)
    _check_base(config, sdxl, [*main, *nulls])
    result = {"settings": _settings(config, own, material), **_measure(arms, main, nulls, examiner)}
    write_text(out / "compare.json", json.dumps(result, indent=1) + "\n")
    names = {arm.key: arm.name for arm in arms}
    write_text(out / "compare.md", table(names, result["metrics"], result["base"], result["values"]) + "\n")
    _save_grid(out, result, {sample.caption for sample in material.sets[TRAIN].samples})
    write_compare_page(result, out)
    return out


def _missing(arms: Sequence[Arm]) -> list[Arm]:
    """LoRA and Flat-LoRA as they are, for the nulls to be compared with, where they are not arms themselves."""
    plain = [parse_arm(key) for key in ("lora", "flat-lora") if key not in {arm.key for arm in arms}]
    return [replace(arm, role="null") for arm in plain]


def _check_base(config: TrainConfig, sdxl: Sdxl, runs: Sequence[Planned]) -> None:
    """Raise ConfigError when the base is not the one that the runs were trained on."""
    if config.model.quantize_base is not None:
        return  # they saw its quantized weights, which have another hash
    now = base_fingerprint(sdxl.unet)
    for planned in runs:
        for event in planned.run.events():
            if event["event"] == "start" and event["base"] != now:
                raise ConfigError(
                    f"run {planned.arm.key}, seed {planned.seed} was trained on another base than "
                    f"{config.model.pretrained_model_name_or_path!r} is now: put the base back, or give another "
                    "--output_dir"
                )


def _settings(config: TrainConfig, own: CompareConfig, material: Material) -> dict[str, Any]:
    """What the comparison was made with: the arms' settings, its own, and the image sets by their hashes."""
    mine = {
        name: Path(value).name if name.endswith(("_dir", "_file")) and value else value
        for name, value in asdict(own).items()
    }
    sets = {f"{name} images": f"{len(one.samples)}, {one.sha256[:16]}" for name, one in material.sets.items()}
    return {**portable(config.to_dict()), **mine, **sets}


def _measure(
    arms: Sequence[Arm], main: Sequence[Planned], nulls: Sequence[Planned], examiner: Examiner
) -> dict[str, Any]:
    values: dict[str, dict[int, Figures]] = {}
    walks: dict[str, dict[int, list[Point]]] = {}
    base = examiner.base()
    for planned in main:
        logger.info("measuring %s, seed %d", planned.arm.name, planned.seed)
        values.setdefault(planned.arm.key, {})[planned.seed] = examiner.run(planned)
        walks.setdefault(planned.arm.key, {})[planned.seed] = examiner.trajectory(planned)
    for planned in nulls:
        logger.info("measuring %s", planned.arm.name)
        values.setdefault(planned.arm.key, {})[planned.seed] = examiner.losses(planned)
    metrics = _metrics([base, *(figures for by_seed in values.values() for figures in by_seed.values())])
    rows = paired_rows(arms, [metric["key"] for metric in metrics], values, walks)
    first = [planned for planned in main if planned.seed == main[0].seed]
    swept = {planned.arm.key: examiner.strengths(planned) for planned in first}
    every = {arm.key: arm for arm in (*arms, *(planned.arm for planned in nulls))}
    return {
        "arms": [asdict(arm) for arm in every.values()],
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
        "proof": proof([*main, *nulls]),
        "nulls": null_rows({one.arm.key: _ends(one, examiner) for one in (*first, *nulls)}, values, main[0].seed),
        "advice": [_advice(planned, walks, swept) for planned in first],
        "pictures": _pictures(first, examiner),
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


def _save_grid(out: Path, result: Mapping[str, Any], captions: set[str]) -> None:
    pictures, steps = result["pictures"], result["settings"]["max_train_steps"]
    is_new = not set(pictures["prompts"]) & captions
    rows = [[Image.open(out / file).convert("RGB") for file in column] for column in pictures["files"]]
    caption = f"same prompts, seeds and settings; {steps} steps" + "; none of these was trained on" * is_new
    grid = labelled_grid(rows, pictures["columns"], pictures["prompts"], caption=caption)
    grid.save(out / "compare.png")


def _by_text(values: Values) -> dict[str, dict[str, Figures]]:
    return {arm: {str(seed): figures for seed, figures in by_seed.items()} for arm, by_seed in values.items()}


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {platform.machine()}, {torch.get_num_threads()} thread(s)"
