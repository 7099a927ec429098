"""The program as one installs it: a wheel in an environment of its own, far from the checkout."""

from __future__ import annotations

import email.policy
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest

from flatlora_diffusion.storage.run_dir import LORA_FILE

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "requirements.lock")
FOLDERS = ("flatlora_diffusion", "app", "samples")
LARGEST = 40e6  # bytes

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout stays clean."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(out), str(source)], check=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`flatlora` in a new environment with the wheel alone; the libraries are those of this one, by their path."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=os.name != "nt")
    places = sysconfig.get_paths("venv", {"base": str(folder), "platbase": str(folder)})
    python = Path(places["scripts"]) / ("python.exe" if os.name == "nt" else "python")
    # A folder named in a .pth is searched, but no .pth in it is read: not that of an editable installation.
    libraries = Path(places["purelib"]) / "libraries.pth"
    libraries.write_text("\n".join(sorted({sysconfig.get_path(kind) for kind in ("purelib", "platlib")})) + "\n")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    return next(Path(places["scripts"]).glob("flatlora*"))


def start(program: Path, folder: Path, *arguments: str, code: int = 0) -> str:
    """What `flatlora ARGUMENTS` prints when it is started in `folder`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(program), *arguments], cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def told_until(program: Path, folder: Path, last: str, *arguments: str) -> str:
    """What `flatlora ARGUMENTS` prints until it says `last`; more than that is not waited for."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(program), *arguments]
    told = ""
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    ) as process:
        assert process.stdout is not None
        while last not in told:
            line = process.stdout.readline()
            assert line, told
            told += line
        process.terminate()
    return told


