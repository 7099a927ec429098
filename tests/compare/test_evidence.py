"""`evidence`: what it takes is told before, its notebook runs, and its figures name nobody."""

from __future__ import annotations

import getpass
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from fp16_on_cpu import FIRST_SCALE, init_with_scaler
from patience import HANGS
from PIL import Image
from safetensors.torch import load_file

from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.commands.train_flags import EVIDENCE, parse_comparison
from flatlora_diffusion.compare import evidence
from flatlora_diffusion.compare.arms import run_folder
from flatlora_diffusion.compare.evidence_check import COLUMNS, KEYS, MAX_BYTES, SCHEMA, read_evidence, report_row
from flatlora_diffusion.compare.evidence_defaults import BASE_FLAGS, DEFAULTS, ENCODERS, PARTS, Part
from flatlora_diffusion.compare.forecast import Forecast
from flatlora_diffusion.compare.rehearsal import disk_bytes, phases, rehearsal_lines
from flatlora_diffusion.config import CompareConfig, ConfigError, EvidenceConfig, TrainConfig
from flatlora_diffusion.memory.estimate import GIB, in_gib
from flatlora_diffusion.storage.hashing import base_fingerprint
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.storage.versions import PROGRAM, __version__

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "evidence.ipynb"
FP16_START = ROOT / "tests" / "fp16_start"
STEPS = 10  # of the notebook's runs, several of which overflow


def arguments(base: Path, icons: Path, tmp_path: Path) -> list[str]:
    """A comparison of two steps on the tiny random base."""
    heldout = tmp_path / "Jane Doe's pictures"
    heldout.mkdir()
    Image.new("RGB", (40, 40), "red").save(heldout / "passport.png")
    (heldout / "passport.txt").write_text("an icon of Jane")
    flags = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": icons,
        "instance_prompt": "an icon of Jane",
        "heldout_dir": heldout,
        "output_dir": tmp_path / "janes_run",
        "output_name": "jane",
        "resolution": 32,
        "max_train_steps": 2,
        "num_checkpoints": 1,
        "num_prompts": 1,
        "pictures_per_prompt": 1,
        "encoders": "judge",
        "report_to": "none",
    }
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


