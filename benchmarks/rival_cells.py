"""Does every allowed cell of method, adapter and optimizer train, export and load? `python -m benchmarks.rival_cells`

Each trains two steps on the tiny base that ships, is saved, and is loaded into a stock pipeline on that base, which
must compute what was trained. Prints each and writes benchmarks/rival_cells.json: seconds per step, the effect of the
LoRA on the UNet's output and how far the stock pipeline's is from it, or why the cell is refused. A cell that is there
is not run again: delete the file, or the cell in it, to have it tried anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from benchmarks.record import save
from flatlora_diffusion.config import SAMPLES, TINY, AdapterKind, ConfigError, Method, TrainConfig
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.ground.run_dir import LORA_FILE
from flatlora_diffusion.sdxl.loading import base_path
from flatlora_diffusion.training.beginning.first_weights import first_weights
from flatlora_diffusion.training.checkpoint import start
from flatlora_diffusion.training.saving import save_lora
from flatlora_diffusion.training.state import TrainState, prepare
from flatlora_diffusion.training.trainer import train_step

OUT = Path(__file__).with_suffix(".json")
STEPS = 2
ROUNDING = 1e-3, 1e-5  # of the effect, and of outputs of about 1: what a file in fp32 may miss
LEAST_EFFECT = 1e-3  # with less a file that does nothing would pass
FIRST_GUESS = 0.05  # of prodigy for its step size, of which 1e-6, its own, would come to nothing in two steps

Cell = dict[str, Any]
OPTIMIZERS: dict[str, Cell] = {
    "adamw": {"learning_rate": 0.05},
    "lora+": {"learning_rate": 0.02, "lora_plus_ratio": 4.0},
    "lora-pro": {"learning_rate": 0.05, "optimizer": "lora-pro"},
    "prodigy": {"learning_rate": 1.0, "optimizer": "prodigy"},
    "adafactor": {"learning_rate": 0.05, "optimizer": "adafactor"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cells whose name has this in it")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, Cell] = json.loads(OUT.read_text(encoding="utf-8"))["cells"] if OUT.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        stock = StableDiffusionXLPipeline.from_pretrained(base_path(TINY))
        for name, values in cells():
            if name in found or args.only not in name:
                continue
            found[name] = tried(values, stock, Path(folder) / "run")
            print(name, found[name], flush=True)
            save(OUT, {"steps": STEPS, "cells": found})
    refused = sum("refused" in cell for cell in found.values())
    print(f"{len(found) - refused} cells train, export and load; {refused} are refused; wrong: {wrong(found)}")


def wrong(found: dict[str, Cell]) -> list[str]:
    """The cells whose file does not do what was trained, or that have hardly trained anything."""
    return [
        name
        for name, cell in found.items()
        if "refused" not in cell
        and not (cell["effect"] > LEAST_EFFECT and cell["error"] <= ROUNDING[0] * cell["effect"] + ROUNDING[1])
    ]


def cells() -> Iterable[tuple[str, Cell]]:
    """Every method with every adapter and optimizer, by name."""
    for method, adapter, optimizer in itertools.product(get_args(Method), get_args(AdapterKind), OPTIMIZERS):
        yield f"{method} {adapter} {optimizer}", {"method": method, "adapter": adapter, **OPTIMIZERS[optimizer]}


def tried(values: Cell, stock: Any, out: Path) -> Cell:
    try:
        config = TrainConfig().replace(**values)
    except ConfigError as refused:
        return {"refused": str(refused)}
    is_full = config.adapter.adapter == "full"
    config = config.replace(
        instance_data_dir=str(SAMPLES / "icons_3d"),
        output_dir=str(out),
        rank=1024 if is_full else 2,  # of the file: no layer has more
        max_train_steps=STEPS,
        train_batch_size=1,
        learning_rate=config.optim.learning_rate / (50 if is_full else 1),
        lr_warmup_steps=0,
        sigma_schedule="constant",
        save_dtype="fp32",
        report_to="none",
        seed=0,
    )
    state = prepare(config, load_samples(SAMPLES / "icons_3d").samples[:2])
    if config.optim.optimizer == "prodigy":
        for group in state.optimizer.param_groups:
            group.update(dict.fromkeys(("d", "d0", "d_max"), FIRST_GUESS))
    first_weights(state)
    start(state)
    began = time.perf_counter()
    for step in range(STEPS):
        train_step(state, step)
    seconds = (time.perf_counter() - began) / STEPS
    return {"seconds": round(seconds, 4), **loaded(state, stock, out)}


def loaded(state: TrainState, stock: Any, out: Path) -> Cell:
    """How much the LoRA changes the UNet's output, and how far a stock pipeline with its file is from that."""
    save_lora(state, out, STEPS)
    expected, plain = answer(state.sdxl.unet.eval()), answer(stock.unet)
    stock.load_lora_weights(out / LORA_FILE)
    reached = answer(stock.unet)
    stock.unload_lora_weights()
    effect = float((expected - plain).abs().max())
    return {"effect": effect, "error": float((reached - expected).abs().max())}


@torch.no_grad()
def answer(unet: Any) -> Tensor:
    """The UNet's prediction for fixed inputs."""
    rng = torch.Generator().manual_seed(0)
    config = unet.config
    prompts = torch.randn(1, 77, config.cross_attention_dim, generator=rng)
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    added = {"text_embeds": torch.randn(1, width, generator=rng), "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]])}
    latents = torch.randn(1, 4, 8, 8, generator=rng)
    output: Tensor = unet(latents, torch.tensor([500]), prompts, added_cond_kwargs=added).sample
    return output


if __name__ == "__main__":
    main()