def test_the_wheel_holds_all_modules_and_samples_and_only_our_package(wheel: Path) -> None:
    assert wheel.stat().st_size < LARGEST
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert "flatlora = flatlora_diffusion" in archive.read(_metadata(archive, "entry_points.txt")).decode()
    assert {name.split("/")[0] for name in names} == {"flatlora_diffusion"}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "flatlora_diffusion").rglob("*.py")}
    modules |= {f"flatlora_diffusion/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "app").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    static = {f"flatlora_diffusion/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("app/widgets/static/*")}
    templates = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("flatlora_diffusion/**/templates/*")}
    samples = {path for path in (ROOT / "samples").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    samples -= {*(ROOT / "samples" / "tiny_klein").rglob("*")}  # too large
    data = {f"flatlora_diffusion/{path.relative_to(ROOT).as_posix()}" for path in samples}
    assert names - modules == data | static | templates | {"flatlora_diffusion/requirements.lock"}


def _metadata(archive: zipfile.ZipFile, file: str) -> str:
    (name,) = (name for name in archive.namelist() if name.endswith(f".dist-info/{file}"))
    return name


def test_the_package_names_its_authors_its_licences_and_what_it_is_for(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        said = BytesParser(policy=email.policy.default).parsebytes(archive.read(_metadata(archive, "METADATA")))
        licences = [
            archive.read(_metadata(archive, f"licenses/{file}")).decode() for file in said.get_all("License-File", [])
        ]
    assert said["Author"]
    assert {url.split(", ")[1] for url in said.get_all("Project-URL", [])} >= {"https://arxiv.org/abs/2409.14396"}
    assert {"lora", "sdxl"} <= set(said["Keywords"].split(","))
    assert "Programming Language :: Python :: 3.11" in said.get_all("Classifier", [])
    assert not [line for line in said.get_all("Classifier", []) if line.startswith("License ::")], (
        "the expression says it"
    )
    table = re.findall(
        r"^\| `.*\| ([^|,]+)[^|]*\|$", (ROOT / "samples/icons_flat/README.md").read_text(), re.MULTILINE
    )
    of_icons = {"MIT", *(licence.strip().replace("CC BY 4.0", "CC-BY-4.0") for licence in table)}
    assert set(said["License-Expression"].split(" AND ")) == of_icons | {"Apache-2.0"}
    for words in ("Apache License", "MIT License", "creativecommons.org/licenses/by/4.0"):
        assert any(words in text for text in licences), words


def test_the_package_s_description_leads_to_nothing_that_is_in_the_repository_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        said = BytesParser(policy=email.policy.default).parsebytes(archive.read(_metadata(archive, "METADATA")))
    assert said["Description-Content-Type"] == "text/markdown"
    text = str(said.get_payload())
    links = re.findall(r"\]\(([^)\s]*)\)", text)
    assert "https://arxiv.org/abs/2409.14396" in links
    assert [link for link in links if not link.startswith("https://")] == []
    assert "![" not in text
    assert "Same prompts, same seed" not in text, "the words below a picture go with it"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    headings = re.findall(r"^#+ .*", readme, re.MULTILINE)
    assert re.findall(r"^#+ .*", text, re.MULTILINE) == headings
    assert len(text) > 0.8 * len(readme)


def few_icons(folder: Path) -> Path:
    """Two icons in place of the many that the demo measures losses on."""
    folder.mkdir()
    for name in ("dog", "fish"):
        shutil.copy(ROOT / "samples" / "icons_3d" / "heldout" / f"{name}.png", folder)
        (folder / f"{name}.txt").write_text(f"an icon of a {name}", encoding="utf-8")
    return folder


def test_the_demo_trains_and_compares_in_an_empty_folder(program: Path, tmp_path: Path) -> None:
    work, few = tmp_path / "work", few_icons(tmp_path / "few")
    work.mkdir()
    short = ("--max_train_steps=1", "--train_batch_size=1", "--resolution=32", "--num_prompts=1")
    sparse = ("--num_checkpoints=1", "--pictures_per_prompt=1", f"--heldout_dir={few}", f"--forgetting_dir={few}")
    report = Path("outputs/demo/compare.html")
    told = told_until(program, work, f"Look at {report}\n", "demo", *short, *sparse)
    assert f"Look at {report.with_name('compare.png')}" in told
    assert (work / "outputs/demo/compare.html").is_file()
    assert [path.name for path in work.iterdir()] == ["outputs"]
    run = work / "outputs" / "demo" / "flat-lora" / "seed-0"
    assert (run / LORA_FILE).is_file()
    assert '"instance_data_dir": "samples/icons_3d"' in (run / "config.json").read_text(encoding="utf-8")


def test_verbs_help_and_doctor_need_no_checkout(program: Path, tmp_path: Path) -> None:
    assert "\n  demo " in start(program, tmp_path, "--help")
    assert "usage: flatlora train" in start(program, tmp_path, "train", "--help")
    assert "usage: flatlora app" in start(program, tmp_path, "app", "--help")
    report = start(program, tmp_path, "doctor", "--port", "7861")
    assert "no problems" in report
    assert "the tiny demo base exists" in report
    assert "last tested with 3." in report
    assert str(ROOT) not in report


def test_the_wheel_job_of_continuous_integration_tests_what_is_installed(program: Path, tmp_path: Path) -> None:
    """Its own command, which has to find the tests' helpers and not the checkout's program; here it only collects."""
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    (command,) = re.findall(r"run: python (.*-m pytest .*)", workflow)
    python = program.with_name("python.exe" if os.name == "nt" else "python")
    where = tmp_path / "test_where.py"
    where.write_text("import flatlora_diffusion\nassert 0, flatlora_diffusion.__file__\n")
    told = start(python, ROOT, *shlex.split(command), "--collect-only", str(where), "-p", "no:cacheprovider", code=2)
    (error,) = re.findall(r"^E +AssertionError: (.*)", told, re.MULTILINE)
    assert Path(error).is_relative_to(program.parents[1])
    assert "1 error in" in told


def test_the_app_starts_its_jobs_from_inside_the_package(program: Path, tmp_path: Path) -> None:
    python = program.with_name("python.exe" if os.name == "nt" else "python")
    code = (
        "import time; from pathlib import Path; from flatlora_diffusion.app.process.launch import Launch\n"
        "launch = Launch(Path('job')); launch.start(['-c', 'print(6 * 7)'])\n"
        "while launch.is_running(): time.sleep(0.1)\n"
        "print(launch.ending().code, launch.log())"
    )
    assert start(python, tmp_path, "-c", code) == "0 ['42']\n"
