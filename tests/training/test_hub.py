"""Uploads and failed uploads; the hub is a server on localhost that records all requests."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import OWNER, FakeHub, fake_hub
from PIL import Image

from flatlora_diffusion.config import ConfigError, RunError, TrainConfig
from flatlora_diffusion.families.sdxl.labels import SDXL_LABELS
from flatlora_diffusion.lora_files.metadata import TrainingSummary
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.training.hub import hub_files, hub_repository, push_to_hub
from flatlora_diffusion.training.model_card import write_model_card

ROOT = Path(__file__).parents[2]
TOKEN = "hf_thisIsASecret123"
LORA = "pytorch_lora_weights.safetensors"
SENT = {LORA, "pytorch_lora_weights_emb.safetensors", "README.md", "images/final-0.png", "images/final-1.png"}
FACTS = TrainingSummary(None, SDXL_LABELS, 2, 1, 2, 0, "TOK", predicts_v=False, zero_terminal_snr=False)
PUSH = """
import json, sys
from pathlib import Path
from flatlora_diffusion.commands.command_line import _run

def push(arguments):
    from flatlora_diffusion.config import TrainConfig
    from flatlora_diffusion.training.hub import push_to_hub
    from flatlora_diffusion.storage.run_dir import RunDir

    config = TrainConfig.from_dict(json.loads(arguments[0]))
    print(push_to_hub(RunDir(Path(config.run.output_dir)), config))

sys.exit(_run(push, sys.argv[1:]))
"""


def finished_run(folder: Path, name: str = "my icons", **settings: str | None) -> tuple[RunDir, TrainConfig]:
    """A finished run's folder, with absolute paths in its settings."""
    run = RunDir(folder / name)
    config = TrainConfig.from_dict(
        {
            "pretrained_model_name_or_path": str(folder / "bases" / "my-sdxl"),
            "instance_data_dir": str(folder / "pictures"),
            "instance_prompt": "a TOK icon",
            "output_dir": str(run.folder),
            "max_train_steps": 2,
            "resolution": 64,
            "seed": 1,
            "push_to_hub": True,
            "hub_token": TOKEN,
            **settings,
        }
    )
    run.start(config.to_dict(), [{"id": "icon-0.png"}, {"id": "icon-1.png"}])
    run.add_event({"event": "finished", "step": 2})
    for place in (".", "checkpoint-1", "earlier-1", "logs", "class_images"):
        (run.folder / place).mkdir(exist_ok=True)
        (run.folder / place / LORA).write_bytes(f"weights in {place}".encode())
    for place in ("logs", "class_images"):
        (run.folder / place / LORA).rename(run.folder / place / "something.bin")
    (run.folder / "pytorch_lora_weights_emb.safetensors").write_bytes(b"embeddings")
    run.images.mkdir()
    for red, picture in enumerate(("final-0.png", "final-1.png", "step-1.png")):
        Image.new("RGB", (8, 8), (red, 0, 0)).save(run.images / picture)
    pictures = [(run.images / f"final-{index}.png", "a TOK icon of a fox") for index in range(2)]
    write_model_card(run, config, pictures, FACTS)
    return run, config


