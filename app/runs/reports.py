"""The report of the experiment that a run belongs to, as written by `compare` and `make demo`.

The page is rendered again from the experiment's figures, so no HTML from a runs folder reaches the browser. Its frame
runs no scripts, has no origin and sends nothing, in case a figure contains markup.
"""

from __future__ import annotations

from functools import lru_cache
from html import escape
from pathlib import Path

from jinja2 import UndefinedError

from flatlora_diffusion.compare.page.page import PAGE, RESULT, compare_page
from flatlora_diffusion.config import ConfigError

from ..process.json_file import read_json
from .names import folder_of
from .runs import RunStore

_NO_FIGURES = (UndefinedError, LookupError, TypeError, ValueError, AttributeError)  # of another version, or broken
_WHOLE = "download it instead, and open it from there"


def report_of(runs: RunStore, run_id: str) -> Path | None:
    """The folder of the experiment that the run is a part of, if it has a report there."""
    root = runs.folder.resolve()
    for folder in folder_of(runs.folder, run_id).resolve().parents:
        if not folder.is_relative_to(root) or folder == root:
            return None
        if all((folder / name).is_file() and not (folder / name).is_symlink() for name in (PAGE, RESULT)):
            return folder
    return None


def experiment_name(runs: RunStore, folder: Path) -> str:
    """The experiment's path below the runs folder."""
    return folder.relative_to(runs.folder.resolve()).as_posix()


def report_frame(runs: RunStore, folder: Path) -> str:
    """HTML that shows the report. Raises ConfigError if it cannot be rendered."""
    name = experiment_name(runs, folder)
    page = _page(folder, (folder / RESULT).stat().st_mtime_ns)
    if page is None:
        raise ConfigError(f"the report of {name} was made by another version of this program; {_WHOLE}")
    title = f"Report of {escape(name)}"
    return f'<iframe sandbox="" referrerpolicy="no-referrer" title="{title}" srcdoc="{escape(page)}"></iframe>'


@lru_cache(maxsize=4)
def _page(folder: Path, changed: int) -> str | None:
    """The page; None for invalid figures. `changed` is the modification time of the figures."""
    try:
        return compare_page(read_json(folder / RESULT), folder, is_framed=True)
    except _NO_FIGURES:
        return None


def arm_picture(runs: RunStore, run_id: str) -> Path | None:
    """The first picture of the run's arm in the experiment."""
    folder = report_of(runs, run_id)
    if folder is None:
        return None
    arm = folder_of(runs.folder, run_id).resolve().relative_to(folder).parts[0]
    return _pictures(folder, (folder / RESULT).stat().st_mtime_ns).get(arm)


@lru_cache(maxsize=32)
def _pictures(folder: Path, changed: int) -> dict[str, Path]:
    """The first picture of each arm by its key; `changed` is the modification time of the figures."""
    result = read_json(folder / RESULT)
    try:
        keys = {arm["name"]: arm["key"] for arm in result["arms"]}
        columns = zip(result["pictures"]["columns"], result["pictures"]["files"], strict=True)
        found = {keys[name]: (folder / files[0]).resolve() for name, files in columns if name in keys and files[0]}
    except _NO_FIGURES:
        return {}
    return {key: path for key, path in found.items() if path.is_relative_to(folder) and path.is_file()}
