"""How often do 95 % intervals hold the truth when seeds and images both vary? benchmarks/interval_coverage.json

    python -m benchmarks.interval_coverage

Tables of S seeds and I images are drawn with known standard deviations of seeds, images and the rest, mean 0, and
three intervals are made of each: over seeds and images (`evaluation/crossed_statistics.py`), over seeds alone
(Student's t of the seeds' means, what `compare` had before), and by a percentile bootstrap of seeds and
images. A minute on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks import record
from flatlora_diffusion.evaluation.crossed_statistics import CONFIDENCE, crossed_difference

FILE = Path(__file__).with_suffix(".json")
SIZES = [(seeds, images) for seeds in (2, 3, 5, 10) for images in (10, 64, 110)]
# Standard deviations of seeds, images and the rest: by turns each dominates, or all are alike.
SPREADS = {
    "all alike": (1.0, 1.0, 1.0),
    "seeds": (1.0, 0.1, 1.0),
    "images": (0.1, 1.0, 1.0),
    "both": (1.0, 1.0, 0.1),
    "the rest": (0.05, 0.05, 1.0),
    "the rest alone": (0.0, 0.0, 1.0),
    "as measured": (0.15, 0.35, 1.0),
}
RESAMPLES = 200


def coverage(seeds: int, images: int, spread: tuple[float, float, float], tables: int) -> dict[str, float]:
    """The share of `tables` tables whose interval holds 0, by kind of interval."""
    rng = np.random.default_rng([seeds, images, *(round(100 * value) for value in spread)])
    held = {"crossed": 0, "seeds alone": 0, "bootstrap": 0}
    for number in range(tables):
        parts = [rng.standard_normal(shape) for shape in ((seeds, 1), (1, images), (seeds, images))]
        table = sum(scale * part for scale, part in zip(spread, parts, strict=True))
        assert isinstance(table, np.ndarray)
        found = crossed_difference(table.tolist())
        assert found.low is not None
        assert found.high is not None
        held["crossed"] += found.low <= 0 <= found.high
        means = table.mean(axis=1)
        margin = stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1) * stats.sem(means)
        held["seeds alone"] += abs(means.mean()) <= margin
        if number < tables // 4:  # slow, and far off enough to be seen with fewer
            held["bootstrap"] += _is_in_bootstrap(table, rng)
    return {name: count / (tables // 4 if name == "bootstrap" else tables) for name, count in held.items()}


def _is_in_bootstrap(table: np.ndarray, rng: np.random.Generator) -> bool:
    seeds, images = table.shape
    rows = rng.integers(seeds, size=(RESAMPLES, seeds, 1))
    columns = rng.integers(images, size=(RESAMPLES, 1, images))
    means = table[rows, columns].mean(axis=(1, 2))
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return bool(low <= 0 <= high)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=2000, help="of each kind and size")
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for name, spread in SPREADS.items():
        for seeds, images in SIZES:
            found = coverage(seeds, images, spread, options.tables)
            rows.append({"varies": name, "seeds": seeds, "images": images, **found})
            said = ", ".join(f"{kind} {share:.3f}" for kind, share in found.items())
            print(f"{name}, {seeds} seeds, {images} images: {said}", flush=True)
    record.save(options.out, {"tables": options.tables, "spreads": SPREADS, "rows": rows})


if __name__ == "__main__":
    main()
