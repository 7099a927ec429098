"""Hostile requests to the app as people have it, over the network: each kind is tried and none is let through."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import psutil
import pytest
from app_driver import RunningApp, call_endpoint, open_client
from filelock import FileLock
from gradio.routes import App
from gradio_client import Client, handle_file
from gradio_client.utils import Status
from patience import HANGS, wait_until
from PIL import Image

from app.forms.forms import ConfigForm
from app.server.logs import MAX_LINE_LENGTH
from flatlora_diffusion.config import SAMPLES

JOIN = {"data": [None], "fn_index": 0, "session_hash": "abc"}
SECRET = "secret-12345678"


class Target:
    """The running app with a run, a folder that the operator allowed, and one that is nobody's business."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("data/icons", "outside", "runs/mine/images"):
            (root / folder).mkdir(parents=True)
        Image.new("RGB", (32, 32), "red").save(root / "outside/hidden.png")
        (root / "outside/hidden.txt").write_text(SECRET)
        (root / "outside/hidden.safetensors").write_text(SECRET)
        (root / "data/link").symlink_to(root / "outside")
        run = root / "runs/mine"
        (run / "config.json").write_text(json.dumps({"max_train_steps": 1, "method": "lora"}))
        (run / "manifest.json").write_text("[]")
        (run / "events.jsonl").write_text('{"event": "finished", "step": 1}\n')
        for name in ("page.html", "drawing.svg", "page.xhtml", "page.xml"):
            (run / name).write_text(f"<script>alert('{SECRET}')</script>")
        (run / "link.txt").symlink_to(root / "outside/hidden.txt")
        (run / "linked").symlink_to(root / "outside")
        self.app = RunningApp(root / "runs", "--data_dir", str(root / "data"))
        self.app.start()
        self.client = open_client(self.app.url, root / "downloads")
        self.session = str(call_endpoint(self.client, "/load_samples", __session="")[0])

    @property
    def own(self) -> str:
        return f"127.0.0.1:{self.app.port}"

    def ask(self, method: str, path: str, headers: dict[str, str], **body: Any) -> httpx.Response:
        """One request without the headers that a client would add of its own."""
        return httpx.request(method, self.app.url.rstrip("/") + path, headers=headers, timeout=HANGS, **body)

    def start(self, **values: Any) -> str:
        """What a start is answered with these settings, and how it fails: the words for it."""
        labels = {name: ConfigForm().by_name[name].label.replace(" ", "_") for name in values}
        given = {labels[name]: value for name, value in values.items()} | {"Steps": "1"}
        try:
            return str(
                call_endpoint(self.client, "/start", __session=self.session, Name="hostile", Train="LoRA", **given)
            )
        except Exception as error:  # whatever the client makes of it
            return str(error)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    target = Target(tmp_path_factory.mktemp("doors"))
    try:
        yield target
    finally:
        target.client.close()
        target.app.close()


def foreign(headers: dict[str, str], method: str, path: str, **body: Any) -> Callable[[Target], bool]:
    """A request under another's name; let through when it is answered, or when a browser may read the rejection."""

    def attack(target: Target) -> bool:
        url = target.app.url.rstrip("/") + path.replace("RUNS", str(target.root / "runs"))
        with httpx.stream(method, url, headers=headers, timeout=HANGS, **body) as told:  # some answers never end
            return told.status_code < 400 or "access-control-allow-origin" in told.headers

    return attack


def hostile_hosts() -> dict[str, Callable[[Target], bool]]:
    found: dict[str, Callable[[Target], bool]] = {}
    for host in (
        *("evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost.evil.example", "evil-localhost"),
        *("localhost@evil.example", "evil.example#localhost", "127.0.0.1:7860:80", "192.168.0.5:7860"),
    ):
        both = {"Host": host, "Origin": f"http://{host}"}
        found |= {
            f"page of {host}": foreign({"Host": host}, "GET", "/"),
            f"config of {host}": foreign(both, "GET", "/config"),
            f"call of {host}": foreign(both, "POST", "/gradio_api/call/runs", json={"data": [None]}),
            f"join of {host}": foreign(both, "POST", "/gradio_api/queue/join", json=JOIN),
            f"upload of {host}": foreign(both, "POST", "/gradio_api/upload", files={"files": b"x"}),
            f"file of {host}": foreign(both, "GET", "/gradio_api/file=RUNS/mine/config.json"),
            f"preflight of {host}": foreign(
                both | {"Access-Control-Request-Method": "POST"}, "OPTIONS", "/gradio_api/queue/join"
            ),
        }
    return found


