"""`flatlora app`, in a checkout `python -m app` too: open the app on this computer."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from flatlora_diffusion.commands.command_line import quiet_libraries
from flatlora_diffusion.config import ConfigError

from .process.temporary_folders import remove_stale_folders, temporary_folder
from .server.login_limit import FREE_TRIES, MAX_PAUSE
from .server.logs import readable_log
from .settings import AppSettings, parse_settings

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse

    from .server.guard import Guard

GRADIO_SETTINGS = {  # read when gradio is imported
    "GRADIO_ANALYTICS_ENABLED": "False",
    # It would sum up its last ten thousand events anew at each event, for a page that we do not have.
    "GRADIO_ANALYTICS_MAX_EVENTS": "1",
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(2**31),
    "GRADIO_RUN_HISTORY": "False",  # it would keep each call in the browser, upload keys too
}
_LOOK_SECONDS = 0.02  # between two looks at Gradio's queue of events; each waits for half of it
_SWEEP_SECONDS = 10 * 60  # between two looks for old uploads
_END_SECONDS = 2  # that answers, and after them handlers, get at the end
_LOGIN_TEXT = f"After {FREE_TRIES} wrong passwords each further try takes longer, up to {MAX_PAUSE} seconds."


def make_guard(settings: AppSettings) -> Guard:
    """The guard of an app with `settings`."""
    from gradio.utils import get_upload_folder  # where Gradio keeps what it serves on its own

    from .server.before_login import is_logged_in
    from .server.guard import Guard
    from .server.upload_limit import UploadLimit

    kept = Path(get_upload_folder())
    guard = Guard(
        settings.host_names,
        [*map(Path, settings.served), kept],
        list(map(Path, settings.private)),
        UploadLimit(kept / "uploads"),
        None if settings.login is None else is_logged_in,
        takes_uploads=not settings.read_only,
    )
    for host in settings.allowed_host:
        guard.allow_host(host)
    for site in settings.framing_site:
        guard.allow_framing(site)
    return guard


def launch_options(settings: AppSettings, guard: Guard) -> dict[str, Any]:
    """The arguments of `Blocks.launch`: address, login, served files and theme."""
    from .widgets.theme import CSS, HEAD, make_theme

    return {
        "server_name": settings.host,
        "server_port": settings.port,
        "auth": settings.login,
        "auth_message": _LOGIN_TEXT,
        "app_kwargs": {
            "lifespan": _guarded_lifespan(guard),
            "openapi_url": None,
            "exception_handlers": {OSError: _error_response},
        },
        "ssr_mode": False,
        "mcp_server": False,
        "share": settings.share,
        "allowed_paths": [*settings.served, str(guard.uploads.folder.parent)],  # there Gradio keeps what it shows
        "blocked_paths": settings.private,
        "max_file_size": "1gb",
        "theme": make_theme(),
        "css": CSS,
        "head": HEAD,
        "footer_links": [],
        "enable_monitoring": False,
        "quiet": True,
    }


def _guarded_lifespan(guard: Guard) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    from .server.guard import GuardMiddleware

    async def sweep() -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            guard.uploads.sweep()

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        """Install the guard before the first request, around the middleware that Gradio has added."""
        app.middleware_stack = None
        app.add_middleware(GuardMiddleware, guard=guard)
        app.uploaded_file_dir = str(guard.uploads.folder)
        sweeping = asyncio.create_task(sweep())
        yield
        sweeping.cancel()

    return lifespan


async def _error_response(request: Request, error: Exception) -> PlainTextResponse:
    """An error outside of the page's events, as of an upload; Gradio shows the text."""
    from starlette.responses import PlainTextResponse

    from .errors import describe_error, is_disk_full

    return PlainTextResponse(f"not done: {describe_error(error)}", 507 if is_disk_full(error) else 500)


@contextmanager
def private_upload_folder() -> Iterator[None]:
    """Let Gradio store uploads in a folder of this app and user, which is removed at the end."""
    parent = Path(os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir())
    remove_stale_folders(parent)
    with temporary_folder(parent) as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(folder)
        yield


def queued(page: gr.Blocks) -> gr.Blocks:
    """The page with its queue, which looks for events fifty times a second; a thousand times is 2 % of a core."""
    page.queue(default_concurrency_limit=8)
    page._queue.sleep_when_free = _LOOK_SECONDS
    return page


def serve(settings: AppSettings) -> int:
    """Serve until Ctrl-C or SIGTERM. Returns the exit code. Raises ConfigError for a runs folder that cannot be."""
    from .context import make_context
    from .server.before_login import hide_endpoints_until_login
    from .server.guard import host_of
    from .ui import build_app
    from .uploads.decoding import return_freed_memory

    return_freed_memory()
    context, guard = make_context(settings), make_guard(settings)
    context.queue.start()
    page = queued(build_app(context))
    if settings.login is not None:
        hide_endpoints_until_login()
    os.environ["FORWARDED_ALLOW_IPS"] = ",".join(settings.behind_proxy)  # uvicorn believes this computer without it
    try:
        page.launch(**launch_options(settings, guard), prevent_thread_lock=True)
        if page.share_url:
            guard.allow_host(host_of(page.share_url))
        print(f"The app is open at {page.local_url}", *([page.share_url] if page.share_url else []), flush=True)
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        _close(page)
    except OSError as error:
        print(f"error: port {settings.port} cannot be used ({error}); choose another with --port", file=sys.stderr)
        return ConfigError.exit_code
    finally:
        context.queue.close()
    return 0


def _close(page: gr.Blocks) -> None:
    """Stop answering. Running requests are cut off after _END_SECONDS, since open pages always send some."""
    from gradio.tunneling import CURRENT_TUNNELS

    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it would tell each as an error
    if page.server is not None:  # it may not have started yet
        page.server.config.timeout_graceful_shutdown = _END_SECONDS
    page.close(verbose=False)
    for tunnel in CURRENT_TUNNELS:
        tunnel.kill()


def main(arguments: Sequence[str]) -> int:
    """Serve until Ctrl-C or SIGTERM. Returns the exit code: 2 for settings that may not be."""
    os.environ |= GRADIO_SETTINGS
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that uploads are cleared away
    code = 0
    with readable_log():
        logging.basicConfig(level=logging.INFO)
        quiet_libraries()
        try:
            settings = parse_settings(arguments, os.environ)
            if find_spec("gradio") is None:
                raise ConfigError(
                    'the app needs gradio, which is not installed: pip install "flatlora-diffusion[app]"'
                )
            with suppress(KeyboardInterrupt), private_upload_folder():
                code = serve(settings)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
    _end(code)


def _end(code: int) -> NoReturn:
    """Remove temporary files and end the process immediately.

    A waiting handler would keep the process alive, and the interpreter's own teardown takes seconds.
    """
    until = time.monotonic() + _END_SECONDS
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, until - time.monotonic()))
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
