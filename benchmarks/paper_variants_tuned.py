"""Equal trials for LoRA and Flat-LoRA in `paper_variants`: settings of a quasi-random search, drawn by Optuna.

Both have as many trials. Flat-LoRA's also have to find sigma and its schedule, which is the price of having them.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

from benchmarks.paper_variants_plan import SCHEDULES, TRIAL_SEED, Group, arm

NEED_OPTUNA = {"tuned", "sizes"}
METHODS = ("lora", "flat-lora")
RATES, DROPOUTS, DECAYS, STRENGTHS = (1e-4, 2e-3), (0.0, 0.2), (1e-2, 30.0), (0.05, 1.4)


def check_optuna() -> None:
    """Ends the command where Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise SystemExit(
            f"--parts {' and '.join(sorted(NEED_OPTUNA))} need the package optuna, which draws the trials: "
            "pip install optuna"
        )


def trial_group(method: str, trials: int) -> Group:
    """A method's trials."""
    arms = trial_arms(method, trials)
    return Group(dict.fromkeys(arms, arms[0]), [TRIAL_SEED], trial=True)


def trial_arms(method: str, trials: int) -> list[str]:
    """The arms of a method's trials; the same each time, and all known before the first is trained."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.QMCSampler(
            scramble=True,
            seed=0,
            independent_sampler=optuna.samplers.RandomSampler(seed=0),
            warn_asynchronous_seeding=False,
            warn_independent_sampling=False,
        )
    study = optuna.create_study(sampler=sampler)
    arms = []
    for _ in range(trials):
        trial = study.ask()
        arms.append(arm(method, **_settings(trial, method)))
        study.tell(trial, 0.0)  # the sampler looks at no value
    return arms


def _settings(trial: Any, method: str) -> dict[str, Any]:
    def drawn(name: str, bounds: tuple[float, float], log: bool = True) -> str:
        return f"{trial.suggest_float(name, *bounds, log=log):.2g}"

    settings = {
        "learning_rate": drawn("learning_rate", RATES),
        "lora_dropout": drawn("lora_dropout", DROPOUTS, log=False),
        "adam_weight_decay": drawn("adam_weight_decay", DECAYS),
    }
    if method == "flat-lora":
        settings["sigma"] = drawn("sigma", STRENGTHS)
        settings["sigma_schedule"] = trial.suggest_categorical("sigma_schedule", SCHEDULES)
    return settings