@pytest.mark.long
def test_the_notebook_runs_from_top_to_bottom_in_fp16(
    base: Path, icons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a T4, with a base of variant fp16, a loss scale at which the first step overflows, and Colab's logging."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FP16_START), os.environ["PYTHONPATH"]]))
    monkeypatch.setenv(FIRST_SCALE, str(2.0**26))
    halves = base_in_halves(base, tmp_path / "base")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    own = [*arguments(halves, icons, tmp_path), "--variant", "fp16", "--max_train_steps", str(STEPS)]
    own += ["--arms", "lora", "flat-lora", "--no_controls", "--gpu", "t4", "--mixed_precision", "fp16"]
    own += ["--cache_latents", "--gradient_checkpointing", "--selfcheck", "always"]
    parameters.source += f"\nARGUMENTS = {own!r}\nimport logging\nlogging.basicConfig()"
    NotebookClient(notebook, timeout=int(HANGS), resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    for text in ("GPU memory", "Part 1 of 1", "Measured: ", f"{STEPS}/{STEPS}"):
        assert text in printed, text
    assert printed.splitlines()[-1].startswith("| ")
    folder = tmp_path / "janes_run"
    content = read_evidence(folder / evidence.FILE)
    assert {run["arm"] for run in content["runs"]} == {"lora", "flat-lora"}
    assert content["settings"]["mixed_precision"] == "fp16"
    assert content["settings"]["offload"]
    unet = UNet2DConditionModel.from_pretrained(halves / "unet", variant="fp16", dtype=torch.float16)
    fingerprint = base_fingerprint(unet.requires_grad_(False))
    for figures in content["runs"]:
        check_fp16_run(RunDir(folder / figures["arm"] / figures["seed"]), figures, fingerprint)


def check_fp16_run(run: RunDir, figures: dict[str, Any], base: str) -> None:
    """Assert that a run was as on a T4 and that its figures say so: fp16 base, fp32 LoRA, scaler, skipped steps."""
    (start,) = (event for event in run.events() if event["event"] == "start")
    assert start["base"] == figures["base"] == base
    steps = run.steps()
    scale = 2.0**26
    for event in steps:  # each skipped step halves the scale of the next one
        assert event["loss_scale"] == scale
        scale /= 1 + event["is_skipped"]
    skipped = [event["is_skipped"] for event in steps]
    assert skipped[0]
    assert not all(skipped)
    assert (figures["skipped_steps"], figures["loss_scale"]) == (sum(skipped), steps[-1]["loss_scale"])
    assert all(math.isfinite(event["loss"]) for event in steps)
    assert figures["selfcheck"]
    assert all(check["is_right"] for check in figures["selfcheck"])
    (state,) = run.folder.glob("checkpoint-*/state.safetensors")
    weights = {name: value for name, value in load_file(state).items() if "lora_" in name}
    assert weights
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())


def base_in_halves(base: Path, folder: Path) -> Path:
    """Save `base` in fp16 with the file names of variant fp16, as SDXL is to be had."""
    StableDiffusionXLPipeline.from_pretrained(base, dtype=torch.float16).save_pretrained(folder, variant="fp16")
    return folder


@pytest.mark.long
@pytest.mark.usefixtures("short_drawings")
def test_each_part_adds_to_the_one_before_and_its_figures_name_nobody(
    base: Path,
    icons: Path,
    tmp_path: Path,
    without_a_process: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    parts = (Part("two arms", ("lora", "flat-lora")), Part("controls", ("lora", "flat-lora"), controls=True))
    monkeypatch.setattr("flatlora_diffusion.commands.command_line.PARTS", parts)
    monkeypatch.setattr(Accelerator, "__init__", init_with_scaler)  # in fp16, as on a T4
    with caplog.at_level("INFO"):
        assert main(["evidence", *arguments(base, icons, tmp_path), "--mixed_precision", "fp16"]) == 0
    file = tmp_path / "janes_run" / evidence.FILE
    text, content = file.read_text(), read_evidence(file)
    for personal in ("jane", "passport", str(tmp_path), base.name, getpass.getuser(), platform.node()):
        assert personal.lower() not in text.lower(), personal
    assert {run["arm"] for run in content["runs"]} >= {"lora", "flat-lora", "sigma-0"}
    assert all(run["steps"] == 2 and run["memory"] and run["seconds"] > 0 for run in content["runs"])
    assert content["settings"]["rank"] == 4
    assert content["settings"]["pretrained_model_name_or_path"] == "another one"
    assert content["is_alike"]
    assert "5 trainings in all; 2 are done" in caplog.text
    assert f"on disk in {tmp_path / 'janes_run'}" in caplog.text
    assert "on this machine" in caplog.text, "how long it takes"
    lines = [record.message for record in caplog.records]
    end = max(index for index, line in enumerate(lines) if line.startswith("Measured: "))
    last = lines[end]
    assert last.count(" s per step of ") >= 2
    assert " s per picture" in last
    assert " s per loss" in last
    assert any(line.startswith("Part 2 of 2, controls: about ") for line in lines)
    assert not any("Part" in line for line in lines[end + 1 :]), "nothing is left at the end"
    assert content["speeds"]["pictures"]["seconds"] > 0
    assert content["speeds"]["losses"]["number"] > 0
    assert report_row(content).count("|") == len(COLUMNS) + 1


def test_a_part_that_would_end_too_late_does_not_start(
    base: Path, icons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compared: list[tuple[str, ...]] = []

    def compare(config: TrainConfig, options: CompareConfig, forecast: Forecast) -> Path:
        compared.append(options.arms)
        return tmp_path

    monkeypatch.setattr(evidence, "compare", compare)
    monkeypatch.setattr(evidence, "public_figures", lambda folder: {})
    monkeypatch.setattr(Forecast, "part_seconds", lambda self: [1800.0 * len(part.arms) + 60.0 for part in PARTS])
    config = TrainConfig().replace(max_train_steps=500, seed=0, output_dir=str(tmp_path))
    with caplog.at_level("INFO"):
        evidence.evidence(config, EvidenceConfig(hours=2))
    assert compared == [part.arms for part in PARTS[:3]], "four arms of half an hour and a minute are too many"
    assert "hours" in caplog.text
    assert PARTS[3].name in caplog.text


def test_the_notebook_shows_what_the_program_prints_and_an_interruption_lets_it_end() -> None:
    """Colab shows only what the notebook's own process prints, and an interruption reaches the program by itself."""
    shown: list[str] = []

    def show(text: str, end: str = "\n") -> None:
        shown.append(text + end)
        if len(shown) == 1:
            raise KeyboardInterrupt

    names: dict[str, Any] = {"print": show, "SOURCE": "."}
    (cell,) = (cell for cell in cells() if "def flatlora" in cell)
    exec(cell, names)
    names["flatlora"]("--version")
    assert f"{PROGRAM} {__version__}" in "".join(shown).replace("\nStopping after the current step\n", "")
    with pytest.raises(AssertionError, match="last lines"):
        names["flatlora"]("nonsense")
    assert "flatlora has no verb 'nonsense'" in "".join(shown)


@pytest.mark.parametrize("form", ["--output_dir {}", "--output_dir={}", "--output-dir={}"])
def test_the_notebook_knows_each_form_of_the_flag(tmp_path: Path, form: str) -> None:
    (cell,) = (cell for cell in cells() if "parse_known_args" in cell)
    names: dict[str, Any] = {"ARGUMENTS": ["--hours", "1", *form.format(tmp_path).split(" ")]}
    exec("import importlib.util\nfrom pathlib import Path\n" + cell, names)
    assert names["folder"] == tmp_path


def cells() -> list[str]:
    """The code cells of the notebook."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.long
def test_the_rehearsal_fits_a_t4_on_colab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config, options = parse_comparison(EVIDENCE, (*DEFAULTS, *BASE_FLAGS), [], EvidenceConfig())
    config = evidence.settings_for_gpu(config, None, is_rehearsal=True)
    assert (config.optim.mixed_precision, config.model.offload) == ("fp16", True)
    table = phases(config, options, PARTS)
    arms = [phase.name for phase in table][1:-1]
    assert arms == [f"training steps, {name}" for name in ("LoRA", "Flat-LoRA", "LoRA, average of 3", "SAM")]
    gpu, cpu = max(phase.gpu for phase in table), max(phase.cpu for phase in table)
    disk = disk_bytes(config, options, PARTS)
    assert gpu <= 13.5 * GIB
    assert cpu <= 10 * GIB
    assert disk <= 20e9
    page = " ".join((ROOT / "docs" / "gpu.md").read_text(encoding="utf-8").split())
    assert f"at most {in_gib(gpu)} on the GPU, {in_gib(cpu)} beside it and {in_gib(disk)} of disk" in page
    assert min(phase.gpu for phase in table) > 5 * GIB, "the UNet alone has 4.8 GiB"
    assert len(list(rehearsal_lines(config, options, PARTS))) == len(table) + 2


@pytest.mark.parametrize(
    ("has_gpu", "has_bf16", "gpu", "precision", "offload"),
    [
        (True, True, None, "bf16", False),
        (True, False, None, "fp16", True),
        (True, True, "t4", "fp16", True),
        (False, False, None, None, False),
        (False, False, "t4", None, True),
    ],
)
def test_the_precision_fits_the_gpu(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool, has_bf16: bool, gpu: Any, precision: str | None, offload: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or has_bf16)
    config = evidence.settings_for_gpu(TrainConfig(), gpu)
    assert (config.optim.mixed_precision, config.model.offload) == (precision, offload)
    own = TrainConfig().replace(mixed_precision="no")
    assert evidence.settings_for_gpu(own, gpu).optim.mixed_precision == "no"


def _posted() -> dict[str, Any]:
    content: dict[str, Any] = dict.fromkeys(KEYS, "")
    paired = {"arm": "flat-lora", "against": "lora", "metric": "heldout_loss", "matched": "steps", "mean": -0.0004}
    return content | {
        "schema": SCHEMA,
        "program": PROGRAM,
        "version": "1.2",
        "device": "Tesla T4 | 16 GB",
        "settings": {"max_train_steps": 500, "mixed_precision": "fp16", "encoders": ["openai/clip-vit-large-patch14"]},
        "seeds": [0],
        "paired": [paired | {"low": -0.0006, "high": -0.0002}],
        "values": {"lora": {"0": {"seconds_per_step": 1.25}}},
        "runs": [{"memory": 3 * GIB}, {"memory": None}],
    }


def test_the_table_of_reports_has_the_columns_of_a_row() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert f"| {' | '.join(COLUMNS)} |" in page


def test_a_posted_file_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "posted.json"
    file.write_text(json.dumps(_posted()))
    assert main(["evidence", "--check", str(file)]) == 0
    row = "| Tesla T4 / 16 GB | 1.2 | 500 steps, 1 seed, fp16 | -0.00040 ± 0.00020 |  | 1.25 | 3.0 GiB |"
    assert capsys.readouterr().out.strip() == row


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("settings", []),
        ("settings", {"max_train_steps": 500}),
        ("values", {"lora": {"0": {"seconds_per_step": "1.25"}}}),
        ("runs", [{"memory": int("9" * 400)}]),
        ("paired", [{"arm": "flat-lora"}]),
        ("seeds", 3),
    ],
)
def test_a_file_with_other_values_than_its_schema_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any
) -> None:
    file = tmp_path / "posted.json"
    file.write_text(json.dumps(_posted() | {key: value}))
    assert main(["evidence", "--check", str(file)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert f"schema {SCHEMA}" in said[0]


def test_a_row_has_one_line_and_no_html() -> None:
    row = report_row(_posted() | {"device": "a\n| b |\n<img src=x>"})
    assert row.startswith("| a / b / &lt;img src=x&gt; | 1.2 |")
    assert row.count("|") == len(COLUMNS) + 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda text: text[:-30], "cut"),
        (lambda text: text.replace("1.25", "NaN"), "NaN"),
        (lambda text: text.replace("1.25", "-Infinity"), "Infinity"),
        (lambda text: text.replace("1.25", "1e999"), "1e999"),
        (lambda text: text.replace(f'"schema": {SCHEMA}', '"schema": 99'), "99"),
        (lambda text: text.replace(PROGRAM, "another"), PROGRAM),
        (lambda text: text.replace("Tesla T4", "/home/jane/T4"), "device"),
        (lambda text: text.replace("Tesla T4", "on C:\\\\Users\\\\jane"), "device"),
        (lambda text: text.replace('"verdict": "", ', ""), "verdict"),
        (lambda text: text + " " * MAX_BYTES, str(MAX_BYTES)),
        (lambda text: "[" * 100_000, "cut"),
        (lambda text: "[]", PROGRAM),
    ],
)
def test_a_file_that_cannot_be_trusted_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[str], str], named: str
) -> None:
    file = tmp_path / "posted.json"
    file.write_text(change(json.dumps(_posted())))
    assert main(["evidence", "--check", str(file)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "posted.json" in said[0]
    assert named in said[0]


def test_only_the_runs_of_the_result_count_and_each_step_of_them_once(tmp_path: Path) -> None:
    arms: dict[str, Any] = {"lora": {"0": {}}, "flat-lora:sigma=0.2": {"0": {}}}
    settings = {"pretrained_model_name_or_path": "tiny", "encoders": ["judge"], "arms": list(arms)}
    empty = dict.fromkeys(("device", "versions", "seeds", "verdict", "metrics", "base", "paired", "trajectories"), "")
    result = {**empty, "settings": settings, "values": arms, "nulls": [], "proof": []}
    (tmp_path / "compare.json").write_text(json.dumps(result))
    for arm, seed in (("lora", 0), ("flat-lora:sigma=0.2", 0), ("lora", 1), ("sam", 0)):
        run = RunDir(run_folder(tmp_path, arm, seed))
        run.folder.mkdir(parents=True)
        for step in (0, 1, 2, "killed", 1, 2):
            told = {"event": "step", "step": step, "seconds": 2.0, "memory": 5, "loss": 0.5}
            run.add_event({"event": "resumed", "step": 1} if step == "killed" else told)
    runs = evidence.public_figures(tmp_path)["runs"]
    assert [(run["arm"], run["seed"]) for run in runs] == [("lora", "seed-0"), ("flat-lora-sigma-0.2", "seed-0")]
    for run in runs:
        assert (run["steps"], run["seconds"], run["losses"]) == (3, 6.0, [0.5] * 3)


def test_only_what_is_not_here_is_downloaded() -> None:
    config = TrainConfig().replace(pretrained_model_name_or_path=evidence.BASE)
    assert "about 8.9 GB first" in evidence.downloads(config, CompareConfig(encoders=ENCODERS))
    assert evidence.downloads(TrainConfig(), CompareConfig()) == ""


def test_text_settings_are_not_published(tmp_path: Path) -> None:
    values = {**TrainConfig().to_dict(), "encoders": [str(tmp_path)], "arms": ["lora"], "token_abstraction": "JANE"}
    public = evidence._public_settings(values)
    assert public["encoders"] == ["another one"]
    assert public["perturb_per"] == "microbatch"
    assert not {"token_abstraction", "instance_prompt", "output_dir", "hub_model_id"} & {
        name for name, value in public.items() if value is not None
    }


def test_flags_win_over_what_evidence_has_as_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []

    def stop(config: TrainConfig, own: EvidenceConfig, parts: Sequence[Part]) -> Path:
        seen.extend((config, own, parts))
        raise ConfigError("enough")

    monkeypatch.setattr(evidence, "evidence", stop)
    assert main(["evidence", "--num_seeds", "5", "--max_train_steps", "7", "--encoders", "judge"]) == 2
    config, own, parts = seen
    assert (own.num_seeds, own.encoders) == (5, ("judge",))
    assert [part.num_seeds for part in parts] == [5], "one comparison, as the flag of `compare` says"
    assert (config.optim.max_train_steps, config.data.resolution) == (7, 1024)
    assert (config.model.pretrained_model_name_or_path, config.model.variant) == (evidence.BASE, "fp16")
    assert Path(config.data.instance_data_dir).name == "icons_3d"
