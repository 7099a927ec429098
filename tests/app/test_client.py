"""The app's named endpoints, as a program calls them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from app_driver import RunningApp, call_endpoint, open_client
from gradio_client import Client, handle_file
from patience import wait_until
from PIL import Image

from flatlora_diffusion.config import SAMPLES


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("client")
    app = RunningApp(folder / "runs")
    try:
        app.start()
        client = open_client(app.url, folder / "downloads")
        yield client
        client.close()
    finally:
        app.close()


@pytest.mark.long
def test_upload_start_status_and_generate(client: Client) -> None:
    icons = sorted((SAMPLES / "icons_3d").glob("*.png"))[:2]
    files = [handle_file(str(path)) for icon in icons for path in (icon, icon.with_suffix(".txt"))]
    session, _, rejected = call_endpoint(client, "/upload", __session="", __files=files)
    assert rejected == ""
    told = call_endpoint(client, "/summary", __session=session, Train="LoRA", Steps="2")
    assert "2 images, captions 2/2" in told
    assert "2 steps" in told

    small = {"Steps": "2", "Rank": 2, "Batch_size": 1, "Preview_prompts": ""}
    queued = call_endpoint(client, "/start", __session=session, Name="by program", Train="LoRA", **small)
    assert "by-program" in queued
    wait_until(lambda: 'data-state="finished"' in call_endpoint(client, "/live", __chosen=None)[0])

    order = {"Runs": ["by-program"], "Prompts": "a TOK icon of a fox", "Steps": 2}

    def drawn() -> Any:
        grid, _, saved, *_ = call_endpoint(client, "/compare_draw", **order)
        return saved if grid.count("<img ") == 2 else None

    saved = wait_until(drawn)
    with Image.open(saved["value"] if isinstance(saved, dict) else saved) as picture:
        assert picture.format == "PNG"
    assert "by-program" in json.dumps(call_endpoint(client, "/runs", Run=None)[0])
    assert "by-program" in json.dumps(call_endpoint(client, "/run", __run_id="by-program"), default=str)


def test_samples_are_loaded_in_a_session_of_their_own(client: Client) -> None:
    session, told = call_endpoint(client, "/load_samples", __session="")
    other, _ = call_endpoint(client, "/load_samples", __session="")
    assert "23" in call_endpoint(client, "/summary", __session=session, Train="LoRA", Steps="2"), told
    assert session != other


def test_what_is_meant_for_the_page_alone_is_no_endpoint(client: Client) -> None:
    described = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert {name for name in described if name.startswith(("/partial", "/lambda", "/_", "/picked"))} == set()
    assert {"/upload", "/load_samples", "/summary", "/start", "/live", "/stop", "/runs"} <= set(described)


def test_a_start_without_images_says_what_to_do(client: Client) -> None:
    with pytest.raises(Exception, match="no images to train on; upload some first"):
        call_endpoint(client, "/start", __session="", Name="none", Steps="2")
    with pytest.raises(Exception, match="the run has no name; give it one"):
        call_endpoint(client, "/start", __session="", Name=" ", Steps="2")
