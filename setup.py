"""What goes into the wheel; all else is in pyproject.toml.

In the repository `app/`, `samples/` and `requirements.lock` stand beside the package; installed they stand inside of
it, so that nothing but `flatlora_diffusion` is put into site-packages. `config.shipped` finds them in both places.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

PACKAGE = "flatlora_diffusion"
LOCK = "requirements.lock"


class BuildWithLock(build_py):
    """The usual build, and the versions last tested for `flatlora doctor`."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copyfile(LOCK, Path(self.build_lib, PACKAGE, LOCK))


def description() -> str:
    """README.md without pictures, the words below them, and links to what is in the repository alone."""
    kept, is_below_picture = [], False
    for block in Path("README.md").read_text(encoding="utf-8").split("\n\n"):
        has_picture = "![" in block
        if not has_picture and not (is_below_picture and re.match(r"\*[^*]", block)):
            kept.append(block)
        is_below_picture = has_picture
    return re.sub(r"\[([^]]+)\]\((?!https?:)[^)\s]+\)", r"\1", "\n\n".join(kept))


setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=[f"{PACKAGE}*"]), f"{PACKAGE}.samples"]
    + [f"{PACKAGE}.{name}" for name in find_packages(include=["app*"])],
    package_dir={f"{PACKAGE}.{name}": name for name in ("app", "samples")},
    cmdclass={"build_py": BuildWithLock},
)
