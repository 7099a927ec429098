"""Which preset should `make demo` have? `python -m benchmarks.demo_preset --work FOLDER [--only NAME ...]`

Trains plain LoRAs of variations of the demo's settings and measures them every 150 steps, drawn at the usual guidance
and at half of it: chosen on the LoRA arm alone, so that the demo favours no other method, and on 48 icons of things
that are neither among the training images nor among the 64 published held-out ones. The 64 then report the best row,
since they chose nothing. Where the learning rate falls to 0, only the end is measured. A few variations are trained by
SAM, to say what it can; they choose nothing. Nothing is done twice; a stopped run goes on.

Prints a table, the best first, and writes it and a sheet of pictures per row to FOLDER/base-HASH, and once all
variations are measured benchmarks/demo_preset.json. With --only it has the others' rows from there, if they are of the
same base. Needs the 3D icons that `samples.icons_3d.build` fetches. About 4 minutes per variation on one quiet core.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.demo_preset_variations import EVERY, VARIATIONS, Variation, recaption, recaptioned, training_icons
from flatlora_diffusion.compare.evaluator import HELDOUT, names_of
from flatlora_diffusion.compare.losses import UNGROUPED, ImageSet, LossEvaluator
from flatlora_diffusion.compare.material import SAMPLE_ICONS
from flatlora_diffusion.config import SAMPLES, ModelConfig, TrainConfig, preset_file
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.data.images import HELDOUT_FOLDER, load_image
from flatlora_diffusion.evaluation.judge import load_judge
from flatlora_diffusion.evaluation.metrics import judge_metrics
from flatlora_diffusion.ground.provenance import base_fingerprint
from flatlora_diffusion.ground.run_dir import LORA_FILE, RunDir
from flatlora_diffusion.ground.versions import versions
from flatlora_diffusion.ground.whole_files import write_json
from flatlora_diffusion.lora_files.attached import loaded
from flatlora_diffusion.lora_files.place import LoraFile
from flatlora_diffusion.sdxl.objective import Objective
from flatlora_diffusion.sdxl.pipeline import Sdxl, load_sdxl
from flatlora_diffusion.sdxl.sampling import generate_images
from flatlora_diffusion.training.trainer import train
from samples.icons_3d.build import KNOWN, named_words, split, take, write_evaluation_set
from samples.tiny_sdxl.recipe.icons import Concept, choose_concepts, load_concepts
from samples.tiny_sdxl.recipe.quality import contact_sheet

RESULT = Path(__file__).with_suffix(".json")
GUIDANCES = (5.0, 2.5)
CHOICE, DRAWS = 48, 2  # icons, and (noise, timestep) pairs of each
TOLD = 0.05  # of a mean probability for 3D: no finer than its standard error
BATCH = 24  # pictures drawn at once
# What is wanted: the judge's probability for 3D, names found against the base's, held-out loss against the base's.
STYLE, NAMES, LOSS = 0.6, -0.05, 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for icons, runs and measurements")
    parser.add_argument("--icons", type=Path, help="folder for the npm packages; default: that of --work")
    parser.add_argument("--only", nargs="+", choices=VARIATIONS, default=list(VARIATIONS), metavar="NAME")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    known = choose_concepts(load_concepts(args.icons or args.work), KNOWN)
    sdxl = load_sdxl(ModelConfig(), torch.device("cpu"), torch.float32)
    work = args.work / f"base-{base_fingerprint(sdxl.unet)[:12]}"  # another base needs other runs
    concepts, folder = choice(known), work / "choice"
    if not (folder / "metadata.jsonl").is_file():
        write_evaluation_set(concepts, folder)
    kept = kept_result(base_fingerprint(sdxl.unet)[:16])
    result: dict[str, Any] = {
        "base": base_fingerprint(sdxl.unet)[:16],
        "choice": [concept.name for concept in concepts],
        "versions": versions(),
        "rows": [row for row in kept["rows"] if row["variation"] not in args.only],
    }
    for name in args.only:
        measure = Measure(sdxl, folder, VARIATIONS[name], work / "measured")
        result["real"] = measure.real()
        result["rows"] += rows(name, VARIATIONS[name], measure, work)
        write_json(work / "demo_preset.json", result)  # a stop loses nothing that is measured
        print(table(result), flush=True)
    if {row["variation"] for row in result["rows"]} == VARIATIONS.keys():
        for key, rows_of in {"reported": plain(result["rows"]), "reported_of_sam": by_sam(result["rows"])}.items():
            best = best_first(rows_of)[0]
            is_kept = key in kept and best in kept["rows"] and best["variation"] not in args.only
            result[key] = kept[key] if is_kept else reported(sdxl, best, work)
            print(f"The best of them on the published held-out icons: {result[key]}")
        write_json(RESULT, result)


def kept_result(base: str) -> dict[str, Any]:
    """What was measured of this base before."""
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    return found if found.get("base") == base else {"rows": []}


def plain(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of plain LoRAs."""
    return [row for row in rows if VARIATIONS[row["variation"]].is_plain]


