"""The paper beside us, table by table: `python -m benchmarks.paper_results` makes docs/results.md and its figure.

Every number of ours comes from a benchmark's JSON in this folder, also those of the sentences that the page begins
with; a benchmark that was not run yet says how to run it. The paper's are in `paper_published.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import paper_memory, paper_published as published, paper_text_to_image_page
from benchmarks.paper_flatness import table
from benchmarks.paper_results_studies import (
    STUDIES,
    TESTS,
    TITLES,
    Tables,
    accuracies,
    costs,
    points,
    pooled,
    ranks,
    rivals,
    severities,
    sigmas,
    surface_section,
    tasks,
    told,
    variants,
)
from benchmarks.paper_study_arms import ARMS, VARIANT_ARMS
from benchmarks.paper_variants_answer import in_short as icons_in_short
from benchmarks.paper_variants_page import PAGE as VARIANTS, read_results
from benchmarks.paper_words import is_told
from flatlora_diffusion.charts.forest import Row, forest_chart
from flatlora_diffusion.charts.palette import BASE, FLAT_LORA, THIRD, Look

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "results.md"
FIGURE = "results.png"
LOOKS = {"test": FLAT_LORA, "shifted": THIRD}

Found = dict[str, dict[str, Any]]


def main() -> None:
    found = read()
    PAGE.write_text(page(found), encoding="utf-8")
    if any(name in found for name in STUDIES):
        draw_figure(found, PAGE.with_name(FIGURE))
    print(PAGE)


def read(folder: Path = FOLDER) -> Found:
    """The results of the benchmarks that were run."""
    surfaces = [f"surface_{name}" for name in STUDIES]
    files = {name: folder / f"paper_{name}.json" for name in (*STUDIES, *surfaces, "memory", "text_to_image")}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}


def page(found: Found) -> str:
    parts = ["# The paper beside us", answer(found)]
    if any(name in found for name in STUDIES):
        parts.append(f"![Flat-LoRA less LoRA, by task](./{FIGURE})")
    parts.append(_conditions(found))
    parts += [f"## {title}\n\n{text}" for title, text in _sections(found).items() if text]
    return "\n\n".join(parts) + "\n"


def answer(found: Found) -> str:
    """On other people's tasks, against the other arms, and on images: a sentence or two each."""
    sentences = [_on_tasks(STUDIES[name], found[name]["tables"]) for name in STUDIES if name in found]
    sentences += [_against_rivals({**_tables(found)})] if sentences else []
    variants_found = read_results()
    if variants_found:
        sentences.append(f"On icons: {icons_in_short(variants_found)}")
    elif "text_to_image" in found:
        sentences.append(f"On icons: {paper_text_to_image_page.in_short(found['text_to_image'])}")
    return "\n".join(sentences)


def draw_figure(found: Found, file: Path) -> None:
    """Flat-LoRA less LoRA: the paper's means, the re-run's, and each task of ours."""
    means = {f"{published.T5}, mean": published.TABLE_1, f"{published.CLIP}, mean": published.TABLE_2}
    theirs = [Row(name, ranks["mean"][8].difference, BASE) for name, ranks in means.items()]
    theirs += [Row("Llama 2-7B, GSM8K", published.TABLES_3_4["GSM8K, 7B"], BASE)]
    theirs += [Row("the same, run again by others", published.RE_RUN_GSM8K.difference, BASE)]
    groups = [("published", theirs)]
    groups += [(f"here, {STUDIES[name]}", _rows(found[name]["tables"])) for name in STUDIES if name in found]
    title = "Flat-LoRA less LoRA, equal trials: right of 0 it is better"
    forest_chart(groups, title, "difference of the accuracy or score, points").save(file)


def _rows(tables: Tables) -> list[Row]:
    return [
        _row(f"{task}, {words}", arms["flat"]["difference"][metric], LOOKS[metric])
        for task, arms in tables.items()
        for metric, words in TESTS.items()
    ]


def _row(name: str, difference: Mapping[str, Any], look: Look) -> Row:
    low, high = (None if difference[end] is None else 100 * difference[end] for end in ("low", "high"))
    return Row(name, 100 * difference["mean"], look, low, high)


def _on_tasks(model: str, tables: Tables) -> str:
    said = []
    for metric, words in TESTS.items():
        better, worse = told(tables, "flat", metric)
        said.append(f"{points(pooled(tables, 'flat', metric))} points {words} (better on {better}, worse on {worse})")
    tasks = f"{len(tables)} task{'s' * (len(tables) != 1)}"
    return f"On {tasks} with {model}, Flat-LoRA less LoRA, as many trials each: {', '.join(said)}."


def _against_rivals(tables: Tables) -> str:
    """What Eq. 7 has over iid noise, and which arm is best where things shift."""
    others = [arm for arm in ARMS if arm not in ("lora", "iid")]
    gains = {arm: pooled(tables, arm, "shifted", of=len(others)) for arm in others}
    best = max(gains, key=lambda arm: float(gains[arm]["mean"]))
    own = pooled(tables, "flat", "shifted", against="iid")
    return (
        f"Over all of them, under shift: Eq. 7's noise less iid noise of equal energy is {points(own)}, "
        f"{'no difference found' if not is_told(own) else 'a difference'}; of the {len(others)} others with LoRA's "
        f"adapter {TITLES[best]} has the most over LoRA, {points(gains[best])}, corrected for being the best of them."
    )


