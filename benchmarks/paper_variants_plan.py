"""The arms of `paper_variants`, part by part: what each is compared with, and with which seeds.

An arm is named as `compare` names it, so that one that several parts have is trained once. Seeds of the map, of the
trials and of what is reported differ: no arm is reported on the runs that it was chosen by.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SIGMAS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.4)
SCHEDULES = ("cosine", "constant", "down")
MAP_SEED, TRIAL_SEED, FRESH_SEED = 50, 60, 100  # the first of each
CELLS = 4  # of the map that get all seeds: the paper's and those that the search icons like best
SWEEP_SEEDS = 3  # of each rank, number of images and number of steps, and of a preset
RANKS, IMAGES, LENGTHS = (1, 16), (5, 10), (0.5, 2.0)  # beside rank 4, all images, and the steps as they are

Pairs = Mapping[str, str]
"""Each arm and the one that it is paired with."""


@dataclass(frozen=True)
class Group:
    """Arms that are trained with the same seeds, of `images` training images (all: None) and so many times the steps.

    Of a `trial` no more is measured than chooses settings. The settings of a `preset` take the place of the study's,
    but for those that only save memory.
    """

    pairs: Pairs
    seeds: Sequence[int]
    images: int | None = None
    length: float = 1.0
    trial: bool = False
    domain: bool = False
    preset: str | None = None

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys([*self.pairs.values(), *self.pairs]))


def arm(method: str, **changes: Any) -> str:
    """The arm's key."""
    return f"{method}:" + ",".join(f"{name}={value}" for name, value in changes.items()) if changes else method


def changed(key: str, **changes: Any) -> str:
    """An arm with more settings of its own."""
    return f"{key}{',' if ':' in key else ':'}" + ",".join(f"{name}={value}" for name, value in changes.items())


def flat(sigma: float, schedule: str, **changes: Any) -> str:
    return arm("flat-lora", sigma=sigma, sigma_schedule=schedule, **changes)


PAPER = flat(0.1, "cosine")
GIVEN: dict[str, Any] = {
    "sigma": 0.4,
    "sigma_schedule": "constant",
}  # the lead of earlier runs, wherever nothing is chosen
STRONG = arm("flat-lora", **GIVEN)
FULL = flat(0.8, "constant", perturb_draw="full", perturb_norm_every=1)
IID = changed(FULL, perturb_noise="iid")
THIN = flat(0.8, "constant")
EXAMPLE = changed(THIN, perturb_per="example")
EARLY = arm("lora", holdout_images=3, holdout_patience=3)
NOISED = arm("lora", ip_noise_gamma=0.1)
CELL_KEYS = {(schedule, sigma): flat(sigma, schedule) for schedule in SCHEDULES for sigma in SIGMAS}


TWICE = arm("lora", gradient_accumulation_steps=2)
"""LoRA with as many gradients a step as SAM has."""
RADII = [arm("sam", rho=rho) for rho in (0.125, 0.25, 0.5)]
"""Of SAM over W: the largest of three trials was the best, so larger ones are tried, up to the paper's."""


def half(rate: float) -> str:
    """LoRA at half the learning rate."""
    return arm("lora", learning_rate=f"{rate / 2:g}")


def controls(rate: float) -> list[str]:
    """What is simpler than noise in the weights.

    Both decays pull about as hard as the loss does at the end: less would be no control. Early stopping sees three of
    the training images, which are then not trained on.
    """
    return [
        half(rate),
        arm("lora", adam_weight_decay=10),
        arm("lora", delta_weight_decay=3e-5),
        arm("lora", lora_dropout=0.1),
        NOISED,
        arm("lora", use_ema="true", ema_decay=0.98),
        EARLY,
    ]


def control_pairs(rate: float) -> dict[str, str]:
    """All controls and Flat-LoRA against LoRA, and at half the rate flat against plain."""
    flat_at_half = flat(0.4, "constant", learning_rate=f"{rate / 2:g}")
    return {**dict.fromkeys([*controls(rate), STRONG], "lora"), flat_at_half: half(rate)}


DRAW_PAIRS = {IID: "lora", FULL: IID, THIN: FULL, EXAMPLE: THIN}
FELT_PAIRS = {PAPER: "lora", STRONG: "lora"}
PRESET = "quality"
PRESET_PAIRS = dict.fromkeys(("sam", arm("sam", rho_rise=0.1)), "lora")
"""SAM with its default rise, and with a cautious one."""
AGAIN_PAIRS = {STRONG: "lora", EARLY: "lora", NOISED: "lora"}


def sweeps(lora: str, flat_lora: str, fresh: int) -> list[Group]:
    """The two tuned arms where they might differ more, each changed alike, with at most `fresh` seeds."""
    seeds = _few(fresh)
    ranks = [Group({changed(flat_lora, rank=rank): changed(lora, rank=rank)}, seeds) for rank in RANKS]
    images = [Group({flat_lora: lora}, seeds, images=count) for count in IMAGES]
    return [*ranks, *images, *(Group({flat_lora: lora}, seeds, length=length) for length in LENGTHS)]


def preset_group(seeds: int) -> Group:
    """The arms with the settings of `PRESET`, with at most `seeds` seeds."""
    return Group(PRESET_PAIRS, _few(seeds), preset=PRESET)


def _few(seeds: int) -> range:
    return range(FRESH_SEED, FRESH_SEED + min(SWEEP_SEEDS, seeds))


def map_group(options: Namespace) -> Group:
    """All cells."""
    return Group(dict.fromkeys(CELL_KEYS.values(), "lora"), range(MAP_SEED, MAP_SEED + options.map_seeds))