def hostile_origins() -> dict[str, Callable[[Target], bool]]:
    found: dict[str, Callable[[Target], bool]] = {}
    for origin in (
        *("http://evil.example", "null", "", "file://", "chrome-extension://abc", "http://127.0.0.1:1"),
        *("http://localhost.evil.example", "http://evil.example@127.0.0.1:7860"),
    ):
        headers = {"Origin": origin}
        found |= {
            f"upload from {origin}": foreign(headers, "POST", "/gradio_api/upload", files={"files": b"x"}),
            f"join from {origin}": foreign(headers, "POST", "/gradio_api/queue/join", json=JOIN),
            f"call from {origin}": foreign(headers, "POST", "/gradio_api/call/runs", json={"data": [None]}),
            f"run from {origin}": foreign(headers, "POST", "/gradio_api/run/runs", json={"data": [None]}),
            f"cancel from {origin}": foreign(
                headers, "POST", "/gradio_api/cancel", json={"session_hash": "a", "fn_index": 0, "event_id": "b"}
            ),
            f"read from {origin}": foreign(headers, "GET", "/config"),
            f"events from {origin}": foreign(headers, "GET", "/gradio_api/heartbeat/abc"),
        }
    for mode, dest in (("no-cors", "image"), ("no-cors", "script"), ("navigate", "iframe")):
        site = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": dest}
        found[f"{dest} of another site"] = foreign(site, "GET", "/gradio_api/file=RUNS/mine/config.json")
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    found["logout by a link"] = foreign(link, "GET", "/logout")
    return found


def hostile_files() -> dict[str, Callable[[Target], bool]]:
    def reads(path: str) -> Callable[[Target], bool]:
        def attack(target: Target) -> bool:
            place = path.replace("ROOT", str(target.root))
            told = raw(target, f"/gradio_api/{place}")
            return " 200 " in told.splitlines()[0] or SECRET in told

        return attack

    def runs(name: str) -> Callable[[Target], bool]:
        def attack(target: Target) -> bool:
            told = target.ask("GET", f"/gradio_api/file={target.root}/runs/mine/{name}", {})
            is_saved = told.headers.get("content-disposition", "").startswith("attachment")
            return not (is_saved and "sandbox" in told.headers.get("content-security-policy", ""))

        return attack

    places = (
        "file=ROOT/outside/hidden.txt",
        "file=ROOT/runs/../outside/hidden.txt",
        "file=ROOT/runs/%2e%2e/outside/hidden.txt",
        "file=ROOT/runs/mine/link.txt",
        "file=ROOT/runs/mine/linked/hidden.txt",
        "file/ROOT/runs/mine/link.txt",
        "file=ROOT/data/link/hidden.txt",
        "file=ROOT/runs/.app/app.db",
        "file=ROOT/runs/mine/../.app/app.db",
        "file=ROOT/runs/.trash/x",
        "file=/etc/passwd",
        "file=/proc/self/environ",
        "file=http://127.0.0.1:1/x",
    )
    names = ("page.html", "drawing.svg", "page.xhtml", "page.xml")
    return {f"read {place}": reads(place) for place in places} | {f"run {name}": runs(name) for name in names}


def hostile_settings() -> dict[str, Callable[[Target], bool]]:
    def starts(name: str, value: str, **more: Any) -> Callable[[Target], bool]:
        def attack(target: Target) -> bool:
            before = sorted((target.root / "outside").iterdir())
            told = target.start(**{name: value.replace("ROOT", str(target.root))}, **more)
            is_refused = "is outside of the folders" in told or "must be a plain name" in told
            return not is_refused or SECRET in told or before != sorted((target.root / "outside").iterdir())

        return attack

    found: dict[str, Callable[[Target], bool]] = {}
    for name in (
        "instance_data_dir", "class_data_dir", "embedding_cache_dir", "cache_dir", "init_lora", "validation_data_dir",
        "validation_prompts_file", "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path",
        "single_file_config",
    ):  # fmt: skip
        for place in ("ROOT/outside", "ROOT/data/../outside/hidden.safetensors", "ROOT/data/link", "/etc/nothing"):
            found[f"{name}={place}"] = starts(name, place)
    for name, value in (("logging_dir", "../../outside"), ("revision", "../../x"), ("variant", "../x")):
        found[f"{name}={value}"] = starts(name, value)
    return found


