"""Files whose strength differs from that in training: the warning, its factor and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya
from lora_layouts import (
    ALPHAS,
    ATTENTION,
    PARTS,
    RANK,
    adapted,
    as_diffusers_loads,
    by_diffusers,
    deltas,
    factors,
    kohya,
    peft,
    saved,
)
from safetensors.torch import load_file
from torch import Tensor

from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.storage.run_dir import LORA_FILE

TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")


def pipeline_of(base: Path, alpha: float, text: tuple[str, ...]) -> Any:
    pipeline = adapted(base, ATTENTION, text)
    for part in PARTS:
        for config in getattr(getattr(pipeline, part), "peft_config", {}).values():
            config.lora_alpha = alpha
    return pipeline


def report(path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["inspect", str(path), "--base", str(base), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def scripts_copy(pipeline: Any, folder: Path) -> Path:
    """The two files of a training script with `--output_kohya_format`; the copy's path."""
    path = by_diffusers(pipeline, folder / LORA_FILE, old_names=True)
    tensors = convert_state_dict_to_kohya(convert_all_state_dict_to_peft(dict(load_file(path))))
    return saved(tensors, folder / "pytorch_lora_weights_kohya.safetensors")


@pytest.mark.parametrize(("alpha", "factor"), [(2 * RANK, "0.5"), (RANK / 2, "2"), (4 * RANK, "0.25"), (RANK, None)])
@pytest.mark.parametrize("text", [(), TEXT], ids=["unet", "text"])
def test_the_kohya_file_of_diffusers_scripts_has_a_wrong_scale(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: tuple[str, ...], alpha: float, factor: str
) -> None:
    path = scripts_copy(pipeline_of(base, alpha, text), tmp_path)
    warnings = report(path, base, capsys)["warnings"]
    if factor is None:
        assert warnings == []
        return
    (warning,) = warnings
    assert warning.startswith("pytorch_lora_weights_kohya.safetensors lost its alpha")
    assert f"{factor} times" in warning
    assert f"`export` {LORA_FILE}" in warning
    (tmp_path / LORA_FILE).unlink()
    (alone,) = report(path, base, capsys)["warnings"]
    assert f"{RANK} / lora_alpha" in alone


@pytest.mark.parametrize("verb", ["import", "export", "resize"])
def test_every_verb_that_reads_a_file_with_a_lost_alpha_warns(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, verb: str
) -> None:
    path = scripts_copy(pipeline_of(base, 2 * RANK, ()), tmp_path)
    assert main([verb, str(path), "--base", str(base)]) == 0
    assert "lost its alpha" in caplog.text


def test_exporting_the_diffusers_file_gives_the_right_scale(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = adapted(base, ATTENTION, TEXT)
    scripts_copy(pipeline, tmp_path)
    output = tmp_path / "mended.safetensors"
    assert main(["export", str(tmp_path / LORA_FILE), "--base", str(base), "--output", str(output)]) == 0
    found = as_diffusers_loads(base, output)
    for name, value in deltas(pipeline).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
    assert report(output, base, capsys)["warnings"] == []


def test_files_with_correct_alphas_give_no_warning(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = factors(adapted(base, ATTENTION, TEXT))

    def with_alphas(alpha: Tensor | None) -> dict[str, Tensor]:
        tensors = {name: value for name, value in kohya(whole).items() if not name.endswith(".alpha")}
        alphas = {name: alpha.clone() for name in kohya(whole) if name.endswith(".alpha") and alpha is not None}
        return tensors | alphas

    for alpha in (torch.tensor(float(RANK)), torch.tensor(RANK + 1), None):
        assert report(saved(with_alphas(alpha), tmp_path / "x.safetensors"), base, capsys)["warnings"] == []


@pytest.mark.parametrize(("alpha", "factor"), [(2 * RANK, "0.5"), (RANK / 4, "4"), (RANK, None)])
def test_the_report_has_the_factor_for_tools_that_ignore_the_metadata(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], alpha: float, factor: str | None
) -> None:
    pipeline = pipeline_of(base, alpha, TEXT)
    path = by_diffusers(pipeline, tmp_path / "x.safetensors", old_names=False)
    notes = {row["tool"]: row["note"] for row in report(path, base, capsys)["tools"]}
    note = f"at {factor} times its strength"
    for tool in ("ComfyUI", "stable-diffusion.cpp", "Draw Things"):
        assert (note in notes[tool]) == (factor is not None), notes[tool]
    for tool in ("AUTOMATIC1111", "SD.Next", "diffusers"):  # they load nothing of it, or read the metadata
        assert "times its strength" not in notes[tool]
    folded = report(saved(peft(factors(pipeline), ALPHAS), tmp_path / "y.safetensors"), base, capsys)
    assert not any("times its strength" in row["note"] for row in folded["tools"])
    assert main(["export", str(path), "--base", str(base)]) == 0
    mended = report(tmp_path / "x_kohya.safetensors", base, capsys)
    assert not any("times its strength" in row["note"] for row in mended["tools"])


def test_settings_beside_a_file_count_as_metadata(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {
        name.replace("unet.", "base_model.model."): value
        for name, value in peft(factors(adapted(base, ATTENTION, ()))).items()
    }
    path = saved(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 2 * RANK}))
    notes = {row["tool"]: row["note"] for row in report(path, base, capsys)["tools"]}
    assert "at 0.5 times its strength" in notes["Draw Things"]
