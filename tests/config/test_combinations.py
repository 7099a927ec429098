"""Valid and invalid combinations of methods, adapters and optimizers; errors come before anything is loaded."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from flatlora_diffusion.config import ADAPTERS, METHODS, ConfigError, TrainConfig
from flatlora_diffusion.config.combinations import check_combinations

# What may be added to each method and adapter.
EXTRAS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "use_dora": {"use_dora": True},
    "use_rslora": {"use_rslora": True},
    "lora_dropout": {"lora_dropout": 0.1},
    "conv": {"lora_target_modules": "conv"},
    "init_lora": {"init_lora": "some.safetensors"},
    "pissa_iterations": {"pissa_iterations": 2},
    "lora_ga_steps": {"lora_ga_steps": 2},
    "sigma": {"sigma": 2.5},
    "rho": {"rho": 0.1},
    "bar_strength": {"bar_strength": 0.5},
    "lora_plus_ratio": {"lora_plus_ratio": 16.0},
    "lora_plus_ratio with prodigy": {"lora_plus_ratio": 16.0, "optimizer": "prodigy"},
    "dropout with use_dora": {"use_dora": True, "lora_dropout": 0.1},
    "text encoders": {"train_text_encoder": True},
    "accumulation in fp16": {"gradient_accumulation_steps": 2, "mixed_precision": "fp16"},
    "quantized": {"quantize_base": "nf4"},
    "block ranks": {"lora_block_ranks": "mid_block=2"},
    "averaged": {"use_ema": True},
    "lora-pro": {"optimizer": "lora-pro"},
    "lora-pro and lora_plus_ratio": {"optimizer": "lora-pro", "lora_plus_ratio": 16.0},
    "lora-pro in 8 bits": {"optimizer": "lora-pro", "use_8bit_adam": True},
}
NO_LORA = {"adalora": ("nbar",), "full": ("nbar", "lora-sam", "bi-lora")}
OF_BOTH = {
    "use_dora",
    "use_rslora",
    "conv",
    "init_lora",
    "dropout with use_dora",
    "text encoders",
    "block ranks",
    "quantized",
    "lora-pro",
}
OF_LORA = {"adalora": OF_BOTH | {"averaged"}, "full": OF_BOTH | {"lora_dropout", "lora_plus_ratio"}}
NEVER = {"lora_plus_ratio with prodigy", "lora-pro and lora_plus_ratio", "lora-pro in 8 bits"}
ADDS_TO_W = {"flat-lora", "sam", "bi-lora"}


def is_refused(method: str, adapter: str, extra: str) -> bool:
    """The cells that make no sense, written down apart from the table in the product."""
    if extra in ("use_dora", "conv", "init_lora") and adapter in ("pissa", "lora-ga"):
        return True
    if extra in ("lora_ga_steps", "pissa_iterations"):
        return adapter != ("pissa" if extra == "pissa_iterations" else "lora-ga")
    if extra == "sigma":
        return method != "flat-lora"
    if extra == "rho":
        return method not in ("lora-sam", "sam", "bi-lora")
    if extra == "bar_strength":
        return method != "nbar"
    if extra == "dropout with use_dora":
        return adapter in ("pissa", "lora-ga") or method in ADDS_TO_W
    return extra in NEVER or (extra == "lora-pro" and method in ("lora-sam", "nbar"))


def test_each_combination_is_valid_or_an_error_of_one_sentence() -> None:
    cells = list(itertools.product(METHODS, ADAPTERS, EXTRAS))
    for method, adapter, extra in cells:
        values = {"method": method, "adapter": adapter, **EXTRAS[extra]}
        is_of_lora = adapter in NO_LORA and (method in NO_LORA[adapter] or extra in OF_LORA[adapter])
        if not (is_of_lora or is_refused(method, adapter, extra)):
            TrainConfig().replace(**values)
            continue
        with pytest.raises(ConfigError) as refused:
            TrainConfig().replace(**values)
        message = str(refused.value)
        assert "--" in message, (method, adapter, extra)
        assert len(message.splitlines()) == 1, message
        assert ". " not in message, message
    assert len(cells) == 6 * 5 * len(EXTRAS)


def test_the_default_config_passes_the_combination_checks() -> None:
    check_combinations(TrainConfig())
