"""Where does flatness pay? `python -m benchmarks.paper_variants_page` makes docs/variants.md of what was found.

Every number of the page and of its figure comes from benchmarks/paper_variants_PART.json, and so do the sentences that
it begins with. A part that was not run yet says how to run it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from benchmarks.noise_shapes import section as shapes_section
from benchmarks.paper_variants_answer import answer, headline_table
from benchmarks.paper_variants_figures import Result
from benchmarks.paper_variants_parts import PARTS
from benchmarks.paper_variants_plan import SCHEDULES, SIGMAS
from benchmarks.paper_variants_sections import SECTIONS, cells_of
from benchmarks.paper_words import SCALE, UNIT
from flatlora_diffusion.charts.lines import Line, titled_chart
from flatlora_diffusion.charts.palette import FLAT_LORA, FOURTH, THIRD, Tone

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "variants.md"
ONE_LIST = """\
> **These are differences on one list of icons**, 61 % of which show things that the base has never drawn, with
> intervals over training seeds alone and the same (noise, timestep) draws for every seed. On things that the base
> knows SAM is not better. [generalization.md](generalization.md) has the figures by population, with intervals over
> seeds and icons."""
FIGURE = "variants.png"
SHAPES = FOLDER / "noise_shapes.json"
LOOKS = {
    "cosine": THIRD._replace(shades=(Tone("#7fb3aa", "#7fb3aa"),)),  # the lighter one is the chosen checkpoint's
    "constant": FLAT_LORA,
    "down": FOURTH._replace(shades=(Tone("#dba3e0", "#dba3e0"),)),
}


def main() -> None:
    results = read_results()
    PAGE.write_text(page(results, read_shapes()), encoding="utf-8")
    if "map" in results:
        draw_figure(results["map"], PAGE.with_name(FIGURE))
    print(PAGE)


def read_results(folder: Path = FOLDER) -> dict[str, Result]:
    """What was found, by part, of the parts that were run."""
    files = {part: folder / f"paper_variants_{part}.json" for part in PARTS}
    return {part: json.loads(file.read_text(encoding="utf-8")) for part, file in files.items() if file.is_file()}


def read_shapes() -> Result | None:
    """What `noise_shapes` found, if it was run."""
    found: Result | None = json.loads(SHAPES.read_text(encoding="utf-8")) if SHAPES.is_file() else None
    return found


def page(results: Mapping[str, Result], shapes: Result | None = None) -> str:
    parts = ["# Where does flatness pay?", ONE_LIST, answer(results)]
    if "map" in results:
        parts.append(f"![Held-out loss less LoRA's by sigma and schedule]({FIGURE})")
    if results:
        parts += [_conditions(results), *_unlike(results), headline_table(results)]
    for part, (title, write) in SECTIONS.items():
        text = write(results[part]) if part in results else _not_run(part)
        parts.append(f"## {title}\n\n{text}")
    parts += [] if shapes is None else [f"## Noise of other shapes\n\n{shapes_section(shapes)}"]
    return "\n\n".join(parts) + "\n"


def draw_figure(result: Result, file: Path) -> None:
    """Each schedule's differences to LoRA by sigma, at the end and at the chosen checkpoint."""
    found = cells_of(result)
    lines = [
        Line(
            f"{schedule}, {words}",
            LOOKS[schedule],
            SIGMAS,
            [SCALE * found[schedule, sigma][metric]["mean"] for sigma in SIGMAS],
            shade=shade,
        )
        for shade, (metric, words) in enumerate({"report": "at the end", "chosen": "chosen checkpoint"}.items())
        for schedule in SCHEDULES
    ]
    title = "Held-out loss less LoRA's of the same seed: below 0 the noise helps"
    titled_chart(lines, title, "sigma", f"difference, {UNIT}").save(file)


def _conditions(results: Mapping[str, Result]) -> str:
    one = next(iter(results.values()))
    settings, libraries = one["settings"], one["versions"]
    pairs = [pair for result in results.values() for pair in result.get("pairs", ())]
    seen, alike = sum(len(pair["seeds"]) for pair in pairs), sum(pair["alike"] for pair in pairs)
    machine = f"{one['date']}, {one['device']}, torch {libraries['torch']}, fp32"
    return f"""Made by `python -m benchmarks.paper_variants --work FOLDER`, then
`python -m benchmarks.paper_variants_page`; {machine}.
All figures: `benchmarks/paper_variants_*.json`.

**What was trained.** The tiny base on 23 3D icons, {settings["max_train_steps"]} steps of batch \
{settings["train_batch_size"]}, rank {settings["rank"]}, learning rate {settings["learning_rate"]:g} unless a table \
says another. Two runs of a pair share base, images, crops, noise and timesteps: so it was in {alike} of {seen} pairs,
by hashes of every step; the others have an arm that stops by three of its images, which it does not train on, or one
that sees twice as many images a step.

**What was measured.** The denoising loss at fixed noise and timesteps, without eps. Settings, cells of the map and
checkpoints are chosen on the search icons; what is reported was measured on others, and no list of 3D icons shares an
icon with another or a word with the training icons. *At equal clean loss* compares two runs where both first reach the
same clean training loss, between two checkpoints by a straight line. *Flat icons* are what the base knew before,
drawings of trained and reported things among them: a rise is forgetting. *Loss rise* is that of the training icons
under noise of sigma 0.1 (Eq. 7). Names and 3D are what the judge finds in pictures of
icons that were not trained on, a difference of shares. Losses {UNIT}, lower is better; differences are paired by seed,
with Student's 95 % interval, uncorrected but in the table of headline comparisons. An interval that holds 0 shows
nothing. A small base with 64-pixel icons is no SDXL: what holds here need not hold there, either way."""


def _unlike(results: Mapping[str, Result]) -> list[str]:
    """A paragraph on the parts that were run on another base than the first, or with other settings."""
    first = next(iter(results.values()))
    others = [
        part
        for part, result in results.items()
        if any(result[key] != first[key] for key in ("fingerprint", "settings"))
    ]
    if not others:
        return []
    return [f"**Not alike.** {', '.join(others)}: another base, or other settings, than those above."]


def _not_run(part: str) -> str:
    return f"*Not run yet: `python -m benchmarks.paper_variants --work FOLDER --parts {part}` does.*"


if __name__ == "__main__":
    main()
