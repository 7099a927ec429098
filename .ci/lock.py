"""Print the versions in this environment as constraints for pip: `make lock` writes them into requirements.lock.

Neither hashes nor local versions (`+cpu`), so that any system and accelerator can use them; made with the oldest
Python that the program runs with, so that newer ones can too. PyTorch's own packages are comments, which pip does not
read: whoever has put another build of them into the environment keeps it. `make` installs them where it makes one.
"""

from __future__ import annotations

import sys
from datetime import date
from importlib.metadata import distributions

NOTES = ("torch", "torchao", "torchvision")
LEFT_OUT = ("flatlora-diffusion", "pip", "setuptools", "wheel")


def main() -> None:
    found = {
        package.name.lower(): f"{package.name}=={package.version.partition('+')[0]}" for package in distributions()
    }
    print(
        f"# The versions that all tests last ran with, {date.today()}; made by `make lock` (.ci/lock.py). As comments"
    )
    print("# those that pip is not bound to:")
    print(f"# python=={sys.version_info[0]}.{sys.version_info[1]}")
    print("\n".join(f"# {found[name]}" for name in NOTES))
    print("\n".join(found[name] for name in sorted(found) if name not in (*NOTES, *LEFT_OUT)))


if __name__ == "__main__":
    main()
