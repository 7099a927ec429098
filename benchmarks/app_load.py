"""How does the app hold up when five people click through it during a training? `python -m benchmarks.app_load`

Seconds per step are the trainer's own, from three windows: without visitors, with five browser sessions that go from
tab to tab and change a setting, and without them again. An event is one click until the page shows what it asked for;
on the Train tab that needs an answer of the app. Prints a table, writes benchmarks/app_load.json, ends in 4 minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gradio_client import Client
from playwright.async_api import Browser, Page, async_playwright, expect

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # where what drives the app stands

from app_driver import RunningApp, browser_path, call_endpoint

LIMIT_SECONDS = 235
RUN = "load"
# What each tab shows once it is in front.
SHOWN = {"1 Dataset": "Load the 23 sample icons", "3 Compare": "Draw", "Runs": "Refresh"}
PAIR, ONE = "both, as a fair pair", "LoRA"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="of each of the three windows")
    parser.add_argument("--sessions", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        app = RunningApp(Path(folder) / "runs")
        try:
            app.start()
            left = LIMIT_SECONDS - (time.monotonic() - started)
            result = asyncio.run(asyncio.wait_for(measure(app, args.sessions, args.seconds), left))
        finally:
            app.close()
    report(result | machine() | {"sessions": args.sessions, "window_seconds": args.seconds}, args.out)


async def measure(app: RunningApp, sessions: int, seconds: float) -> dict[str, Any]:
    """Seconds per step alone and with visitors, and the milliseconds of the visitors' events."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        visitors = [await visitor(browser, app.url) for _ in range(sessions)]
        await asyncio.to_thread(start_training, app.url)
        while len(step_seconds(app.runs)) < 3:
            await asyncio.sleep(0.2)
        before = await window(app.runs, seconds)
        end = time.monotonic() + seconds
        during, *events = await asyncio.gather(window(app.runs, seconds), *(click(one, end) for one in visitors))
        after = await window(app.runs, seconds)
        await browser.close()
    alone, milliseconds = before + after, [value for one in events for value in one]
    return {
        "seconds_per_step_alone": statistics.median(alone),
        "seconds_per_step_with_sessions": statistics.median(during),
        "ratio": statistics.median(during) / statistics.median(alone),
        "steps_alone": len(alone),
        "steps_with_sessions": len(during),
        "event_milliseconds_median": statistics.median(milliseconds),
        "event_milliseconds_p95": statistics.quantiles(milliseconds, n=20)[-1],
        "events": len(milliseconds),
    }


def start_training(url: str) -> None:
    client = Client(url, verbose=False)
    session = call_endpoint(client, "/load_samples", __session="")[0]
    call_endpoint(client, "/start", __session=session, Name=RUN, Train=ONE, Steps="20000", Preview_prompts="")


async def visitor(browser: Browser, url: str) -> Page:
    """A session of its own with the sample icons loaded."""
    page = await (await browser.new_context()).new_page()
    page.set_default_timeout(60_000)
    await page.goto(url)
    await page.get_by_role("button", name=SHOWN["1 Dataset"]).click()
    await expect(page.get_by_text("captions 23/23")).to_be_visible(timeout=60_000)
    return page


async def click(page: Page, end: float) -> list[float]:
    """Milliseconds of each event until `end`."""
    events: list[float] = []
    told = page.get_by_text("for each of LoRA and Flat-LoRA")
    while time.monotonic() < end:
        for tab, button in SHOWN.items():
            started = time.monotonic()
            await page.get_by_role("tab", name=tab).click()
            await expect(page.get_by_role("button", name=button, exact=True)).to_be_visible(timeout=60_000)
            events.append(1000 * (time.monotonic() - started))
        await page.get_by_role("tab", name="2 Train").click()
        for method, count in ((ONE, 0), (PAIR, 1)):
            started = time.monotonic()
            await page.get_by_role("radio", name=method, exact=True).check()
            await expect(told).to_have_count(count, timeout=60_000)
            events.append(1000 * (time.monotonic() - started))
    return events


async def window(runs: Path, seconds: float) -> list[float]:
    """The seconds of each step that ends within the next `seconds`."""
    start = len(step_seconds(runs))
    await asyncio.sleep(seconds)
    return step_seconds(runs)[start:]


def step_seconds(runs: Path) -> list[float]:
    file = runs / RUN / "events.jsonl"
    whole_lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    events = [json.loads(line) for line in whole_lines]
    return [event["seconds"] for event in events if event["event"] == "step"]


def machine() -> dict[str, Any]:
    packages = ("torch", "gradio", "playwright", "diffusers", "peft")
    return {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average_at_end": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def report(result: dict[str, Any], out: Path) -> None:
    print("| | median s/step | steps |\n|---|---|---|")
    print(f"| alone | {result['seconds_per_step_alone']:.4f} | {result['steps_alone']} |")
    sessions = f"{result['sessions']} sessions"
    print(f"| {sessions} | {result['seconds_per_step_with_sessions']:.4f} | {result['steps_with_sessions']} |")
    print(f"ratio {result['ratio']:.3f}; p95 of {result['events']} events {result['event_milliseconds_p95']:.0f} ms")
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