def by_sam(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if not VARIATIONS[row["variation"]].is_plain]


def choice(known: Sequence[Concept]) -> list[Concept]:
    """Icons to choose by: of the best known things, as the published ones are, with no word of theirs in the name."""
    taken = [concept for part in split(known) for concept in part]
    words = {word for concept in taken for word in named_words(concept.name)}
    others = [concept for concept in known if concept not in taken and not words & named_words(concept.name)]
    return take(others, CHOICE, "choice")


class Measure:
    """Measures LoRA files of a variation on a folder of icons, captioned as its training icons are."""

    def __init__(self, sdxl: Sdxl, folder: Path, variation: Variation, kept: Path) -> None:
        samples = load_samples(folder).samples
        names = names_of(folder, samples)
        self._samples = [recaptioned(sample, variation.caption) for sample in samples]
        self._names = {recaption(old, variation.caption): name for old, name in names.items()}
        self._judge = load_judge(SAMPLES / "tiny_sdxl" / "judge")
        self._sdxl, self._kept = sdxl, kept
        kept.mkdir(parents=True, exist_ok=True)
        self._losses = LossEvaluator(
            sdxl,
            Objective(sdxl.scheduler),
            {HELDOUT: ImageSet(self._samples, [UNGROUPED] * len(self._samples), DRAWS)},
            sdxl.resolution,
            self._kept,
            text_is_adapted=bool(variation.changes.get("train_text_encoder")),
        )

    def __call__(self, lora: Path | None, name: str, guidance: float) -> dict[str, float]:
        """Loss and what the judge says of the pictures, of which there is a sheet too, both named by `name`."""
        file = self._kept / f"{name}, guidance {guidance:g}.json"
        if not file.is_file():
            files = [] if lora is None else [LoraFile(lora)]
            with loaded(self._sdxl.pipeline, files):
                pictures = self._drawn(guidance)
            names = [self._names[sample.caption] for sample in self._samples]
            loss = self._losses.losses(lora)[HELDOUT][UNGROUPED]
            contact_sheet(list(pictures.values()), names, columns=12).save(file.with_suffix(".png"))
            write_json(file, {"loss": loss, **self._judged(pictures)})
        found: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def _drawn(self, guidance: float) -> dict[tuple[str, int], Image.Image]:
        keys = [(sample.caption, 0) for sample in self._samples]
        prompts, seeds = zip(*keys, strict=True)
        size = self._sdxl.resolution
        images = generate_images(self._sdxl, prompts, seeds, size, guidance=guidance, batch_size=BATCH)
        return dict(zip(keys, images, strict=True))

    def real(self) -> dict[str, float]:
        """What the judge says of the icons themselves."""
        return self._judged({(sample.caption, 0): load_image(sample.source, "white") for sample in self._samples})

    def _judged(self, pictures: Mapping[tuple[str, int], Image.Image]) -> dict[str, float]:
        return judge_metrics(self._judge, pictures, self._names, sorted(self._names.values()))


