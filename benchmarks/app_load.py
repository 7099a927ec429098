"""What does the app cost while it trains, and how long is a page waited for? `python -m benchmarks.app_load`

No browser: pages are held open and clicked as a browser does it, over HTTP. Seconds per step are the trainer's own:
without pages, with five open and idle ones (three on Train, one on Compare, one on Flatness), without again, and with
five visitors who each read once a second what a click shows. Prints a table, writes benchmarks/app_load.json, ends in
4 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import psutil
from gradio_client import Client

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # where what drives the app stands

from app_driver import RunningApp, call_endpoint

RUN = "load"
SESSIONS = 5
TICK_SECONDS, READ_SECONDS = 1.5, 1.0  # the app's own timers; a visitor's clicks
WAIT_SECONDS = 90  # for the first steps
TICKING = ("train", "compare", "flatness", "train", "train")
READS = ("runs", "run", "summary", "live")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=25, help="of each of the four windows")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        app = RunningApp(Path(folder) / "runs", is_program=True)
        try:
            app.start()
            result = measure(app, args.seconds)
        finally:
            app.close()
    report(result | machine() | {"sessions": SESSIONS, "window_seconds": args.seconds}, args.out)


def measure(app: RunningApp, seconds: float) -> dict[str, Any]:
    """Seconds per step in each window, milliseconds of the visitors' reads, CPU of the app's process for each tick."""
    pages = [Page(app.url) for _ in range(SESSIONS)]
    start_training(app.url)
    end = time.monotonic() + WAIT_SECONDS
    while len(step_seconds(app.runs)) < 3:
        if time.monotonic() > end:
            raise SystemExit(
                f"error: the training has not taken 3 steps in {WAIT_SECONDS} s; try on a quieter machine"
            )
        time.sleep(0.2)
    server = psutil.Process(app.pid)
    ticks: list[Callable[[], None]] = [page.ticking(tab) for page, tab in zip(pages, TICKING, strict=True)]
    before = window(app.runs, server, seconds, [], 0)
    idle = window(app.runs, server, seconds, ticks, TICK_SECONDS)
    after = window(app.runs, server, seconds, [], 0)
    reading = window(app.runs, server, seconds, [page.reading() for page in pages], READ_SECONDS)
    alone = statistics.median(before["steps"] + after["steps"])
    at_rest = (before["cpu"] + after["cpu"]) / 2
    return {
        "seconds_per_step_alone": alone,
        "seconds_per_step_with_idle_pages": statistics.median(idle["steps"]),
        "seconds_per_step_while_reading": statistics.median(reading["steps"]),
        "ratio_with_idle_pages": statistics.median(idle["steps"]) / alone,
        "ratio_while_reading": statistics.median(reading["steps"]) / alone,
        "read_milliseconds_median": statistics.median(reading["milliseconds"]),
        "read_milliseconds_p95": statistics.quantiles(reading["milliseconds"], n=20)[-1],
        "reads": len(reading["milliseconds"]),
        "server_cpu_milliseconds_per_tick": 1000 * (idle["cpu"] - at_rest) / len(idle["milliseconds"]),
        "server_cpu_milliseconds_per_read": 1000 * (reading["cpu"] - at_rest) / len(reading["milliseconds"]),
        "server_cpu_share_alone": at_rest / seconds,
        "server_cpu_share_with_idle_pages": idle["cpu"] / seconds,
        "steps": {name: len(one["steps"]) for name, one in (("alone", before), ("idle", idle), ("reading", reading))},
    }


class Page:
    """One open page: its session, its fields, and its events, called as the page's own script does."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=120)
        config = self._http.get("config").json()
        self._session = uuid.uuid4().hex
        self._events = config["dependencies"]
        self._values = {one["id"]: one["props"].get("value") for one in config["components"]}
        for one in config["components"]:
            if one["type"] == "textbox" and self._values[one["id"]] is None:
                self._values[one["id"]] = ""
        self._timers = [one["id"] for one in config["components"] if one["type"] == "timer"]

    def ticking(self, tab: str) -> Callable[[], None]:
        """One tick of the timer of a tab."""
        timer = self._timers[("train", "compare", "flatness").index(tab)]
        (event,) = [one for one in self._events if [timer, "tick"] in one["targets"]]
        return lambda: self._call(event)

    def reading(self) -> Callable[[], None]:
        """One read, each time another."""
        events = [next(one for one in self._events if one["api_name"] == name) for name in READS]
        turns = cycle(events)
        return lambda: self._call(next(turns))

    def _call(self, event: dict[str, Any]) -> None:
        """Raises RuntimeError when the app answers with an error."""
        data = [self._values[part] for part in event["inputs"]]
        join = {"data": data, "fn_index": event["id"], "session_hash": self._session, "event_data": None}
        self._http.post("gradio_api/queue/join", json=join).raise_for_status()
        for message in self._messages():
            if message["msg"] == "process_completed":
                if not message["success"]:
                    raise RuntimeError(f"{event['api_name']}: {message['output']}")
                self._take(event["outputs"], message["output"]["data"])
                return

    def _messages(self) -> Iterator[dict[str, Any]]:
        stream = self._http.stream("GET", "gradio_api/queue/data", params={"session_hash": self._session})
        with stream as answer:
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line.removeprefix("data:"))

    def _take(self, outputs: list[int], values: list[Any]) -> None:
        for part, value in zip(outputs, values, strict=True):
            is_update = isinstance(value, dict) and value.get("__type__") == "update"
            if not is_update:
                self._values[part] = value
            elif "value" in value:
                self._values[part] = value["value"]


