"""What a user feels of `paper_variants`: the same LoRA at other strengths and on a base that is not quite its own.

The base is rounded, every linear layer and convolution of the UNet: to int8 and fp8 as `flatness` does, to NF4 by
bitsandbytes. Or a second LoRA, plain and of flat icons, is merged into it before; or it is another checkpoint of the
base, `--other_base`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from benchmarks import record
from benchmarks.paper_variants_bench import AFTER, MANY, Bench, identity, trained
from benchmarks.paper_variants_figures import Result, Row, difference
from benchmarks.paper_variants_plan import Group, Pairs
from flatlora_diffusion.compare.arms import PlannedRun
from flatlora_diffusion.compare.losses import UNGROUPED, LossEvaluator
from flatlora_diffusion.config import ModelConfig
from flatlora_diffusion.flatness.robustness import to_bits
from flatlora_diffusion.lora_files.place import LoraFile
from flatlora_diffusion.lora_tools.merging import merge_into
from flatlora_diffusion.sdxl.pipeline import Sdxl, load_sdxl

STRENGTHS = (0.5, 0.75, 1.0, 1.25, 1.5)
STRONGER = 1.5
Bits = Literal["int8", "fp8", "nf4"]

Felt = dict[str, dict[str, float]]
"""Losses of the reported and of the flat icons, by condition."""


def felt_by_arm(bench: Bench, group: Group, second: Path, base: str, other_base: Path | None) -> dict[str, Any]:
    """Each run in every condition, and the pairs' differences there."""

    def load(name: str = base) -> Sdxl:
        return load_sdxl(ModelConfig(name), record.DEVICE, torch.float32)

    bases = {f"base in {kind}": in_bits(load(), kind) for kind in get_args(Bits)}
    bases["with a second LoRA"] = merged_with(load(), second, base)
    if other_base is not None:
        bases["on another checkpoint of the base"] = load(str(other_base))
    forms = {name: bench.evaluator(AFTER, sdxl) for name, sdxl in bases.items()}
    rows = []
    for planned in bench.planned(group):
        trained(planned)
        rows.append({"arm": planned.arm.key, "seed": planned.seed, "felt": _felt(planned, bench.reported, forms)})
        print(f"{planned.label}: felt", flush=True)
    return {"rows": rows, "felt": _compared(rows, group.pairs)}


def felt_left(bench: Bench, planned: PlannedRun, other_base: Path | None) -> float:
    """How many samples the UNet has still to see of a run that is trained, in passes of one alone."""
    of_strengths = sum(bench.reported.losses_left(planned.lora, at) for at in STRENGTHS)
    forms = len(get_args(Bits)) + 1 + (other_base is not None)
    return MANY * of_strengths * (1 + forms / len(STRENGTHS))


def stressed(bench: Bench, group: Group, base: str) -> list[Row]:
    """Each run as it is, at the strength `STRONGER`, and on the base in NF4."""
    in_nf4 = bench.evaluator(AFTER, in_bits(load_sdxl(ModelConfig(base), record.DEVICE, torch.float32), "nf4"))
    rows = []
    for planned in bench.planned(group):
        trained(planned)
        stronger, nf4 = _losses(bench.reported, planned.lora, STRONGER), _losses(in_nf4, planned.lora, 1.0)
        row = {
            **identity(planned),
            **_losses(bench.reported, planned.lora, 1.0),
            **{"stronger": stronger["report"], "stronger_flat": stronger["flat"]},
            **{"nf4": nf4["report"], "nf4_flat": nf4["flat"]},
        }
        rows.append(row)
        print(f"{planned.label}: {row['report']:.5f}, in NF4 {row['nf4']:.5f}", flush=True)
    return rows


def stress_left(bench: Bench, planned: PlannedRun) -> float:
    """As `felt_left` for `stressed`."""
    return MANY * 1.5 * sum(bench.reported.losses_left(planned.lora, at) for at in (1.0, STRONGER))


@torch.no_grad()
def in_bits(sdxl: Sdxl, kind: Bits) -> Sdxl:
    """The base with its UNet's weights rounded."""
    for module in sdxl.unet.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.copy_(_in_nf4(module.weight) if kind == "nf4" else to_bits(module.weight, kind))
    return sdxl


def _in_nf4(values: Tensor) -> Tensor:
    """4 bits a weight and a scale for each 64 of them (arXiv:2305.14314), as a base is loaded to train on."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(values, quant_type="nf4")
    rounded: Tensor = functional.dequantize_4bit(codes, state)
    return rounded.view_as(values)


def merged_with(sdxl: Sdxl, lora: Path, base: str) -> Sdxl:
    """The base with a LoRA in its weights."""
    merge_into(sdxl.pipeline, [LoraFile(lora)], base, {"unet": torch.float32})
    return sdxl


def _felt(planned: PlannedRun, usual: LossEvaluator, forms: dict[str, LossEvaluator]) -> Felt:
    felt = {f"strength {strength:g}": _losses(usual, planned.lora, strength) for strength in STRENGTHS}
    return felt | {name: _losses(evaluator, planned.lora, 1.0) for name, evaluator in forms.items()}


def _losses(evaluator: LossEvaluator, lora: Path, strength: float) -> dict[str, float]:
    return {name: found[UNGROUPED] for name, found in evaluator.losses(lora, strength).items()}


def _compared(rows: Sequence[dict[str, Any]], pairs: Pairs) -> list[Result]:
    """The pairs' differences in each condition."""
    found = {(row["arm"], row["seed"]): row["felt"] for row in rows}
    results = []
    for arm, against in pairs.items():
        both = [(found[arm, seed], found[against, seed]) for key, seed in found if key == arm]
        conditions = list(both[0][0])
        differences = {
            condition: {
                name: difference([(one[condition][name], other[condition][name]) for one, other in both])
                for name in AFTER
            }
            for condition in conditions
        }
        results.append({"arm": arm, "against": against, "conditions": differences})
    return results
