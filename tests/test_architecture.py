"""The floors of the package: each imports only from those below; a file holds one idea."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flatlora_diffusion"
# From the ground up. Packages of one floor do not import each other.
FLOORS = [
    {"config"},
    {"storage"},
    {"charts", "families", "method"},
    {"adapter", "other_trainers"},
    {"data", "lora_files"},
    {"lora_tools", "evaluation", "memory"},
    {"gallery", "training", "flatness"},
    {"compare"},
    {"commands"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# The same for the folders of the app and the modules beside them.
APP_FLOORS = [
    {"settings", "errors"},
    {"server", "process"},
    {"runs", "uploads"},
    {"queue"},
    {"context"},
    {"forms"},
    {"widgets"},
    {"dataset", "compare"},
    {"train", "flatness"},
    {"runs_tab"},
    {"ui"},
    {"__main__"},
]
APP_FLOOR = {name: floor for floor, names in enumerate(APP_FLOORS) for name in names}
LINES = 500  # a longer module probably holds a second idea
# Kohya's layout of LoRA files exists for SDXL alone.
KNOW_SDXL = {"flatlora_diffusion/lora_files/kohya.py"}
SDXL_WORDS = (r"\.unet\b", r"pooled", r"add_time_ids", r"time_ids", r"text_encoder_2", r"prompt_embeds")
NAME_PARTS_OF_SDXL = {
    "flatlora_diffusion/config/model.py",  # names the parts of pipelines for all modules
    "flatlora_diffusion/lora_files/kohya.py",  # SDXL's layout
    "flatlora_diffusion/lora_tools/tool_support.py",  # which names of SDXL's layers other tools read
    "flatlora_diffusion/lora_tools/diffusers_support.py",  # the same of diffusers' loader for SDXL
}
OURS = ("flatlora_diffusion", "app")
APP = ROOT / "app"
MODULES = sorted(path for folder in OURS for path in (ROOT / folder).rglob("*.py"))


def package_of(path: Path) -> str:
    """The package that a module of `flatlora_diffusion` stands in; empty for the top."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def imported(path: Path) -> set[str]:
    """Every module that `path` imports, also inside functions; relative imports by their full names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    parents = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            start = parents[: len(parents) - node.level + 1] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def app_part(module: str) -> str:
    """The folder of the app that a module stands in, or the module beside the folders; empty for other modules."""
    return module.split(".")[1] if module.startswith("app.") else ""


def app_arrows() -> set[tuple[str, str, str]]:
    """(part, imported part, which module imports which) of each import between parts of the app."""
    return {
        (part, other, f"{named(path)} imports {module}")
        for path in APP.rglob("*.py")
        if (part := app_part(".".join(path.relative_to(ROOT).with_suffix("").parts))) != "__init__"
        for module in imported(path)
        if (other := app_part(module)) not in ("", part)
    }


def packages_imported(path: Path) -> set[str]:
    parts = [name.split(".") for name in imported(path)]
    return {name[1] for name in parts if name[0] == "flatlora_diffusion" and len(name) > 1} & set(FLOOR)


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_package_names_its_own_modules_in_full() -> None:
    """A relative import would be seen by none of the tests below."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        relative = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level > 0]
        assert not relative, f"{named(path)}: lines {relative}"


def test_every_package_has_its_floor_and_a_word_to_newcomers() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(FLOOR)
    for path in [*PACKAGE.rglob("__init__.py"), *APP.rglob("__init__.py")]:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert text, f"{named(path)} says nothing"
        assert path.parent in (PACKAGE, APP) or "Start with `" in text, f"{named(path)} names no beginning"


def test_imports_point_down() -> None:
    upward = [
        f"{named(path)} imports {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if (mine := package_of(path))  # the top hands through what users import, each on its first use
        for name in sorted(packages_imported(path) - {mine})
        if FLOOR[name] >= FLOOR[mine]
    ]
    assert not upward


def test_every_part_of_the_app_has_its_floor() -> None:
    parts = {app_part(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in APP.rglob("*.py")}
    assert parts - {"__init__"} == set(APP_FLOOR)


def test_imports_in_the_app_point_down() -> None:
    """So no two folders import each other either."""
    assert not sorted(text for part, other, text in app_arrows() if APP_FLOOR[other] >= APP_FLOOR[part])


def test_no_modules_of_the_app_import_each_other_in_a_circle() -> None:
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in APP.rglob("*.py")}
    waiting = {name: imported(path) & set(modules) for name, path in modules.items()}
    while free := {name for name, needed in waiting.items() if not needed & set(waiting)}:
        waiting = {name: needed for name, needed in waiting.items() if name not in free}
    assert not waiting