def start_training(url: str) -> None:
    client = Client(url, verbose=False)
    session = call_endpoint(client, "/load_samples", __session="")[0]
    call_endpoint(client, "/start", __session=session, Name=RUN, Train="LoRA", Steps="20000", Preview_prompts="")


def window(
    runs: Path, server: psutil.Process, seconds: float, visits: list[Callable[[], None]], every: float
) -> dict[str, Any]:
    """Within `seconds`: the seconds of each step that ended, the milliseconds of each visit, the server's of CPU."""
    start, cpu = len(step_seconds(runs)), sum(server.cpu_times()[:2])
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(max(1, len(visits))) as pool:
        waited = [pool.submit(visit_until, end, one, every) for one in visits]
        time.sleep(seconds)
    milliseconds = [value for one in waited for value in one.result()]
    return {
        "steps": step_seconds(runs)[start:],
        "milliseconds": milliseconds,
        "cpu": sum(server.cpu_times()[:2]) - cpu,
    }


def visit_until(end: float, visit: Callable[[], None], every: float) -> list[float]:
    """The milliseconds of each visit."""
    milliseconds = []
    while (started := time.monotonic()) < end - every:
        visit()
        milliseconds.append(1000 * (time.monotonic() - started))
        time.sleep(max(0.0, started + every - time.monotonic()))
    return milliseconds


def step_seconds(runs: Path) -> list[float]:
    file = runs / RUN / "events.jsonl"
    whole_lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    events = [json.loads(line) for line in whole_lines]
    return [event["seconds"] for event in events if event["event"] == "step"]


def machine() -> dict[str, Any]:
    packages = ("torch", "gradio", "diffusers", "peft")
    return {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average_at_end": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def report(result: dict[str, Any], out: Path) -> None:
    print("| | median s/step | times |\n|---|---|---|")
    print(f"| alone | {result['seconds_per_step_alone']:.4f} | 1 |")
    for what, told in (("with_idle_pages", "idle pages"), ("while_reading", "readers")):
        seconds, ratio = result[f"seconds_per_step_{what}"], result[f"ratio_{what}"]
        print(f"| {result['sessions']} {told} | {seconds:.4f} | {ratio:.3f} |")
    print(f"p95 of {result['reads']} reads {result['read_milliseconds_p95']:.0f} ms")
    print(f"the app's process: {result['server_cpu_milliseconds_per_tick']:.1f} ms of CPU for a tick")
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
