"""The layers of the package: a module imports only from lower levels; no module grows past a screenful of screens."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flatlora_diffusion"
LEVELS = [
    {
        "hub_reach",
        "config",
        "seeds",
        "versions",
        "tensor_file",
        "judge",
        "lora_family",
        "paired",
        "matched",
        "palette",
    },
    {"saved_settings", "run_lock"},
    {
        "noise",
        "loss",
        "run_dir",
        "images",
        "views",
        "grid",
        "png_text",
        "sampling",
        "epochs",
        "denoiser",
        "base_family",
        "optimizer",
        "base_model",
        "pictures",
        "safe_reading",
        "chart_svg",
        "surface_page",
        "single_file",
        "vision_input",
        "overfit",
        "buckets",
        "trackers",
    },
    {
        "train_settings",
        "weight_space",
        "adapted_layers",
        "dataset",
        "sdxl",
        "adapter",
        "tokens",
        "stopping",
        "lora_metadata",
        "fingerprint",
        "encoders",
        "captioner",
        "lora_place",
        "charts",
    },
    {"filter_norms", "lora_update", "flatness", "curvature", "surface", "metrics", "chart_rows"},
    {
        "perturbation",
        "generate",
        "training_set",
        "latent_cache",
        "prompts",
        "lora_file",
        "weightless",
        "allocation",
        "perceptual",
        "bilora_icons",
        "kohya",
        "adapter_settings",
        "page_text",
    },
    {"lora_names", "page_results", "page_curves", "page_record"},
    {"lora_keys", "compare_page"},
    {"lora_import"},
    {
        "feed",
        "evaluation",
        "class_images",
        "initial_lora",
        "applied_lora",
        "diffusers_support",
        "lost_alpha",
        "model_card",
        "hub",
        "rehearsal",
        "finished_runs",
        "experiment",
    },
    {"train_state", "memory", "gallery", "merged_lora", "meter", "painter", "proof"},
    {"release", "preview", "robustness", "compare_figures"},
    {
        "checkpoint",
        "result",
        "lora_export",
        "tool_support",
        "flatness_figures",
        "compare_setup",
        "compare_findings",
    },
    {"rescue"},
    {"trainer", "lora_merge", "lora_report", "flatness_tables", "flatness_charts", "compare_nulls"},
    {"compare", "lora_resize", "flatness_report"},
    {"command_line"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
MODULES = sorted(path for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))


def imported(path: Path) -> set[str]:
    """The sibling modules that `path` imports, also inside functions."""
    nodes = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)
    ]
    names = {node.module or "" for node in nodes}
    return {name.removeprefix("flatlora_diffusion.") for name in names if name.startswith("flatlora_diffusion.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_point_down(path: Path) -> None:
    upward = {name for name in imported(path) if LEVEL[name] >= LEVEL[path.stem]}
    assert not upward, f"{path.stem} imports {upward}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_modules_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= (700 if path.stem == "config" else 300)


def test_settings_need_neither_torch_nor_diffusers() -> None:
    for name in ("config", "train_settings", "command_line"):
        tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
        assert not any(module.split(".")[0] in {"torch", "diffusers", "peft", "tyro"} for module in modules)