def start(hub: FakeHub, *command: str) -> subprocess.CompletedProcess[str]:
    """The command with `hub` as the hub; large files go over plain HTTP, which the fake server supports."""
    online = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    own = {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_ofTheLogin"}
    environment = {**os.environ, **online, **own}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8")


def push(hub: FakeHub, config: TrainConfig) -> subprocess.CompletedProcess[str]:
    return start(hub, sys.executable, "-c", PUSH, json.dumps(config.to_dict()))


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", params=[None, "icons-club/lighthouse"])
def pushed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[FakeHub, RunDir, str]:
    """The hub after an upload, the run, and its expected repository."""
    run, config = finished_run(tmp_path_factory.mktemp("Größe der Icons"), hub_model_id=request.param)
    before = files_in(run.folder)
    with fake_hub() as hub:
        done = push(hub, config)
    assert done.returncode == 0, done.stderr
    repository = request.param or f"{OWNER}/my-icons"
    assert done.stdout == f"{hub.address}/{repository}\n"
    assert files_in(run.folder) == before
    return hub, run, repository


def test_exactly_the_lora_its_card_and_the_shown_pictures_are_committed(pushed: tuple[FakeHub, RunDir, str]) -> None:
    hub, run, repository = pushed
    assert hub.committed() == {path: (run.folder / path).read_bytes() for path in SENT}
    assert hub.committed()[LORA] == b"weights in ."  # not a checkpoint's
    assert hub.sent_to("/commit/main")[0].path == f"/api/models/{repository}/commit/main"


def test_no_other_file_is_uploaded_or_named(pushed: tuple[FakeHub, RunDir, str]) -> None:
    for request in pushed[0].requests:
        for word in ("checkpoint", "earlier-", "config.json", "events", "manifest", "class_images", "step-1"):
            assert word not in request.text + request.path


def test_the_token_is_in_the_authorization_and_nowhere_else(pushed: tuple[FakeHub, RunDir, str]) -> None:
    hub, run, _ = pushed
    for request in hub.requests:
        others = {name: value for name, value in request.headers.items() if name != "authorization"}
        assert TOKEN not in request.text + request.path + str(others)
    asked = [request for request in hub.requests if request.path.startswith("/api/")]
    assert len(asked) == 4
    assert {request.headers["authorization"] for request in asked} == {f"Bearer {TOKEN}"}  # not the login's
    assert all(TOKEN.encode() not in content for content in files_in(run.folder).values())


def test_no_path_of_this_machine_is_sent(pushed: tuple[FakeHub, RunDir, str]) -> None:
    hub, run, _ = pushed
    for request in hub.requests:
        for path in (run.folder.parent, run.folder.parent.name, Path.home(), ROOT, "bases", "pictures/"):
            assert str(path) not in request.text


def test_a_refused_upload_keeps_the_lora_and_names_a_command_that_works(tmp_path: Path) -> None:
    run, config = finished_run(tmp_path)
    before = files_in(run.folder)
    with fake_hub(status=403) as hub:
        refused = push(hub, config)
    assert refused.returncode == 1
    assert files_in(run.folder) == before
    error = refused.stderr.splitlines()[-1]
    assert error.startswith("error: the upload to my-icons failed: ")
    assert "(403)" in error
    assert str(run.folder) in error
    assert "Traceback" not in refused.stderr
    assert TOKEN not in refused.stderr

    program, *arguments = shlex.split(error.split("to upload it later: ")[1])
    with fake_hub() as hub:
        done = start(hub, str(Path(sys.executable).with_name(program)), *arguments)
    assert done.returncode == 0, done.stderr
    assert set(hub.committed()) == SENT


def test_a_hub_out_of_reach_is_one_sentence(tmp_path: Path) -> None:
    run, config = finished_run(tmp_path)
    with fake_hub() as hub:
        pass  # its port is closed now
    failed = push(hub, config)
    assert failed.returncode == 1
    assert "the upload to my-icons failed: [" in failed.stderr.splitlines()[-1]
    assert "Traceback" not in failed.stderr
    assert (run.folder / LORA).is_file()


def test_offline_mode_is_named(tmp_path: Path) -> None:
    run, config = finished_run(tmp_path)
    with pytest.raises(RunError, match="the upload to my-icons failed: HF_HUB_OFFLINE forbids it"):
        push_to_hub(run, config)


def test_a_picture_that_the_card_does_not_show_is_not_uploaded(tmp_path: Path) -> None:
    run, config = finished_run(tmp_path)
    assert set(hub_files(run)) == SENT
    write_model_card(run, config, [], FACTS)
    assert set(hub_files(run)) == {name for name in SENT if not name.startswith("images/")}


def test_the_file_for_other_tools_is_uploaded_and_a_base_that_lies_there_is_not(tmp_path: Path) -> None:
    run, _ = finished_run(tmp_path)
    for name in ("my-icons.safetensors", "my-sdxl.safetensors", "my-sdxl.json", "my-icons-earlier-1.safetensors"):
        (run.folder / name).write_bytes(b"x")
    assert set(hub_files(run)) == SENT | {"my-icons.safetensors"}


def test_what_web_uis_show_with_the_file_is_uploaded(tmp_path: Path) -> None:
    run, _ = finished_run(tmp_path)
    beside = {"my-icons.json", "my-icons.png"}
    for name in beside:
        (run.folder / name).write_bytes(b"x")
    assert set(hub_files(run)) == SENT, "without the LoRA's own file they are not the run's"
    (run.folder / "my-icons.safetensors").write_bytes(b"x")
    assert set(hub_files(run)) == SENT | beside | {"my-icons.safetensors"}


@pytest.mark.parametrize(
    ("folder", "repository"),
    [
        ("icons", "icons"),
        ("My_icons-2.1", "My_icons-2.1"),
        ("Größe der Ärmel", "Gro-e-der-Armel"),
        ("--..a -- b.git", "a-b"),
        ("图标", "lora"),
        ("x" * 120, "x" * 96),
    ],
)
def test_the_run_folder_s_name_is_adapted_to_the_hub(folder: str, repository: str) -> None:
    config = TrainConfig().replace(output_dir=f"/runs/{folder}/")
    assert hub_repository(config) == repository
    assert hub_repository(config.replace(hub_model_id=repository)) == repository  # valid for the hub's own check


def test_an_adapted_name_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, config = finished_run(tmp_path, name="Ärmel")
    with caplog.at_level("INFO"), pytest.raises(RunError):
        push_to_hub(run, config)
    assert "uploading as Armel: 'Ärmel'" in caplog.text


@pytest.mark.parametrize("name", ["my icons", "a/b/c", "a--b", "Ärmel", "/x", ""])
def test_an_invalid_hub_model_id_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"hub_model_id=.* NAME or OWNER/NAME"):
        hub_repository(TrainConfig().replace(hub_model_id=name))


@pytest.mark.parametrize("token", ["hf_secret\n", " hf_secret", "hf_sécret", ""])
def test_an_invalid_token_is_refused_without_being_shown(token: str) -> None:
    with pytest.raises(ConfigError, match="hub_token has a blank") as refused:
        hub_repository(TrainConfig().replace(hub_token=token))
    assert "cret" not in str(refused.value)
