"""A runs folder of a finished pair, a stopped run and an experiment, with invented losses and samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from made_up_comparison import made_up_comparison, with_pictures
from PIL import Image

from flatlora_diffusion.compare.page.page import write_compare_page
from flatlora_diffusion.config import TrainConfig

OF_EXPERIMENT = "exp/lora/seed-0"


def make_runs(folder: Path) -> None:
    """All as far as the page of the app looks into them."""
    experiment = folder / "exp"
    experiment.mkdir()
    result = with_pictures(made_up_comparison(), experiment)
    write_compare_page(result, experiment)
    (experiment / "compare.json").write_text(json.dumps(result))
    runs = (
        ("seen-lora", "lora", 4),
        ("seen-flat-lora", "flat-lora", 4),
        ("half", "lora", 2),
        (OF_EXPERIMENT, "lora", 4),
    )
    for name, method, steps in runs:
        run = folder / name
        (run / "images").mkdir(parents=True)
        config = TrainConfig.from_dict(
            {"method": method, "max_train_steps": 4, "instance_data_dir": "x", "resolution": 64}
        ).to_dict()
        (run / "config.json").write_text(json.dumps(config | {"pretrained_model_name_or_path": "tiny"}))
        (run / "manifest.json").write_text("[]")
        events: list[dict[str, Any]] = [
            {"event": "step", "step": step, "loss": 0.1 / (1 + step), "seconds": 1.0, "eta": 0.0}
            for step in range(steps)
        ]
        for step in (0, 4):
            Image.effect_noise((64, 64), 50).save(run / "images" / f"step-{step}.png")
            about = {"prompts": ["a fox"], "seeds": [0]}
            events.append({"event": "preview", "step": step, "images": [f"step-{step}.png"], **about})
        events.append({"event": "finished" if steps == 4 else "stopped"})
        (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        if steps == 4:
            (run / "pytorch_lora_weights.safetensors").write_bytes(b"a LoRA")
