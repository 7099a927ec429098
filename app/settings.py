"""The app's own settings, from its command line and environment. Unsafe combinations are rejected."""

from __future__ import annotations

import argparse
import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from flatlora_diffusion.config import ConfigError, Section, setting

AUTH_VARIABLE = "FLATLORA_AUTH"
_SITE = re.compile(r"https?://[A-Za-z0-9._-]+(:\d{1,5})?")
_HOST_NAME = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?")
_OWN_NAMES = ("127.0.0.1", "localhost", "[::1]")  # they always mean the computer that the browser is on


@dataclass(frozen=True)
class AppSettings(Section):
    """Where the app keeps its runs and who may open it."""

    runs_dir: str = setting("outputs", "folder for runs; the app serves files from no other folder")
    host: str = setting("127.0.0.1", "address to listen on; addresses that other computers can reach need --auth")
    port: int = setting(7860, "port to listen on", min=1, max=65535)
    auth: str | None = field(
        default=None,
        repr=False,  # so that no log shows it
        metadata={
            "help": f"login as user:password; safer in the environment variable {AUTH_VARIABLE}, which other users of "
            "this computer cannot see",
            "min": None,
            "max": None,
        },
    )
    share: bool = setting(False, "create a public link through Gradio's servers; needs --auth")
    allowed_host: tuple[str, ...] = setting(
        (),
        "host name or address in the browser's address bar, if not that of --host; may be repeated. Required with "
        "--host 0.0.0.0 and behind a proxy",
    )
    behind_proxy: tuple[str, ...] = setting(
        (),
        "address or network of a reverse proxy, such as 127.0.0.1 or 10.0.0.0/8; may be repeated. The app trusts "
        "X-Forwarded-For only from these addresses",
    )
    data_dir: tuple[str, ...] = setting(
        (),
        "folder that trainings started in the browser may read and write, besides uploads, samples and the runs "
        "folder; may be repeated",
    )
    read_only: bool = setting(
        False,
        "only compare, vote on and download the existing runs: no training, measuring, upload, import, change or "
        "deletion; needs no login",
    )
    framing_site: tuple[str, ...] = setting(
        (), "site that may show the app in a frame, such as https://huggingface.co; may be repeated"
    )

    def __post_init__(self) -> None:
        """Raises ConfigError for an invalid login or place, and for a public app without a login."""
        super().__post_init__()
        self._check_login()
        self._check_places()

    def _check_login(self) -> None:
        if self.auth is not None and not all(self.auth.partition(":")[::2]):
            raise ConfigError("auth must be user:password, both not empty")
        if self.share and self.auth is None:
            raise ConfigError(
                f"--share opens the app to everyone with the link; set a login with {AUTH_VARIABLE}=user:password or "
                "--auth"
            )
        if self.auth is None and not self.read_only and not _is_local(self.host):
            raise ConfigError(
                f"host={self.host!r} opens the app to the network; set a login with {AUTH_VARIABLE}=user:password or "
                "--auth, add --read_only, or leave --host out"
            )

    def _check_places(self) -> None:
        for host in self.allowed_host:
            if not _HOST_NAME.fullmatch(host):
                raise ConfigError(
                    f"allowed_host={host!r} must be a name or address with or without a port, such as my-box:7860"
                )
        for site in self.framing_site:
            if not _SITE.fullmatch(site):
                raise ConfigError(
                    f"framing_site={site!r} must be http:// or https:// and a name, such as https://huggingface.co"
                )
        for proxy in self.behind_proxy:
            if not _is_network(proxy):
                raise ConfigError(
                    f"behind_proxy={proxy!r} must be an address or a network, such as 127.0.0.1 or 10.0.0.0/8"
                )
        for folder in self.data_dir:
            if not Path(folder).is_dir():
                raise ConfigError(f"data_dir={folder!r} is not a folder; create it or give another one")

    @property
    def login(self) -> tuple[str, str] | None:
        """(user, password)."""
        if self.auth is None:
            return None
        user, _, password = self.auth.partition(":")
        return user, password

    @property
    def runs_folder(self) -> Path:
        return Path(self.runs_dir)

    @property
    def uploads_folder(self) -> Path:
        return self.runs_folder / ".app" / "uploads"

    @property
    def host_names(self) -> list[str]:
        """The host names that the app always answers to."""
        return [*_OWN_NAMES, f"[{self.host}]" if ":" in self.host else self.host]

    @property
    def served(self) -> list[str]:
        """Folders that the web server may serve: Gradio's `allowed_paths`."""
        return [str(self.runs_folder.resolve())]

    @property
    def private(self) -> list[str]:
        """Folders inside of them that it may not serve: Gradio's `blocked_paths`."""
        return [str((self.runs_folder / name).resolve()) for name in (".app", ".trash")]


class _Parser(argparse.ArgumentParser):
    """Reports errors in one sentence, without the usage line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> AppSettings:
    """Parse the command line. Raises ConfigError for wrong values; exits on --help."""
    parser = _Parser(
        prog="flatlora app",
        description="Train LoRA and Flat-LoRA on your images and compare them in the browser.",
        allow_abbrev=False,
    )
    for item in fields(AppSettings):
        text = item.metadata["help"] + (f" (default: {item.default})" if item.default else "")
        if isinstance(item.default, tuple):
            parser.add_argument(f"--{item.name}", action="append", metavar=item.name.split("_")[1].upper(), help=text)
        elif isinstance(item.default, bool):
            parser.add_argument(f"--{item.name}", action="store_true", default=None, help=text)
        else:
            parser.add_argument(f"--{item.name}", type=int if isinstance(item.default, int) else str, help=text)
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(parser.parse_args(arguments)).items()
        if value is not None
    }
    return AppSettings(**{"auth": environment.get(AUTH_VARIABLE) or None, **given})


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
