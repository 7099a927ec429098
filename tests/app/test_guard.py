"""Who is let in: names the app answers to, whose pages may ask, how often a password may be guessed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.types import Scope
from starlette.websockets import WebSocket, WebSocketDisconnect

from app.server.guard import Guard, GuardMiddleware
from app.server.login_limit import FORGET_AFTER, FREE_TRIES, MAX_PAUSE, MAX_WAIT, LoginLimit
from app.server.upload_limit import MAX_AGE_SECONDS, UploadLimit
from app.settings import AppSettings, parse_settings
from flatlora_diffusion.config import ConfigError


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limit(clock: Clock) -> LoginLimit:
    return LoginLimit(clock)


def is_logged_in(scope: Scope) -> bool:
    return Headers(scope=scope).get("cookie") != "login=wrong"


@pytest.fixture
def client(tmp_path: Path, limit: LoginLimit) -> Iterator[TestClient]:
    """A small app behind the guard of an app on this computer, with `runs` served but for `runs/.app`."""
    runs = tmp_path / "runs"
    (runs / ".app").mkdir(parents=True)
    for name in ("page.html", "drawing.svg", "grid.png", "notes.txt", ".app/key.txt"):
        (runs / name).write_text("<script>alert(1)</script>")
    (tmp_path / "secret.txt").write_text("secret")
    (runs / "link.png").symlink_to(tmp_path / "secret.txt")
    (runs / "linked").symlink_to(tmp_path)

    def answer(request: Request) -> Response:
        return JSONResponse({"method": request.method})

    async def login(request: Request) -> Response:
        return Response(status_code=200 if (await request.body()) == b"right" else 400)

    def file(request: Request) -> Response:
        path = Path(request.path_params["path"])
        return FileResponse(path, filename=path.name, content_disposition_type="inline")

    async def upload(request: Request) -> Response:
        return Response(str(len(await request.body())))

    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    every = ["GET", "POST", "OPTIONS"]
    routes = [
        Route("/gradio_api/file={path:path}", file),
        Route("/login", login, methods=["POST"]),
        Route("/gradio_api/upload", upload, methods=["POST"]),
        WebSocketRoute("/socket", socket),
        Route("/{path:path}", answer, methods=every),
    ]
    room = UploadLimit(tmp_path / "uploads", most_bytes=100)
    guard = Guard(AppSettings().host_names, [runs], [runs / ".app"], room, is_logged_in)
    guard.logins = limit
    for host in ("my-box", "flat.example.org:8443"):
        guard.allow_host(host)
    app = GuardMiddleware(Starlette(routes=routes), guard)
    with TestClient(app, base_url="http://127.0.0.1:7860", client=("10.0.0.1", 5)) as client:
        yield client


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:7860", "localhost:7860", "LOCALHOST:7860", "[::1]:7860", "localhost", "localhost:9000", "my-box:7860"],
)
def test_it_answers_to_the_names_of_this_computer_and_those_that_were_allowed(client: TestClient, host: str) -> None:
    for path in ("/", "/config", "/gradio_api/queue/join"):
        answer = client.post(path, headers={"Host": host, "Origin": f"http://{host}"})
        assert answer.status_code == 200, path


@pytest.mark.parametrize("site", ["cross-site", "same-site", "nonsense"])
def test_a_fetch_that_tells_no_origin_is_known_by_its_site(client: TestClient, site: str) -> None:
    for mode, dest in (("no-cors", "image"), ("no-cors", "script"), ("navigate", "iframe"), ("cors", "empty")):
        headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": dest}
        assert client.get("/", headers=headers).status_code == 403, (mode, dest)
    link = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert client.get("/", headers=link).status_code == 200  # a link to the app
    assert client.get("/logout", headers=link).status_code == 403
    assert client.post("/", headers=link).status_code == 403


def test_only_a_site_that_was_named_may_show_the_page_in_a_frame(client: TestClient, tmp_path: Path) -> None:
    framed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}
    assert "frame-ancestors 'self'" in client.get("/").headers["content-security-policy"].split("; ")
    guard = Guard(AppSettings().host_names, [tmp_path], [], UploadLimit(tmp_path / "uploads"), takes_uploads=False)
    guard.allow_framing("https://huggingface.co")

    def answer(request: Request) -> Response:
        return JSONResponse({})

    route = Route("/{path:path}", answer, methods=["GET", "POST"])
    with TestClient(GuardMiddleware(Starlette(routes=[route]), guard), base_url="http://127.0.0.1:7860") as other:
        found = other.get("/", headers=framed)
        assert found.status_code == 200
        policy = found.headers["content-security-policy"].split("; ")
        assert "frame-ancestors 'self' https://huggingface.co" in policy  # browsers hold other sites to it
        assert other.get("/config", headers=framed).status_code == 403
        assert other.post("/", headers=framed).status_code == 403
        assert other.post("/gradio_api/upload", content=b"image").status_code == 403
        assert other.post("/gradio_api/queue/join", content=b"{}").status_code == 200


def test_the_page_itself_programs_and_a_page_behind_a_proxy_may_ask(client: TestClient) -> None:
    good: list[dict[str, str]] = [
        {},
        {"Sec-Fetch-Site": "same-origin", "Origin": "http://127.0.0.1:7860"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "https://flat.example.org:8443"},  # the proxy asks for us under our own name
        {"Host": "flat.example.org:8443", "Origin": "https://flat.example.org:8443"},
    ]
    for headers in good:
        assert client.post("/gradio_api/queue/join", headers=headers).status_code == 200, headers


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}])
def test_a_websocket_of_others_is_not_opened(client: TestClient, headers: dict[str, str]) -> None:
    own = {"Host": "127.0.0.1:7860"}
    with client.websocket_connect("/socket", headers=own):
        pass
    with pytest.raises(WebSocketDisconnect) as rejected, client.websocket_connect("/socket", headers=own | headers):
        pass
    assert rejected.value.code == 1008


def test_files_of_the_runs_folder_are_shown_as_pictures_or_saved_but_never_run(
    client: TestClient, tmp_path: Path
) -> None:
    for name in ("page.html", "drawing.svg", "notes.txt"):
        answer = client.get(f"/gradio_api/file={tmp_path}/runs/{name}")
        assert answer.status_code == 200
        assert answer.headers["content-disposition"] == f'attachment; filename="{name}"'
        assert answer.headers["content-security-policy"].endswith("sandbox")
    picture = client.get(f"/gradio_api/file={tmp_path}/runs/grid.png")
    assert picture.headers["content-disposition"].startswith("inline;")
    page = client.get("/")
    assert "frame-ancestors 'self'" in page.headers["content-security-policy"]
    for answer in (picture, page):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize(
    "place",
    [
        "secret.txt",
        "runs/../secret.txt",
        "runs/link.png",
        "runs/linked/secret.txt",
        "runs/.app/key.txt",
        "runs/linked/runs/.app/key.txt",
        "no-such-file.txt",
    ],
)
def test_no_other_file_is_served_and_none_is_told_to_exist(client: TestClient, tmp_path: Path, place: str) -> None:
    path = str(tmp_path / place).replace("..", "%2e%2e")
    answer = client.get(f"/gradio_api/file={path}")
    assert (answer.status_code, answer.text) == (403, "This file is not served.")


def guess(client: TestClient, password: str) -> int:
    return client.post("/login", content=password).status_code


def test_a_right_password_is_let_in_after_any_number_of_wrong_ones(client: TestClient, limit: LoginLimit) -> None:
    assert [guess(client, "wrong") for _ in range(FREE_TRIES)] == [400] * FREE_TRIES
    assert guess(client, "right") == 200  # a second later
    assert limit.seconds_to_wait("10.0.0.1") == 0  # it forgets the wrong ones before it
    assert client.get("/config").status_code == 200


def test_each_further_wrong_password_of_a_client_is_checked_later(clock: Clock, limit: LoginLimit) -> None:
    waits = []
    for _ in range(FREE_TRIES + 8):
        waits.append(limit.seconds_to_wait("10.0.0.1"))
        clock.now += waits[-1]
    assert waits == [0] * FREE_TRIES + [1, 2, 4, 8, 16, MAX_PAUSE, MAX_PAUSE, MAX_PAUSE]
    clock.now += FORGET_AFTER + MAX_PAUSE
    assert limit.seconds_to_wait("10.0.0.1") == 0


def test_guesses_at_once_wait_behind_each_other_and_too_many_are_not_checked(
    client: TestClient, limit: LoginLimit, clock: Clock
) -> None:
    waits = [limit.seconds_to_wait("10.0.0.1") for _ in range(1000)]  # none is answered yet
    assert waits[FREE_TRIES : FREE_TRIES + 5] == [1, 3, 7, 15, 31]
    assert sum(wait <= MAX_WAIT for wait in waits) == FREE_TRIES + 5
    rejected = client.post("/login", content="right")
    assert rejected.status_code == 429
    wait = int(rejected.headers["retry-after"])
    clock.now += wait
    assert limit.seconds_to_wait("10.0.0.1") <= MAX_WAIT


def test_no_client_waits_for_what_another_guesses(limit: LoginLimit) -> None:
    for number in range(1000):
        limit.seconds_to_wait(f"10.0.{number // 250}.{number % 250}")
        limit.seconds_to_wait("10.9.9.9")
    assert limit.seconds_to_wait("10.8.8.8") == 0


def test_a_network_of_ipv6_is_one_client_and_an_ipv4_address_is_one_in_both_spellings(limit: LoginLimit) -> None:
    for number in range(FREE_TRIES):
        assert limit.seconds_to_wait(f"2001:db8::{number:x}") == 0
        assert limit.seconds_to_wait("10.0.0.1" if number % 2 else "::ffff:10.0.0.1") == 0
    assert limit.seconds_to_wait("2001:db8::ffff:1") > 0
    assert limit.seconds_to_wait("::ffff:10.0.0.1") > 0
    assert limit.seconds_to_wait("2001:db8:0:1::1") == 0
    assert limit.seconds_to_wait("::ffff:10.0.0.2") == 0


@pytest.mark.parametrize("name", ["X-Forwarded-Host", "X-Gradio-Server"])
def test_no_header_gives_the_app_another_name(client: TestClient, name: str) -> None:
    start = "http://" if name == "X-Gradio-Server" else ""
    for host in ("evil.example", "127.0.0.1.evil.example", ""):
        assert client.get("/", headers={name: start + host}).status_code == 403, host
    assert client.get("/", headers={name: f"{start}localhost:7860"}).status_code == 200
    assert client.get("/", headers={name: f"{start}flat.example.org:8443"}).status_code == 200  # a proxy's own name
    assert client.get("/", headers={"X-Forwarded-Host": "localhost, evil.example"}).status_code == 403


def test_before_a_login_only_the_login_page_is_answered(client: TestClient) -> None:
    stranger = {"Cookie": "login=wrong"}
    for path in ("/", "/login", "/assets/index.js", "/static/img/logo.svg", "/theme.css", "/manifest.json"):
        assert client.get(path, headers=stranger).status_code in (200, 405), path
    for path in ("/config", "/openapi.json", "/gradio_api/info", "/gradio_api/cancel", "/loginx", "/x/login"):
        for method in ("GET", "POST", "OPTIONS"):
            assert client.request(method, path, headers=stranger).status_code == 401, path
    assert client.get("/config", headers={"Cookie": "login=right"}).status_code == 200


def test_uploads_have_room_together_and_old_ones_make_it(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def upload(size: int) -> int:
        return client.post("/gradio_api/upload", content=b"x" * size).status_code

    folder = tmp_path / "uploads"
    assert upload(100) == 200
    assert upload(101) == 413
    for name, size, age in (("old", 50, 700), ("new", 30, 1)):
        (folder / name).mkdir(parents=True)
        (folder / name / "file.png").write_bytes(b"x" * size)
        os.utime(folder / name / "file.png", (time.time() - age,) * 2)
    assert upload(20) == 200
    assert (folder / "old").exists(), "there was room"
    assert upload(60) == 200
    assert not (folder / "old").exists()
    assert upload(71) == 413
    assert (folder / "new" / "file.png").exists(), "it may be in use"


def test_what_is_still_to_come_counts_and_what_was_broken_off_goes_with_time(tmp_path: Path, clock: Clock) -> None:
    room = UploadLimit(tmp_path, most_bytes=100, clock=clock)
    with room.receive(60) as first:
        assert first is not None
        (tmp_path / "tmpabc").write_bytes(b"x" * 50)
        os.utime(tmp_path / "tmpabc", (clock.now, clock.now))
        first.bytes_left -= 50
        with room.receive(41) as second:
            assert second is None
        with room.receive(40) as third:
            assert third is not None
    clock.now += MAX_AGE_SECONDS - 1
    room.sweep()
    assert (tmp_path / "tmpabc").exists()
    clock.now += 2
    room.sweep()
    assert list(tmp_path.iterdir()) == []


def test_a_request_that_is_no_upload_is_small_and_says_its_length(client: TestClient) -> None:
    for path in ("/gradio_api/queue/join", "/gradio_api/component_server", "/gradio_api/call/upload"):
        assert client.post(path, content=b"x" * 1000).status_code == 200
        assert client.post(path, content=b"", headers={"Content-Length": str(2**26)}).status_code == 413
    for path in ("/gradio_api/queue/join", "/gradio_api/upload"):
        assert client.post(path, content=iter([b"x"])).status_code == 411


def test_hosts_and_folders_are_given_once_or_more(tmp_path: Path) -> None:
    arguments = ["--allowed_host", "a", "--allowed_host", "[fe80::1]:80", "--data_dir", str(tmp_path)]
    settings = parse_settings([*arguments, "--behind_proxy", "10.0.0.0/8", "--behind_proxy", "::1"], {})
    assert settings.behind_proxy == ("10.0.0.0/8", "::1")
    assert (settings.allowed_host, settings.data_dir) == (("a", "[fe80::1]:80"), (str(tmp_path),))
    assert (
        {"127.0.0.1", "localhost", "[::1]"} == set(AppSettings().host_names) == set(AppSettings(host="::1").host_names)
    )
    assert "box" in AppSettings(host="box", auth="a:b").host_names


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"allowed_host": ("https://box",)}, "allowed_host='https://box' must be a name or address"),
        ({"allowed_host": ("*",)}, "must be a name or address"),
        ({"behind_proxy": ("my-proxy",)}, "behind_proxy='my-proxy' must be an address or a network"),
        ({"behind_proxy": ("*",)}, "must be an address or a network"),
        ({"behind_proxy": ("10.0.0.1/8",)}, "must be an address or a network"),
        ({"data_dir": ("no-such-folder",)}, "data_dir='no-such-folder'"),
    ],
)
def test_a_host_or_folder_that_is_none_is_refused_at_the_start(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence.replace("*", r"\*")):
        AppSettings(**values)
