"""The room that a run needs is what its files take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flatlora_diffusion.config import SDXL, ConfigError, TrainConfig
from flatlora_diffusion.memory.disk import class_images_need, disk_need
from flatlora_diffusion.training.trainer import train

RUNS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "fp32 and kohya's copy": {"save_dtype": "fp32", "output_kohya_format": True},
    "an average": {"use_ema": True, "checkpointing_steps": 1},
    "convolutions and text encoders": {"lora_target_modules": "conv", "train_text_encoder": True},
    "Adafactor": {"optimizer": "adafactor"},
    "DoRA": {"use_dora": True},
    "PiSSA": {"adapter": "pissa"},
    "LoRA-GA": {"adapter": "lora-ga", "method": "lora"},
    "AdaLoRA": {"adapter": "adalora", "method": "lora"},
    "full": {"adapter": "full", "method": "lora", "rank": 2},
    "Bi-LoRA": {"method": "bi-lora"},
    "previews": {"validation_prompt": "an icon", "num_validation_images": 1},
}


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    "name",
    [
        "LoRA",
        "an average",
        "full",
        *(pytest.param(name, marks=pytest.mark.long) for name in RUNS if name not in ("LoRA", "an average", "full")),
    ],
)
def test_a_checkpoint_and_a_result_have_the_estimated_size(icons: Path, tmp_path: Path, name: str) -> None:
    """On the base that ships: of one that is smaller still, the files are headers more than weights."""
    config = TrainConfig.from_dict(
        {
            "instance_data_dir": str(icons),
            "output_dir": str(tmp_path / "run"),
            "max_train_steps": 2,
            "checkpointing_steps": 2,
            "train_batch_size": 1,
            "rank": 8,
            "report_to": "none",
            "seed": 0,
            **RUNS[name],
        }
    )
    need, folder = disk_need(config), train(config).parent
    checkpoint = size_of(folder / "checkpoint-2")
    result = size_of(folder) - sum(size_of(checkpoint) for checkpoint in folder.glob("checkpoint-*"))
    assert 0.98 * checkpoint < need.checkpoint < 1.1 * checkpoint
    # AdaLoRA may keep all ranks that it begins with.
    assert 0.98 * result < need.result < (1.3 if name == "AdaLoRA" else 1.1) * result


def test_real_sdxl_is_counted_without_its_weights() -> None:
    """A LoRA of rank 4 on attention layers has 5,806,080 numbers: 23 MB in fp32, thrice, and 12 MB in each file."""
    config = TrainConfig.from_dict({"pretrained_model_name_or_path": SDXL, "sigma": 0.0})
    need = disk_need(config)
    assert need.checkpoint == pytest.approx(3 * 23.2e6 + 2 * 11.6e6, rel=0.05)
    assert need.result == pytest.approx(2 * 11.6e6, rel=0.05)
    merged = disk_need(config.replace(adapter="full", method="lora", sigma=None, mixed_precision="bf16")).result
    assert merged == pytest.approx(2 * (2.567e9 + 0.123e9 + 0.695e9) + 4 * 0.0837e9, rel=0.02)


def test_a_missing_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="lora_target_modules"):
        disk_need(TrainConfig.from_dict({"lora_target_modules": "no_such_layer"}))


def test_only_missing_class_images_need_disk_space(icons: Path, tmp_path: Path) -> None:
    """`icons` has three, with captions."""
    prior = {"with_prior_preservation": True, "class_prompt": "an icon", "num_class_images": 5, "resolution": 100}
    config = TrainConfig.from_dict({**prior, "class_data_dir": str(icons)})
    assert class_images_need(config) == 2 * 16_000
    assert class_images_need(config.replace(num_class_images=2)) == 0
    assert class_images_need(config.replace(class_data_dir=str(tmp_path / "none"))) == 5 * 16_000
    assert class_images_need(config.replace(with_prior_preservation=False)) == 0


def test_the_documented_sizes_are_those_of_the_estimate() -> None:
    sdxl = {"pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0", "rank": 16, "method": "lora"}
    need = disk_need(TrainConfig.from_dict({**sdxl, "mixed_precision": "bf16"}))
    root = Path(__file__).parents[2]
    assert f"The LoRA file has {need.result / 2 / 1e6:.0f} MB" in (root / "README.md").read_text(encoding="utf-8")
    page = " ".join((root / "docs" / "getting_started.md").read_text(encoding="utf-8").split())
    assert f"A checkpoint takes about {round(need.checkpoint / 1e7) * 10} MB" in page
