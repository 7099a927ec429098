"""What the fork server of `forked_app` loads once for all apps."""

from __future__ import annotations

import os
import tempfile

from app.__main__ import GRADIO_SETTINGS

with tempfile.TemporaryDirectory() as folder:
    # Read when gradio is imported, which makes a folder in the second; a copy gets the environment of its test.
    os.environ |= GRADIO_SETTINGS | {"GRADIO_TEMP_DIR": folder}

    import app.context
    import app.server.before_login
    import app.server.guard
    import app.ui
    import app.widgets.theme  # noqa: F401