def hostile_names() -> dict[str, Callable[[Target], bool]]:
    def looks(run_id: str) -> Callable[[Target], bool]:
        def attack(target: Target) -> bool:
            try:
                told = str(call_endpoint(target.client, "/run", __run_id=run_id))
            except Exception as error:
                is_refused = "is not the name of a run" in str(error) or "there is no run" in str(error)
                return not is_refused or "<" in str(error) or SECRET in str(error)
            return bool(told)

        return attack

    def is_queued(name: str) -> Callable[[Target], bool]:
        def attack(target: Target) -> bool:
            values = {"Name": name, "Train": "LoRA", "Steps": "1"}
            try:
                return bool(call_endpoint(target.client, "/start", __session=target.session, **values))
            except Exception as error:
                is_refused = "letters; 60 at most" in str(error) or "which cannot be seen" in str(error)
                return not is_refused or "<" in str(error)

        return attack

    ids = (
        "../outside",
        "mine/../../outside",
        "/etc",
        ".app",
        "mine/linked",
        "<img src=x onerror=alert(1)>",
        "x" * 2000,
    )
    names = ("x" * 2000, "right\u202eleft", "zero\u200bwidth", "mark\u2066ed", "tab\tbed", "nul\x00")
    found = {f"run {run_id[:40]}": looks(run_id) for run_id in ids}
    return found | {f"start {name[:40]!r}": is_queued(name) for name in names}


def raw(target: Target, path: str) -> str:
    """The answer to exactly this path; clients would tidy it up."""
    with socket.create_connection(("127.0.0.1", target.app.port), timeout=HANGS) as link:
        link.sendall(f"GET {path} HTTP/1.1\r\nHost: {target.own}\r\nConnection: close\r\n\r\n".encode())
        parts = []
        while part := link.recv(65536):
            parts.append(part)
    return b"".join(parts).decode("utf-8", errors="replace")


KINDS = {
    "host": hostile_hosts(),
    "origin": hostile_origins(),
    "file": hostile_files(),
    "setting": hostile_settings(),
    "name": hostile_names(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_hostile_request_is_let_through(target: Target, kind: str) -> None:
    assert [name for name, is_let_through in KINDS[kind].items() if is_let_through(target)] == []


def test_it_listens_on_this_computer_alone(target: Target) -> None:
    app = psutil.Process(target.app.pid)
    found = [link for one in (app, *app.children(recursive=True)) for link in one.net_connections("all")]
    listening = {link.laddr for link in found if link.status == psutil.CONN_LISTEN}
    assert ("127.0.0.1", target.app.port) in listening
    assert {address.ip for address in listening} == {"127.0.0.1"}


def test_a_host_that_is_missing_or_given_twice_is_refused(target: Target) -> None:
    for hosts in ("", f"Host: {target.own}\r\nHost: evil.example\r\n"):
        with socket.create_connection(("127.0.0.1", target.app.port), timeout=HANGS) as link:
            link.sendall(f"GET /config HTTP/1.0\r\n{hosts}\r\n".encode())
            assert link.recv(100).split()[1] in (b"400", b"403")


def test_the_page_a_link_to_it_and_programs_are_let_through(target: Target) -> None:
    own = {"Host": target.own, "Origin": f"http://{target.own}", "Sec-Fetch-Site": "same-origin"}
    assert target.ask("GET", "/config", own).json()["run_history"] is False
    assert target.ask("POST", "/gradio_api/upload", own, files={"files": b"x"}).status_code == 200
    local = f"localhost:{target.app.port}"
    assert target.ask("GET", "/config", {"Host": local, "Origin": f"http://{local}"}).status_code == 200
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert target.ask("GET", "/", link).status_code == 200
    assert "mine" in json.dumps(call_endpoint(target.client, "/runs", Run=None)[0])
    icon = str(next((SAMPLES / "icons_3d").glob("*.png")))
    assert call_endpoint(target.client, "/upload", __session="", __files=[handle_file(icon)])[2] == ""


def test_uploads_lie_in_a_folder_of_the_app_and_go_with_it_or_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "temporary"))
    app = RunningApp(tmp_path / "runs")
    try:
        app.start()
        told = httpx.post(f"{app.url}gradio_api/upload", files={"files": ("icon.png", b"x")}, timeout=HANGS)
        (path,) = told.json()
        assert Path(path).is_relative_to(tmp_path / "temporary")
        psutil.Process(app.pid).kill()
        app.stop()
        assert Path(path).exists()
        app.start()
        assert not Path(path).exists()
        app.stop()
        assert list((tmp_path / "temporary").iterdir()) == []
    finally:
        app.close()