def rows(name: str, variation: Variation, measure: Measure, work: Path) -> list[dict[str, Any]]:
    """What a variation measured at its steps and at each guidance, trained first if it is not yet."""
    began = time.perf_counter()
    files = trained(variation, work / variation.folder(name))
    print(f"{name}: trained in {time.perf_counter() - began:.0f} s", flush=True)
    found = []
    for (step, file), guidance in product(files.items(), GUIDANCES):
        base = measure(None, variation.base_name, guidance)
        values = measure(file, f"{name}, {step}", guidance)
        row = {
            "variation": name,
            "steps": step,
            "guidance": guidance,
            "style": values["style_probability"],
            "base_style": base["style_probability"],
            "names": values["name_found"],
            "base_names": base["name_found"],
            "loss": values["loss"] / base["loss"],
            "seconds_per_step": seconds_per_step(file),
        }
        found.append({**row, "goals": goals_met(row)})
    return found


def reported(sdxl: Sdxl, row: Mapping[str, Any], work: Path) -> dict[str, Any]:
    """The best row's LoRA and the base on the icons that chose nothing."""
    variation = VARIATIONS[row["variation"]]
    measure = Measure(sdxl, SAMPLE_ICONS / HELDOUT_FOLDER, variation, work / "reported")
    file = trained(variation, work / variation.folder(row["variation"]))[row["steps"]]
    named = {"base": (None, variation.base_name), "LoRA": (file, f"{row['variation']}, {row['steps']}")}
    found = {name: measure(*of, row["guidance"]) for name, of in named.items()}
    return {key: row[key] for key in ("variation", "steps", "guidance")} | found


def trained(variation: Variation, folder: Path) -> dict[int, Path]:
    """The LoRA files of a run by their steps."""
    steps = variation.steps
    if not (folder / LORA_FILE).is_file():
        demo = TrainConfig().updated_from(preset_file("demo")).replace(method="lora", report_to="none")
        config = demo.replace(
            instance_data_dir=str(training_icons(variation, folder.with_name(f"{folder.name}-icons"))),
            output_dir=str(folder),
            max_train_steps=steps,
            checkpointing_steps=EVERY,
            resume_from_checkpoint="latest",
            **variation.changes,
        )
        train(config)
    return {
        step: folder / LORA_FILE if step == steps else folder / f"checkpoint-{step}" / LORA_FILE
        for step in variation.measured_steps
    }


def seconds_per_step(lora: Path) -> float:
    run = lora.parent.parent if lora.parent.name.startswith("checkpoint-") else lora.parent
    seconds = sorted(event["seconds"] for event in RunDir(run).events() if event["event"] == "step")
    return float(seconds[len(seconds) // 2])


def goals_met(row: Mapping[str, Any]) -> int:
    return sum((row["style"] >= STYLE, row["names"] - row["base_names"] >= NAMES, row["loss"] <= LOSS))


def best_first(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that meet most goals, then the most surely 3D as far as can be told, then those with the lowest loss."""
    return sorted(rows, key=lambda row: (row["goals"], round(row["style"] / TOLD), -row["loss"]), reverse=True)


def table(result: Mapping[str, Any]) -> str:
    """The best first."""
    lines = [
        f"Goals: 3D at least {STYLE:g}, names {-NAMES:.0%} below the base's at most, loss {LOSS:g} of its at most.",
        f"Real icons: 3D {result['real']['style_probability']:.3f}, names {result['real']['name_found']:.0%}.\n",
        "| variation | steps | guidance | goals | 3D (base) | names (base) | loss / base's | seconds per step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in best_first(result["rows"]):
        lines.append(
            f"| {row['variation']} | {row['steps']} | {row['guidance']:g} | {row['goals']} "
            f"| {row['style']:.3f} ({row['base_style']:.3f}) | {row['names']:.0%} ({row['base_names']:.0%}) "
            f"| {row['loss']:.3f} | {row['seconds_per_step']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
