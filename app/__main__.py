"""`python -m app`: open the app on this computer."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from app.settings import AppSettings, parse_settings
from flatlora_diffusion.config import ConfigError


def launch_options(settings: AppSettings) -> dict[str, Any]:
    """What `Blocks.launch` gets: who is let in, what is served, how it looks."""
    from app.theme import CSS, make_theme

    return {
        "server_name": settings.host,
        "server_port": settings.port,
        "auth": settings.login,
        "share": settings.share,
        "allowed_paths": settings.served,
        "blocked_paths": settings.private,
        "max_file_size": "1gb",
        "theme": make_theme(),
        "css": CSS,
        "footer_links": [],
        "enable_monitoring": False,
        "quiet": True,
    }


def main(arguments: Sequence[str]) -> int:
    """Serve until Ctrl-C. Returns the exit code: 2 for settings that may not be."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    logging.basicConfig(level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        settings = parse_settings(arguments, os.environ)
        from app.context import make_context
        from app.ui import build_app

        context = make_context(settings)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    context.queue.start()
    page = build_app(context).queue(default_concurrency_limit=8)
    try:
        page.launch(**launch_options(settings), prevent_thread_lock=True)
        print(f"The app is open at {page.local_url}", *([page.share_url] if page.share_url else []), flush=True)
        page.block_thread()
    except OSError as error:
        print(f"error: port {settings.port} cannot be used ({error}); choose another with --port", file=sys.stderr)
        return 2
    finally:
        context.queue.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