def test_an_app_that_is_ended_waits_for_no_page_and_no_handler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "temporary"))
    app = RunningApp(tmp_path / "runs")
    try:
        app.start()
        client = Client(app.url, verbose=False, download_files=str(tmp_path / "downloads"))
        session = str(call_endpoint(client, "/load_samples", __session="")[0])
        heartbeat = httpx.Client(timeout=None)
        with (
            FileLock(app.runs / ".app" / "uploads" / "locks" / session),  # for which the handler waits
            heartbeat.stream("GET", f"{app.url}gradio_api/heartbeat/abc") as page,
        ):
            assert page.status_code == 200
            job = client.submit(session=session, files=[], api_name="/upload")
            while job.status().code != Status.PROCESSING:
                time.sleep(0.1)
            app.stop()  # waits for its end
        assert list((tmp_path / "temporary").iterdir()) == []
        assert "Traceback" not in app.printed()
    finally:
        app.close()


def test_hostile_calls_write_short_lines_and_each_traceback_once(target: Target) -> None:
    before = len(target.app.printed())
    for number in range(60):
        body = {"data": [{"x": "y" * 5000}], "fn_index": number % 3, "session_hash": f"hostile-{number}"}
        target.ask("POST", "/gradio_api/queue/join", {"Host": target.own}, json=body)
    wait_until(lambda: target.app.printed()[before:].count("Error again, ") >= 50)
    told = target.app.printed()[before:]
    assert told.count("Traceback") <= 10
    assert max(map(len, told.splitlines())) <= MAX_LINE_LENGTH + 4


class Locked:
    """An app with a login, and guesses at its password."""

    def __init__(self, runs: Path, *arguments: str) -> None:
        self.app = RunningApp(runs, "--auth", "ann:right", *arguments)
        self.app.start()

    def log_in(self, password: str, said_to_be: str) -> int | None:
        """The status of the answer; None if the app ends meanwhile. said_to_be: for whom a proxy says that it asks."""
        data, headers = {"username": "ann", "password": password}, {"X-Forwarded-For": said_to_be}
        try:
            return httpx.post(f"{self.app.url}login", data=data, headers=headers, timeout=HANGS).status_code
        except httpx.TransportError:
            return None

    def refuses_one_of(self, addresses: list[str]) -> bool:
        """Whether one of as many guesses at once is not checked; others may still wait for their turn after that."""
        pool = ThreadPoolExecutor(len(addresses))
        guesses = [pool.submit(self.log_in, "wrong", address) for address in addresses]
        is_refused = any(guess.result() == 429 for guess in as_completed(guesses))
        pool.shutdown(wait=False)
        return is_refused


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    locked = Locked(tmp_path_factory.mktemp("locked") / "runs")
    yield locked
    locked.app.close()


def test_before_a_login_nothing_is_told_of_the_endpoints(locked: Locked) -> None:
    client = Client(locked.app.url, auth=("ann", "right"), verbose=False)
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    client.close()
    assert "/load_samples" in named
    words = [*(name for name in named if len(name) > 7), "Learning rate", "TOK"]
    paths = set(App.create_app(gr.Blocks()).openapi()["paths"])
    assert {"/", "/config", "/gradio_api/info", "/gradio_api/queue/join", "/gradio_api/cancel"} <= paths
    told = {}
    for path in ["/openapi.json", "/docs", *sorted(paths)]:
        filled = re.sub(r"{[^}]*}", "x", path).lstrip("/")
        for method in ("GET", "POST"):
            answer = httpx.request(method, locked.app.url + filled, json={}, timeout=HANGS)
            told[method, path] = answer.status_code
            assert not [word for word in words if word in answer.text], path
    assert told["GET", "/"] == 200
    inner = {status for (_, path), status in told.items() if path.startswith("/gradio_api") and "startup" not in path}
    assert inner == {401}
    assert told["GET", "/openapi.json"] == told["GET", "/config"] == 401


def test_a_schema_of_the_web_server_is_not_told_after_a_login_either(target: Target) -> None:
    assert target.ask("GET", "/openapi.json", {"Host": target.own}).status_code == 404


def test_a_guesser_with_made_up_addresses_is_one_client_and_the_right_password_is_let_in(locked: Locked) -> None:
    assert locked.log_in("wrong", "10.0.0.1") == 400
    assert locked.log_in("right", "10.0.1.1") == 200
    assert locked.refuses_one_of([f"10.0.{number}.1" for number in range(14)])


def test_behind_a_proxy_that_was_named_clients_do_not_wait_for_each_other(tmp_path: Path) -> None:
    locked = Locked(tmp_path / "runs", "--behind_proxy", "127.0.0.1")
    try:
        assert not locked.refuses_one_of([f"10.9.9.9, 10.0.{number}.1" for number in range(14)])
        assert locked.refuses_one_of([f"10.0.{number}.1, 10.9.9.9" for number in range(14)])
        assert locked.log_in("right", "10.1.1.1") == 200
    finally:
        locked.app.close()