def _tables(found: Found) -> dict[str, Any]:
    """Every task of both studies; all have equally many seeds."""
    return {task: arms for name in STUDIES if name in found for task, arms in found[name]["tables"].items()}


def _conditions(found: Found) -> str:
    made = [_made_by(name, found[name]) for name in STUDIES if name in found]
    tables = _tables(found)
    seen = [
        arms[arm]["difference"][metric]
        for arms in tables.values()
        for arm in (*ARMS, *VARIANT_ARMS)
        for metric in TESTS
        if arm != "lora"
    ]
    many, count = len(seen), sum(map(is_told, seen))
    chance = (
        f" Of the {many} comparisons of tuned arms {count} leave 0 out; were there nothing to find, one in twenty, "
        f"{many // 20}, would."
        if tables
        else ""
    )
    return f"""**What is compared.** Each arm chose its settings in equally many trials by the accuracy on a validation
split, then it was trained with further seeds; arms of one seed share first weights, batches and dropout. Differences
are paired by seed, with the 95 % interval of Student's t, each for itself, and in points of accuracy unless a table
says otherwise.{chance} The paper's models are tens to thousands of times larger than ours: equal signs would be
evidence, equal sizes a coincidence.
{" ".join([*made, "All figures: `benchmarks/paper_*.json`."])}"""


def _made_by(name: str, one: Mapping[str, Any]) -> str:
    machine = f"{one['date']}, {one['device']}, torch {one['versions']['torch']}"
    return f"`python -m benchmarks.paper_{name}`: {one['batch']} examples a step; {machine}."


def _sections(found: Found) -> dict[str, str]:
    language, vision, either = (_writer(found, *names) for names in (["language"], ["vision"], list(STUDIES)))
    llama = table(
        ["re-run by others", *published.RE_RUN_ON], [[name, *scores] for name, scores in published.RE_RUN.items()]
    )
    paper = ", ".join(f"{name} {gain:+.2f}" for name, gain in published.TABLES_3_4.items())
    return {
        "The tasks": "\n\n".join(tasks(found[name]) for name in STUDIES if "tasks" in found.get(name, {})),
        "Table 1: T5 on GLUE, here a small encoder": f"In the paper {published.TABLE_1_FULL}.\n\n"
        + language(lambda one: accuracies(published.TABLE_1, one)),
        "Table 2: CLIP on images, here a small ViT": vision(lambda one: accuracies(published.TABLE_2, one)),
        "Figure 4: corrupted images": vision(severities),
        "Tables 3 and 4: Llama 2": f"Flat-LoRA less LoRA, in the paper's text: {paper}.\n\n{llama}\n\n"
        "The first three are Llama 2-7B's, the next four Llama 3.1-8B's. "
        "Not run here: no pretrained decoder can be had where this was made. `examples/` has the scripts.",
        "Table 5: other variants of LoRA": f"Paper: {published.TABLE_5}. `full` trains the weights of the adapted "
        f"layers themselves.\n\n{either(variants)}",
        "Table 6: SAM, and simpler means": f"Paper: {published.TABLE_6}.\n\n{either(rivals)}",
        "Figure 5: ranks": f"Paper: {published.FIGURE_5}. Mean of the tasks:\n\n{either(ranks)}",
        "Tables A2 and A3: sigma": f"Paper: {published.SIGMAS}. Mean of the tasks:\n\n{either(sigmas)}",
        "Table 7: memory and time": f"Paper: {published.TABLE_7}.\n\n{_memory(found)}\n\n{either(costs)}",
        "Figure 6: loss surfaces": _surfaces(found),
        "Figure 3: SDXL, here icons": _icons(found),
    }


def _writer(found: Found, *names: str) -> Any:
    """Calls what writes a section, once for each study of `names`."""

    def write(section: Any) -> str:
        parts = []
        for name in names:
            title = f"**{STUDIES[name][0].upper()}{STUDIES[name][1:]}.**\n\n" if len(names) > 1 else ""
            parts.append(title + (section(found[name]["tables"]) if name in found else _not_run(name)))
        return "\n\n".join(parts)

    return write


def _memory(found: Found) -> str:
    if "memory" not in found:
        return _not_run("memory")
    one = found["memory"]
    return (
        f"A Llama of random weights, LoRA of rank 8, fp32, {one['date']}, {one['device']}; drift of W is after "
        f"{paper_memory.DRIFT_STEPS} steps in bf16:\n\n{paper_memory.table(one)}"
    )


def _surfaces(found: Found) -> str:
    parts = []
    for name, model in STUDIES.items():
        one = found.get(f"surface_{name}")
        if one is not None:
            parts += [surface_section(one, model), f"![Loss around W', {name}](./surface_{name}.png)"]
    parts.append("Of the tiny SDXL base, for ranks 1 and 16: [images.md](images.md). How: [flatness.md](flatness.md).")
    return "\n\n".join(parts)


def _icons(found: Found) -> str:
    if "text_to_image" not in found:
        return _not_run("text_to_image")
    words = paper_text_to_image_page.in_short(found["text_to_image"])
    return f"""The paper shows pictures and gives no number; nobody has published one for Flat-LoRA on SDXL. Here, on
the tiny base that ships: {words}

All of it: [images.md](images.md); stronger noise, rivals and controls: [{VARIANTS.name}]({VARIANTS.name})."""


def _not_run(name: str) -> str:
    return f"*Not run yet: `python -m benchmarks.paper_{name}` does.*"


if __name__ == "__main__":
    main()