def test_no_folder_of_the_package_imports_one_that_imports_it() -> None:
    """Sub-folders too: of two folders only one knows the other."""
    arrows = {
        (folder, other): f"{named(path)} imports {module}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if (folder := path.parent) != PACKAGE
        for module in imported(path)
        if (other := folder_of(module)) not in (None, folder, PACKAGE)
    }
    assert not [arrow for (one, other), arrow in arrows.items() if (other, one) in arrows]


def test_no_files_import_each_other_in_a_circle() -> None:
    """Imports inside functions count too."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    arrows = {
        name: {other for other in imported(path) if other in modules and not modules[other].name.startswith("__")}
        for name, path in modules.items()
        if path.name != "__init__.py"
    }
    while leaves := {name for name, others in arrows.items() if not others & arrows.keys()}:
        arrows = {name: others for name, others in arrows.items() if name not in leaves}
    assert not arrows, f"in a circle, or above one: {sorted(arrows)}"


def folder_of(module: str) -> Path | None:
    """The folder of a module of the package, or None for what is no module of it."""
    path = ROOT / module.replace(".", "/")
    return path.parent if module.startswith("flatlora_diffusion.") and path.with_suffix(".py").is_file() else None


def test_modules_stay_small() -> None:
    lengths = {named(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert not {name: lines for name, lines in lengths.items() if lines > LINES}


def test_the_method_knows_no_image_model() -> None:
    for path in (PACKAGE / "method").rglob("*.py"):
        others = {name.split(".")[0] for name in imported(path)}
        assert not others & {"diffusers", "transformers", "accelerate", "PIL", "gradio"}, path.name
        assert packages_imported(path) <= {"config", "storage", "method"}, path.name


def test_what_is_trained_knows_no_base_but_the_names_of_its_parts() -> None:
    for path in (PACKAGE / "adapter").rglob("*.py"):
        assert packages_imported(path) <= {"config", "storage", "method", "adapter"}, path.name


@pytest.mark.parametrize("name", ["lora_files", "lora_tools", "evaluation", "flatness"])
def test_files_and_finished_runs_are_read_without_the_trainer(name: str) -> None:
    for path in (PACKAGE / name).rglob("*.py"):
        assert "training" not in packages_imported(path), path.name


def test_the_app_never_imports_the_trainer() -> None:
    for path in APP.rglob("*.py"):
        assert "flatlora_diffusion.training.trainer" not in imported(path), named(path)


def family_modules() -> set[str]:
    """The packages of single families."""
    return {path.name for path in (PACKAGE / "families").iterdir() if (path / "__init__.py").is_file()}


def test_only_the_registry_knows_the_families_by_name() -> None:
    """`registry.py` names them as text, so that it imports them on first use."""
    found = {
        named(path)
        for path in MODULES
        for module in imported(path)
        for family in family_modules()
        if f"{module}.".startswith(f"flatlora_diffusion.families.{family}.")
        and path.parent != PACKAGE / "families" / family
    }
    assert found == KNOW_SDXL
    text = (PACKAGE / "families" / "registry.py").read_text(encoding="utf-8")
    assert all(f"flatlora_diffusion.families.{family}." in text for family in family_modules())


def test_a_family_s_names_of_models_and_inputs_stay_in_it() -> None:
    foreign = [
        f"{named(path)}: {word}"
        for path in MODULES
        if path.parent.parent != PACKAGE / "families" and named(path) not in NAME_PARTS_OF_SDXL
        for word in SDXL_WORDS
        if re.search(word, path.read_text(encoding="utf-8"))
    ]
    assert not foreign


def test_each_exception_for_names_of_a_family_is_needed() -> None:
    for name in NAME_PARTS_OF_SDXL:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert any(re.search(word, text) for word in SDXL_WORDS), name


def test_no_test_needs_a_benchmark_and_the_product_neither() -> None:
    for folder, foreign in (("tests", {"benchmarks"}), *((name, {"benchmarks", "tests"}) for name in OURS)):
        for path in (ROOT / folder).rglob("*.py"):
            assert not {name.split(".")[0] for name in imported(path)} & foreign, named(path)


def test_settings_need_neither_torch_nor_diffusers() -> None:
    for path in [*(PACKAGE / "config").glob("*.py"), *(PACKAGE / "commands").glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
        assert not any(module.split(".")[0] in {"torch", "diffusers", "peft"} for module in modules)
