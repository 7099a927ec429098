"""`flatlora app`, in a checkout `python -m app` too: open the app on this computer."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatlora_diffusion.commands.command_line import quiet_libraries
from flatlora_diffusion.config import ConfigError

from .settings import AppSettings, parse_settings

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI

    from .doors.guard import Guard

GRADIO_SETTINGS = {  # read when gradio is imported
    "GRADIO_ANALYTICS_ENABLED": "False",
    # It would sum up its last ten thousand events anew at each event, for a page that we do not have.
    "GRADIO_ANALYTICS_MAX_EVENTS": "1",
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(2**31),
    "GRADIO_RUN_HISTORY": "False",  # it would keep each call in the browser, upload keys too
}
_LOOK_SECONDS = 0.02  # between two looks at Gradio's queue of events; each waits for half of it
_LOGIN_TEXT = "After five wrong passwords the login waits for up to a quarter of an hour."


def make_guard(settings: AppSettings) -> Guard:
    """The guard of an app with `settings`."""
    from gradio.utils import get_upload_folder  # where Gradio keeps what it serves on its own

    from .doors.guard import Guard

    served = [*settings.served, get_upload_folder()]
    guard = Guard(settings.own_names, list(map(Path, served)), list(map(Path, settings.private)))
    for host in settings.allowed_host:
        guard.admit(host)
    return guard


def launch_options(settings: AppSettings, guard: Guard) -> dict[str, Any]:
    """What `Blocks.launch` gets: who is let in, what is served, how it looks."""
    from .theme import CSS, HEAD, make_theme

    return {
        "server_name": settings.host,
        "server_port": settings.port,
        "auth": settings.login,
        "auth_message": _LOGIN_TEXT,
        "app_kwargs": {"lifespan": _behind(guard)},
        "ssr_mode": False,
        "mcp_server": False,
        "share": settings.share,
        "allowed_paths": settings.served,
        "blocked_paths": settings.private,
        "max_file_size": "1gb",
        "theme": make_theme(),
        "css": CSS,
        "head": HEAD,
        "footer_links": [],
        "enable_monitoring": False,
        "quiet": True,
    }


def _behind(guard: Guard) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    from .doors.guard import Doors

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        """Before the first request. Gradio adds its own layers to those given, so ours is put around them here."""
        app.middleware_stack = None
        app.add_middleware(Doors, guard=guard)
        yield

    return lifespan


@contextmanager
def own_uploads() -> Iterator[None]:
    """Keep what Gradio takes in a folder of this app and this user, which is gone with the app."""
    parent = os.environ.get("GRADIO_TEMP_DIR")
    if parent is not None:
        Path(parent).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="flatlora-", dir=parent, ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder).resolve())
        yield


def queued(page: gr.Blocks) -> gr.Blocks:
    """The page with its queue, which looks for events fifty times a second; a thousand times is 2 % of a core."""
    page.queue(default_concurrency_limit=8)
    page._queue.sleep_when_free = _LOOK_SECONDS
    return page


def serve(settings: AppSettings) -> int:
    """Serve until Ctrl-C or SIGTERM. Returns the exit code. Raises ConfigError for a runs folder that cannot be."""
    from .context import make_context
    from .doors.guard import host_of
    from .ui import build_app

    context, guard = make_context(settings), make_guard(settings)
    context.queue.start()
    page = queued(build_app(context))
    try:
        page.launch(**launch_options(settings, guard), prevent_thread_lock=True)
        if page.share_url:
            guard.admit(host_of(page.share_url))
        print(f"The app is open at {page.local_url}", *([page.share_url] if page.share_url else []), flush=True)
        page.block_thread()
    except OSError as error:
        print(f"error: port {settings.port} cannot be used ({error}); choose another with --port", file=sys.stderr)
        return ConfigError.exit_code
    finally:
        context.queue.close()
    return 0


def main(arguments: Sequence[str]) -> int:
    """Serve until Ctrl-C or SIGTERM. Returns the exit code: 2 for settings that may not be."""
    os.environ |= GRADIO_SETTINGS
    logging.basicConfig(level=logging.INFO)
    quiet_libraries()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that uploads are cleared away
    try:
        settings = parse_settings(arguments, os.environ)
        if find_spec("gradio") is None:
            raise ConfigError('the app needs gradio, which is not installed: pip install "flatlora-diffusion[app]"')
        with own_uploads():
            return serve(settings)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
