"""The app as people have it, for browser tests and benchmarks: its process, and its page by roles and labels."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from forked_app import CAN_FORK, ForkedApp
from gradio_client import Client
from patience import HANGS, PATIENCE, wait_until
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Error,
    Locator,
    Page,
    Request,
    TimeoutError as PlaywrightTimeout,
    expect,
    sync_playwright,
)

from app.process.json_file import read_json
from app.process.processes import kill_tree

ROOT = Path(__file__).parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TABS = ("1 Dataset", "2 Train", "3 Compare", "Runs")


def browser_path() -> str | None:
    """The installed Chromium or Chrome, None without one."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def open_browser(path: str) -> Iterator[Browser]:
    """The browser at `path`, without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=PATIENCE)
        try:
            yield browser
        finally:
            browser.close()


class RunningApp:
    """`python -m app ARGUMENTS` as a process of its own, on a free port, with the runs folder `runs`.

    is_program: start Python itself; otherwise the process is a copy of a loaded one where the system can fork.
    script: a program of another folder in place of `-m app`, started there.
    """

    def __init__(self, runs: Path, *arguments: str, is_program: bool = False, script: Path | None = None) -> None:
        self.runs = runs
        self._arguments = arguments
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        self._is_program = is_program or script is not None or not CAN_FORK
        self._script = script
        self._process: subprocess.Popen[str] | ForkedApp | None = None
        self._log = Path(tempfile.mkdtemp()) / "app.log"

    def start(self) -> None:
        """Return once it answers. Raises AssertionError with what it printed when it ends instead."""
        place = ["--runs_dir", str(self.runs), "--port", str(self.port)]
        arguments = [*place, *self._arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if self._is_program:
            program, folder = ["-m", "app"], ROOT
            if self._script is not None:
                program, folder = [self._script.name], self._script.parent
            command = [sys.executable, *program, *arguments]
            with self._log.open("a", encoding="utf-8") as log:
                output: dict[str, Any] = {"stdout": log, "stderr": log, "text": True}
                self._process = subprocess.Popen(command, cwd=folder, env=environment, **output)
        else:
            self._process = ForkedApp(arguments, environment, self._log)
        wait_until(lambda: _answers(self.port), self.is_running, self.printed)

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def printed(self) -> str:
        """All that it has printed, its tracebacks too."""
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""

    @property
    def pid(self) -> int:
        """Of the app's own process, once it is started."""
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        """End the app; trainings go on, as they do for its users."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(HANGS)
            self._process = None

    def kill_trainers(self) -> None:
        """End the trainers at once, as a system without memory does; their supervisors tell of it."""
        for file in self.runs.glob(".app/**/trainer.json"):
            kill_tree(read_json(file))

    def close(self) -> None:
        """End the app and all that it has started."""
        self.stop()
        for file in self.runs.glob(".app/**/supervisor.json"):
            kill_tree(read_json(file))
        self.kill_trainers()
        shutil.rmtree(self._log.parent, ignore_errors=True)


class AppPage:
    """The app in one tab of a browser. `faults`: errors of its console and requests to other machines."""

    def __init__(self, page: Page, url: str, app: RunningApp | None = None) -> None:
        """`app`: that of the page, whose lines `printed` tells."""
        self.page = page
        self.url = url
        self.faults: list[str] = []
        self._app = app
        self.forgive()
        self._is_leaving = False
        page.on("console", self._note_message)
        page.on("pageerror", self._note_error)
        page.on("request", self._note_request)

    def forgive(self) -> None:
        """Forget the faults so far and what the app has printed, as of an app that was gone."""
        self.faults.clear()
        self._before = 0 if self._app is None else len(self._app.printed())

    def printed(self) -> str:
        """What the app has printed since the page was made, or forgiven."""
        return "" if self._app is None else self._app.printed()[self._before :]

    def open(self) -> None:
        """Open the app, also in place of the page that is there."""
        self.go_to(self.url)
        expect(self.page.get_by_role("tab", name=TABS[0])).to_be_visible(timeout=PATIENCE)

    def go_to(self, url: str) -> None:
        """Leave the page that is there, whose requests are cut off by that."""
        self._is_leaving = True
        self.page.goto(url)
        self._is_leaving = False

    def show_tab(self, name: str) -> None:
        """Bring the tab to the front, also from the menu that holds what a narrow page has no room for."""
        tab = self.page.get_by_role("tab", name=name)
        expect(tab.or_(self.button("More tabs").first).filter(visible=True).first).to_be_visible(timeout=PATIENCE)
        if not tab.is_visible():
            self.button("More tabs").first.click()
            tab = self.button(name)
        tab.click()

    def tab_names(self) -> list[str]:
        """Of the page's own tabs, from left to right; the page has to be wide enough for them."""
        return self.page.get_by_role("tablist").first.get_by_role("tab").all_inner_texts()

    def settled_width(self) -> int:
        """What the page is wide in pixels, once it has had time to fit its window."""
        with suppress(PlaywrightTimeout):
            self.page.wait_for_function("document.documentElement.scrollWidth <= innerWidth", timeout=PATIENCE)
        return int(self.page.evaluate("document.documentElement.scrollWidth"))

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True).filter(visible=True)

    def box(self, label: str) -> Locator:
        """The visible field with this label; a label holds its help too, so it is found by its first words.

        A list's label is an attribute of its field.
        """
        named = self.page.get_by_text(label, exact=True)
        field = self.page.locator("label").filter(has=named).filter(visible=True).locator("input, textarea")
        return field.or_(self.page.locator(f'input[aria-label="{label}"]').filter(visible=True)).first

    def fill(self, **values: str) -> None:
        """Write into the fields by label, `_` for a blank."""
        for label, value in values.items():
            write(self.box(label.replace("_", " ")), value)

    def load_samples(self) -> None:
        self.show_tab(TABS[0])
        self.button("Load the 23 sample icons").click()
        expect(self.page.get_by_text("captions 23/23").filter(visible=True).first).to_be_visible(timeout=PATIENCE)

    def start_training(self, name: str, method: str, steps: int, preview: str = "") -> None:
        """On the Train tab, as small as may be but for the number of steps."""
        self.show_tab(TABS[1])
        self.fill(Name=name)
        self.page.get_by_role("radio", name=method, exact=True).check()
        self.fill(Steps=str(steps), Rank="2")
        if not self.box("Batch size").is_visible():
            self.page.locator("#more-settings > button").click()
        self.fill(Batch_size="1", Preview_prompts=preview)
        self.button("Start training").click()
        expect(self.page.get_by_text("Queued:")).to_be_visible(timeout=PATIENCE)

    def card(self, name: str) -> Locator:
        """The run's progress."""
        named = self.page.get_by_text(name, exact=True)
        return self.page.locator("[data-state]").filter(has=named).filter(visible=True)

    def wait_for_state(self, name: str, state: str) -> Locator:
        """The run's card once it says so."""
        card = self.card(name)
        expect(card).to_have_attribute("data-state", state, timeout=PATIENCE)
        return card

    def steps_done(self, name: str) -> int:
        found = re.search(r"step (\d+)", self.card(name).inner_text())
        assert found is not None
        return int(found[1])

    def wait_for_step(self, name: str, step: int) -> int:
        """The run's number of steps once there are `step` of them."""
        fewer = "|".join(map(str, range(step)))
        counted = re.compile(rf"step (?!({fewer})(?!\d))\d")  # what follows may adhere, as in "step 0Cancel"
        expect(self.card(name)).to_contain_text(counted, timeout=PATIENCE)
        return self.steps_done(name)

    def _note_message(self, message: ConsoleMessage) -> None:
        # A request that is cut off because its page leaves is no fault.
        is_cut_off = "signal is aborted" in message.text or (self._is_leaving and "Connection errored" in message.text)
        if os.environ.get("FLATLORA_BROWSER") == "firefox":  # which tells of one as "Error", and where: in Gradio
            is_cut_off |= message.text == "Error" and "/assets/" in str(message.location.get("url", "/assets/"))
        if message.type == "error" and not is_cut_off:
            self.faults.append(f"console: {message.text} ({message.location.get('url')})")

    def _note_error(self, error: Error) -> None:
        self.faults.append(f"script: {error}")

    def _note_request(self, request: Request) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.faults.append(f"request: {request.url}")


def write(field: Locator, value: str) -> None:
    """Write into a field as a person does; in Firefox's boxes for numbers `fill` leaves what is there."""
    if field.get_attribute("type") == "number":
        field.press("ControlOrMeta+a")
        field.press_sequentially(value)
    else:
        field.fill(value)
    field.blur()
    expect(field).to_have_value(value)


def open_client(url: str, downloads: Path) -> Client:
    """A program's way to the app; what is returned as a file is put into `downloads`."""
    return Client(url, verbose=False, download_files=str(downloads), httpx_kwargs={"timeout": HANGS})


def call_endpoint(client: Client, endpoint: str, **values: Any) -> Any:
    """What the endpoint returns. A value is named by its field's label, with `_` for a blank, or by its parameter
    with `__` before it; what is not given keeps the form's own value."""
    described = client.view_api(return_format="dict", print_info=False)["named_endpoints"][endpoint]["parameters"]
    by_label = {item["label"]: item["parameter_name"] for item in described}
    named = {
        name[2:] if name.startswith("__") else by_label[name.replace("_", " ")]: value
        for name, value in values.items()
    }
    return client.predict(**named, api_name=endpoint)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
