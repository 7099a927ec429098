"""Write the tables of docs/performance.md from the benchmarks' JSON: `python -m benchmarks.performance_page`

What stands between `<!-- NAME -->` and `<!-- end -->` is written anew, from the file called NAME; all else of the
page is written by hand, and has no figures that were measured. A file that is not there says how to make it.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "performance.md"
_BLOCK = re.compile(r"(?<=<!-- )((?!end )\w+) -->\n.*?(?=<!-- end -->)", re.DOTALL)


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def filled(page: str) -> str:
    """The page with its tables as the JSON files are now."""
    return _BLOCK.sub(lambda found: f"{found[1]} -->\n{block(found[1])}\n", page)


def block(name: str) -> str:
    file = FOLDER / f"{name}.json"
    if not file.is_file():
        return f"*Not measured yet: `python -m benchmarks.{name}` does.*"
    figures = json.loads(file.read_text(encoding="utf-8"))
    return f"{TABLES[name](figures)}\n\n{origin(name, figures)}"


def origin(name: str, figures: dict[str, Any]) -> str:
    libraries = ", ".join(f"{library} {version}" for library, version in figures["versions"].items())
    known = [figures[key] for key in ("date", "device") if figures.get(key)]
    return f"*{', '.join([f'`{command(name, figures)}`', *known])}; {libraries}.*"


def command(name: str, figures: dict[str, Any]) -> str:
    """What makes figures like these again, with those of its flags that they tell."""
    flags = FLAGS[name](figures)
    return " ".join([f"python -m benchmarks.{name}", *(f"--{flag} {value}" for flag, value in flags.items())])


def thread_flag(figures: dict[str, Any]) -> dict[str, Any]:
    return {"threads": figures["threads"]}


def turn_flags(figures: dict[str, Any]) -> dict[str, Any]:
    return {"turns": next(iter(subjects(figures).values()))["turns"], **thread_flag(figures)}


def steps(figures: dict[str, Any]) -> str:
    """Of `train_step`: a table for each subject."""
    tables = []
    for subject, found in subjects(figures).items():
        lines = [
            f"{subject}, {found['layers']} adapted layers, {found['turns']} steps of each arm:\n",
            "| arm | ms a step | / LoRA | quartiles | peak MiB | launches a layer beyond LoRA's |",
            "|---|---|---|---|---|---|",
        ]
        for arm, (_, median, _) in found["seconds"].items():
            low, ratio, high = found.get(f"{arm} / lora", (None, None, None))
            more = (found["launches"][arm] - found["launches"]["lora"]) / found["layers"]
            cells = [f"{1e3 * median:.1f}", f"{ratio:.3f}" if ratio else "", f"{low:.3f} to {high:.3f}" if low else ""]
            cells += [f"{found['peak_bytes'][arm] / 2**20:.1f}", f"{more:+.1f}" if ratio else ""]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def layers(figures: dict[str, Any]) -> str:
    """Of `layer_cost`: what each arm adds against its floor, then the ratios of one property at a time."""
    lines = ["| stack | arm | / LoRA | added, ms | floor, ms | added / floor | peak MiB beyond LoRA's | drift |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, found in figures["shapes"].items():
        for arm, floor in found["floor"].items():
            added, peaks = found["added"][arm], found["peak_bytes"]
            cells = [f"{found[f'{arm} / lora'][1]:.3f}", f"{1e3 * added:.2f}", f"{1e3 * floor:.2f}"]
            cells += [
                f"{added / floor:.1f}",
                f"{(peaks[arm] - peaks['lora']) / 2**20:+.1f}",
                f"{found['drift'][arm]:.1e}",
            ]
            lines.append(f"| {name} | {arm} | {' | '.join(cells)} |")
    rates = figures["rates"]
    lines.append(
        f"\n{rates['bytes'] / 1e9:.1f} GB/s copied, {rates['draws'] / 1e6:.0f} million normal numbers/s drawn.\n"
    )
    arms = list(next(iter(figures["shapes"].values()))["floor"])
    lines += [f"| one property | {' | '.join(f'{arm} / LoRA' for arm in arms)} |", f"|---{'|---' * len(arms)}|"]
    for what, values in figures["scaling"].items():
        for value, found in values.items():
            ratios = " | ".join(f"{found[f'{arm} / lora'][1]:.3f}" for arm in arms)
            lines.append(f"| {what} {value} | {ratios} |")
    return "\n".join(lines)


def whole_step(figures: dict[str, Any]) -> str:
    """Of `sdxl_step`: the table of steps, and what share of a step's operators each part has."""
    tables = [steps(figures)]
    for found in subjects(figures).values():
        arms = list(found["parts"])
        parts = sorted({part for arm in arms for part in found["parts"][arm]}, key=lambda part: weight(found, part))
        lines = [f"| share of the time | {' | '.join(arms)} |", f"|---{'|---' * len(arms)}|"]
        for part in parts:
            shares = (found["parts"][arm].get(part) for arm in arms)
            lines.append(f"| {part} | {' | '.join('' if one is None else f'{one:.1%}' for one in shares)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def weight(found: dict[str, Any], part: str) -> float:
    """Puts the largest parts of a plain step first, then those of eps."""
    return -found["parts"]["lora"].get(part, found["parts"]["full"].get(part, 0.0) - 1)


def whole_run(figures: dict[str, Any]) -> str:
    """Of `whole_run`: the processor's seconds and the peak of each program, and their ratio."""
    lines = ["| base | steps | turns | ours, s | diffusers, s | ratio | ours, MiB | diffusers, MiB |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for subject, found in subjects(figures).items():
        ours, script = (statistics.median(found["seconds"][arm]) for arm in ("ours", "diffusers"))
        peaks = [f"{found['peak_bytes'][arm] / 2**20:.0f}" for arm in ("ours", "diffusers")]
        cells = [subject, found["steps"], found["turns"], f"{ours:.1f}", f"{script:.1f}"]
        lines.append(f"| {' | '.join(map(str, [*cells, format(found['ours / diffusers'], '.2f'), *peaks]))} |")
    return "\n".join(lines)


def whole_run_flags(figures: dict[str, Any]) -> dict[str, Any]:
    steps = subjects(figures)["tiny base"]["steps"]
    return {"script": "train_dreambooth_lora_sdxl.py", "steps": steps, **turn_flags(figures)}


def subjects(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if isinstance(value, dict) and "seconds" in value}


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "train_step": steps,
    "sdxl_step": whole_step,
    "layer_cost": layers,
    "whole_run": whole_run,
}
FLAGS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "train_step": thread_flag,
    "sdxl_step": turn_flags,
    "layer_cost": thread_flag,
    "whole_run": whole_run_flags,
}


if __name__ == "__main__":
    main()
