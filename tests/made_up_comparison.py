"""A made-up result of `compare`, as real ones look: two arms, a null and three seeds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from PIL import Image

from flatlora_diffusion.evaluation.paired_statistics import paired_difference

SEEDS = [42, 43, 44]
ARMS = {"lora": "LoRA", "flat-lora": "Flat-LoRA", "sigma-0": "Flat-LoRA at sigma 0"}
PROMPTS = [
    "a 3D icon of a lighthouse",
    "a 3D icon of a red bicycle leaning on a wall",
    "a 3D icon of a cactus",
    "a 3D icon of a snow globe",
    "a 3D icon of an hourglass",
    "a photo of a cat",
]
_METRICS = [
    ("heldout_loss", "held-out loss", "lower", "Loss on images of the style that no run was trained on.", 5),
    ("clean_train_loss", "clean training loss", "lower", "Loss on the training images, without perturbation.", 5),
    ("forgetting_loss", "forgetting", "lower", "Loss on images of another style.", 5),
    ("seconds_per_step", "seconds per step", "lower", "", 3),
    ("memorization", "memorization", "lower", "1 is a copy of a training image.", 4),
    ("diversity", "diversity", "higher", "0 when all seeds look the same.", 4),
    ("style_change", "change of the style prompts", None, "How much the LoRA does.", 4),
]
_BASE = {"heldout_loss": 0.18344, "clean_train_loss": 0.19012, "forgetting_loss": 0.09811, "diversity": 0.3512}
_LORA = {
    "heldout_loss": [0.15012, 0.14951, 0.15102],
    "clean_train_loss": [0.09211, 0.09154, 0.09302],
    "forgetting_loss": [0.10533, 0.10611, 0.10498],
    "seconds_per_step": [0.412, 0.409, 0.415],
    "memorization": [0.8312, 0.8275, 0.8401],
    "diversity": [0.2911, 0.2884, 0.2955],
    "style_change": [0.1212, 0.1187, 0.1201],
}
_SHIFT = {
    "heldout_loss": [-0.00312, -0.00287, -0.00341],
    "clean_train_loss": [0.00612, 0.00583, 0.00631],
    "forgetting_loss": [-0.00121, 0.00087, -0.00033],
    "seconds_per_step": [0.021, 0.019, 0.022],
    "memorization": [-0.0142, -0.0095, -0.0121],
    "diversity": [0.0101, 0.0042, 0.0133],
    "style_change": [-0.0021, 0.0012, 0.0004],
}


def made_up_comparison() -> dict[str, Any]:
    """The result, without any picture files."""
    lora, flat = _LORA, {key: _moved(key) for key in _LORA}
    values = {"lora": lora, "flat-lora": flat, "sigma-0": lora}
    return {
        "settings": {"sigma": 0.05, "rank": 16, "max_train_steps": 600, "center_crop": False, "resolution": 128},
        "arms": [
            {"key": "lora", "name": "LoRA", "role": "arm", "changes": {}},
            {"key": "flat-lora", "name": "Flat-LoRA", "role": "arm", "changes": {}},
            {"key": "sigma-0", "name": "Flat-LoRA at sigma 0", "role": "null", "changes": {"sigma": 0.0}},
        ],
        "seeds": SEEDS,
        "metrics": [
            dict(zip(("key", "name", "better", "help", "digits"), metric, strict=True)) for metric in _METRICS
        ],
        "base": _BASE,
        "values": {
            arm: {
                str(seed): {key: by_seed[place] for key, by_seed in found.items()} for place, seed in enumerate(SEEDS)
            }
            for arm, found in values.items()
        },
        "trajectories": {arm: {str(seed): _trajectory(arm, seed) for seed in SEEDS} for arm in ("lora", "flat-lora")},
        "groups": {
            group: {
                "base": 0.18 + shift,
                "values": {
                    arm: {str(seed): value + shift for seed, value in zip(SEEDS, found["heldout_loss"], strict=True)}
                    for arm, found in (("lora", lora), ("flat-lora", flat))
                },
            }
            for group, shift in (("animals", 0.004), ("food", -0.006), ("things", 0.001))
        },
        "by_image": {
            "images": [
                {"name": name, "caption": f"a 3D icon of {thing}", "file": f"{name}.png", "looks_like": twin}
                for name, thing, twin in (("fox", "a fox", None), ("owl", "a taxi", None), ("fox-2", "a fox", "fox"))
            ],
            "arms": {
                "lora": {
                    "steps": [0, 300, 600],
                    "images": [_learned("fox", 0.7), _learned("owl", 0.9, "least", 0.31), None],
                },
                "flat-lora": {
                    "steps": [0, 300, 600],
                    "images": [_learned("fox", 0.8), _learned("owl", 0.85, "", 0.31), _learned("fox-2", 0.6)],
                },
            },
        },
        "paired": _pairs(lora, flat),
        "verdict": (
            "Flat-LoRA has the lower held-out loss at equal steps: -0.00313 [-0.00380, -0.00246] over 3 seeds; "
            "on forgetting, no difference found."
        ),
        "proof": [
            _check("base weights", "9f2c41d07a55e6b3" * 4, "One base for all runs."),
            _check("first weights of the LoRA, seed 42", "41aa90c2de7711f0" * 4, ""),
            _check("draws of every step, seed 42", "c0ffee1234567890" * 4, "Images, crops, noise and timesteps."),
        ],
        "nulls": [
            {
                "name": "Flat-LoRA at sigma 0 against LoRA",
                "says": "Must be equal to LoRA bit for bit; it is.",
                "picture_difference": 0.0,
                "weight_difference": 0.0,
            },
            {
                "name": "LoRA with other draws against LoRA",
                "says": "What the order of images and the noise do.",
                "picture_difference": 0.0412,
                "weight_difference": None,
            },
        ],
        "advice": [
            {
                "arm": arm,
                "seed": 42,
                "checkpoint": step,
                "strength": 0.8,
                "over_fit": arm == "lora",
                "why": f"Held-out loss was lowest at step {step}.",
            }
            for arm, step in (("lora", 400), ("flat-lora", 600))
        ],
        "pictures": {"prompts": [], "columns": [], "files": []},
        "strengths": {
            arm: {
                str(strength): {
                    "heldout_loss": at_1 + 0.03 * (strength - 0.9) ** 2,
                    "diversity": 0.35 - 0.06 * strength,
                }
                for strength in (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
            }
            for arm, at_1 in (("lora", 0.1502), ("flat-lora", 0.1471))
        },
        "device": "NVIDIA H100 80GB HBM3",
        "versions": {"flatlora-diffusion": "0.1.0", "torch": "2.13.0"},
    }


def with_one_seed(result: dict[str, Any]) -> dict[str, Any]:
    """The result of the first seed alone, which has no intervals."""
    one = copy.deepcopy(result)
    one["seeds"] = SEEDS[:1]
    for by_seed in (*one["values"].values(), *one["trajectories"].values()):
        for seed in SEEDS[1:]:
            by_seed.pop(str(seed))
    for pair in one["paired"]:
        first = pair["differences"][0]
        pair |= {"differences": [first], "mean": first, "low": None, "high": None, "n": 1, "detectable": None}
    for group in one["groups"].values():
        group["values"] = {arm: {"42": by_seed["42"]} for arm, by_seed in group["values"].items()}
    one["verdict"] = "One seed: a difference of -0.00312, which chance alone may have made."
    return one


def with_pictures(result: dict[str, Any], folder: Path, size: int = 16) -> dict[str, Any]:
    """The result with a picture per prompt and model, saved into `folder`."""
    files = []
    for column, shade in enumerate((120, 170, 220)):
        names = [f"picture-{column}-{row}.png" for row in range(len(PROMPTS))]
        for row, name in enumerate(names):
            Image.new("RGB", (size, size), (shade, 30 * row, 90)).save(folder / name)
        files.append(names)
    return {**result, "pictures": {"prompts": PROMPTS, "columns": ["Base", "LoRA", "Flat-LoRA"], "files": files}}


def _learned(name: str, factor: float, mark: str = "", caption_effect: float = -0.18) -> dict[str, Any]:
    """The losses of an image in an arm."""
    return {
        "name": name,
        "curve": [0.0721, 0.0721 * factor**0.7, 0.0721 * factor],
        "change": factor - 1,
        "mark": mark,
        "caption_effect": caption_effect,
        "has_doubtful_caption": caption_effect > 0,
    }


def _moved(metric: str) -> list[float]:
    return [value + shift for value, shift in zip(_LORA[metric], _SHIFT[metric], strict=True)]


def _pairs(lora: dict[str, list[float]], flat: dict[str, list[float]]) -> list[dict[str, Any]]:
    pairs = [_pair(metric, "flat-lora", "lora", "steps", flat[metric], lora[metric]) for metric in lora]
    later = [value + 0.0009 for value in flat["heldout_loss"]]
    pairs.append(_pair("heldout_loss", "flat-lora", "lora", "seconds", later, lora["heldout_loss"]))
    pairs.append(_pair("heldout_loss", "flat-lora", "lora", "clean loss", lora["heldout_loss"][::-1], later))
    pairs.append(_pair("heldout_loss", "sigma-0", "lora", "steps", lora["heldout_loss"], lora["heldout_loss"]))
    return pairs


def _pair(
    metric: str, arm: str, against: str, matched: str, values: list[float], reference: list[float]
) -> dict[str, Any]:
    found = paired_difference(values, reference)
    return {
        "metric": metric,
        "arm": arm,
        "against": against,
        "matched": matched,
        "differences": list(found.differences),
        "mean": found.mean,
        "low": found.low,
        "high": found.high,
        "n": found.n,
        "detectable": found.detectable,
    }


def _check(what: str, found: str, note: str) -> dict[str, Any]:
    runs = [f"{name}, seed {seed}" for name in ("LoRA", "Flat-LoRA") for seed in SEEDS]
    return {"what": what, "hashes": dict.fromkeys(runs, found), "holds": True, "note": note}


def _trajectory(arm: str, seed: int) -> list[dict[str, float]]:
    """Six checkpoints; drift is measured from the second one on."""
    flat, own = arm == "flat-lora", 0.0007 * (seed - 43)
    points = []
    for step in range(100, 700, 100):
        share = step / 600
        point = {
            "step": step,
            "seconds": step * (0.43 if flat else 0.41),
            "clean_train_loss": 0.19 - (0.091 if flat else 0.098) * share**0.6 + own,
            "heldout_loss": 0.1834 - 0.05 * share**0.5 + (0.012 if flat else 0.016) * share**2 + own,
        }
        if step > 100:
            point["drift"] = 0.02 + 0.03 * share
        points.append(point)
    return points
