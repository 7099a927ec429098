"""What goes into the wheel; all else is in pyproject.toml.

In the repository `app/`, `samples/` and `requirements.lock` stand beside the package; installed they stand inside of
it, so that nothing but `flatlora_diffusion` is put into site-packages. `config.shipped` finds them in both places.
"""

from __future__ import annotations

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


setup(
    packages=[*find_packages(include=[f"{PACKAGE}*"]), f"{PACKAGE}.samples"]
    + [f"{PACKAGE}.{name}" for name in find_packages(include=["app*"])],
    package_dir={f"{PACKAGE}.{name}": name for name in ("app", "samples")},
    cmdclass={"build_py": BuildWithLock},
)
