"""What the study of where flatness pays trains, measures and keeps, on a tiny random base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny_random_sdxl import save_icons, save_tiny_random_sdxl

from benchmarks import paper_variants_bench, paper_variants_study
from benchmarks.paper_variants import main, parser
from benchmarks.paper_variants_bench import MANY, Bench, Icons, few_images
from benchmarks.paper_variants_felt import (
    _compared,
    felt_by_arm,
    felt_left,
    in_bits,
    merged_with,
    stress_left,
    stressed,
)
from benchmarks.paper_variants_forgetting import STRENGTHS, curves, curves_left
from benchmarks.paper_variants_plan import FULL, THIN, Group, preset_group
from benchmarks.paper_variants_study import Study
from flatlora_diffusion.compare.arms import PlannedRun
from flatlora_diffusion.compare.losses import LossEvaluator
from flatlora_diffusion.config import ModelConfig, TrainConfig, preset_file
from flatlora_diffusion.evaluation.probe import fixed_probe, probe_loss
from flatlora_diffusion.lora_files.attached import loaded
from flatlora_diffusion.lora_files.place import LoraFile
from flatlora_diffusion.sdxl.objective import Objective
from flatlora_diffusion.sdxl.pipeline import Sdxl, load_sdxl


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Icons]:
    """A base and small lists of icons with names."""
    folder = tmp_path_factory.mktemp("made_up")
    lists = {name: save_icons(folder / name, 2 + place) for place, name in enumerate(("search", "report", "flat"))}
    for name, path in lists.items():
        lines = [
            {"file_name": image.name, "name": f"{name} {image.stem}", "text": f"a {name} {image.stem}"}
            for image in sorted(path.glob("*.png"))
        ]
        for text in path.glob("*.txt"):
            text.unlink()
        (path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return save_tiny_random_sdxl(folder / "base"), Icons(save_icons(folder / "training"), lists, lists["report"])


@pytest.fixture(scope="module")
def study_of(made_up: tuple[Path, Icons], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The command line of a small study, of which two arms' runs are there."""
    base, icons = made_up
    work = tmp_path_factory.mktemp("work")
    threads = torch.get_num_threads()
    arguments = ["--work", str(work), "--base", str(base), "--steps", "2", "--seeds", "1", "--out", str(work)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper_variants_study, "icons_3d", lambda *_: icons)
        patch.setattr("benchmarks.paper_variants_parts.DRAW_PAIRS", {THIN: FULL})
        patch.setattr(paper_variants_bench, "POINTS", 2)
        patch.setattr("benchmarks.paper_variants.logging.disable", lambda level: None)
        yield [*arguments, "--parts", "draws"]
    torch.set_num_threads(threads)


@pytest.mark.slow  # two runs and all their figures, and once more nothing
def test_a_part_that_is_done_trains_and_measures_nothing_again(
    study_of: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(study_of)
    file = Path(study_of[study_of.index("--out") + 1]) / "paper_variants_draws.json"
    first = json.loads(file.read_text(encoding="utf-8"))
    assert [(len(pair["seeds"]), pair["alike"]) for pair in first["pairs"]] == [(1, 1)]
    assert first["pairs"][0]["report"]["mean"] != 0
    monkeypatch.setattr(paper_variants_bench, "train", lambda config: pytest.fail("trained twice"))
    monkeypatch.setattr(paper_variants_bench, "generate_images", lambda *_, **__: pytest.fail("drawn twice"))
    monkeypatch.setattr(LossEvaluator, "_by_image", lambda *_: pytest.fail("measured twice"))
    capsys.readouterr()
    main(study_of)
    assert "about 0 core-minutes" in capsys.readouterr().out
    assert json.loads(file.read_text(encoding="utf-8")) == first


def test_reported_icons_choose_no_checkpoint(study_of: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bench, planned = bench_and_run(study_of)
    seen: list[Path | None] = []
    honest = LossEvaluator.losses

    def losses(self: LossEvaluator, lora: Path | None, strength: float = 1.0) -> Any:
        seen.append(lora)
        found = honest(self, lora, strength)
        # The first checkpoint is the best by the search icons, the last by those that are reported.
        search = 1.0 if lora == planned.lora else 0.5
        return found | {"search": {"all": search}, "report": {"all": -float(len(seen))}}

    monkeypatch.setattr(LossEvaluator, "losses", losses)
    found = bench.measured(planned)
    assert found["chosen_step"] == 1
    assert seen == list(planned.files.values())
    assert (found["chosen"], found["report"]) == (-1.0, -float(len(seen)))


def test_a_base_with_a_second_lora_in_its_weights_computes_what_both_beside_it_do(
    study_of: list[str], made_up: tuple[Path, Icons]
) -> None:
    _, planned = bench_and_run(study_of)

    def loss(sdxl: Sdxl) -> float:
        samples = paper_variants_bench._some(made_up[1].lists["report"], 2)
        return probe_loss(sdxl.unet, Objective(sdxl.scheduler), fixed_probe(sdxl, samples, 32, 0))

    beside, merged, rounded = (
        load_sdxl(ModelConfig(str(made_up[0])), torch.device("cpu"), torch.float32) for _ in "123"
    )
    clean = loss(rounded)
    with loaded(beside.pipeline, [LoraFile(planned.lora)]):
        assert loss(merged_with(merged, planned.lora, str(made_up[0]))) == pytest.approx(loss(beside), rel=1e-6)
    assert loss(merged) != clean
    in_int8 = loss(in_bits(rounded, "int8"))
    assert in_int8 == pytest.approx(clean, rel=0.05)
    assert in_int8 != clean
    assert loss(in_bits(rounded, "nf4")) == pytest.approx(clean, rel=0.2)
    blocks = rounded.unet.conv_in.weight.flatten().split(64)
    assert all(len(block.unique()) <= 16 for block in blocks), "4 bits"


@contextmanager
def samples_seen() -> Iterator[list[int]]:
    """How many samples each pass through any UNet has."""
    seen: list[int] = []

    def count(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, UNet2DConditionModel):
            seen.append(len(inputs[0]))

    with torch.nn.modules.module.register_module_forward_pre_hook(count):
        yield seen


@pytest.mark.slow  # eleven conditions of two runs
def test_a_lora_is_felt_in_each_condition_and_what_is_left_of_that_is_known(
    study_of: list[str], made_up: tuple[Path, Icons], tmp_path: Path
) -> None:
    study = Study(parser().parse_args(study_of))
    group = Group({THIN: FULL}, [7])
    bench, base, other = study.bench(group), made_up[0], tmp_path / "other"
    shutil.copytree(base, other)
    weights = load_file(file := next((other / "unet").glob("*.safetensors")))
    save_file({**weights, "conv_out.bias": weights["conv_out.bias"] + 0.1}, file, {"format": "pt"})
    runs = bench.planned(group)
    for planned in runs:
        paper_variants_bench.trained(planned)
    left = sum(felt_left(bench, planned, other) for planned in runs)
    with samples_seen() as seen:
        found = felt_by_arm(bench, group, runs[0].lora, str(base), other)
    assert left == pytest.approx(MANY * sum(seen))
    strengths = {f"strength {at}" for at in ("0.5", "0.75", "1", "1.25", "1.5")}
    bases = {"base in int8", "base in fp8", "base in nf4", "with a second LoRA", "on another checkpoint of the base"}
    for row, planned in zip(found["rows"], runs, strict=True):
        assert (row["arm"], row["seed"], set(row["felt"])) == (planned.arm.key, 7, strengths | bases)
        assert len({losses["report"] for losses in row["felt"].values()}) == len(row["felt"]), "each of its own"
        assert felt_left(bench, planned, other) == 0
    for row, stress in zip(found["rows"], stressed(bench, group, str(base)), strict=True):
        felt = row["felt"]
        assert (stress["report"], stress["flat"]) == tuple(felt["strength 1"].values())
        assert (stress["stronger"], stress["stronger_flat"]) == tuple(felt["strength 1.5"].values())
        assert (stress["nf4"], stress["nf4_flat"]) == tuple(felt["base in nf4"].values())
    assert all(stress_left(bench, planned) == 0 for planned in runs)
    twice = {name: losses["all"] for name, losses in bench.reported.losses(runs[0].lora, 2.0).items()}
    own = next(row["felt"] for row in found["rows"] if row["arm"] == runs[0].arm.key)
    assert own["with a second LoRA"] == pytest.approx(twice, rel=1e-5), "its own once more"


@pytest.mark.slow
def test_a_lora_is_measured_at_each_strength_and_what_is_left_of_that_is_known(study_of: list[str]) -> None:
    group = Group({THIN: FULL}, [7])
    bench = Study(parser().parse_args(study_of)).bench(group)
    runs = bench.planned(group)
    for planned in runs:
        paper_variants_bench.trained(planned)
    left = sum(curves_left(bench, planned) for planned in runs)
    with samples_seen() as seen:
        rows = curves(bench, group)
    assert left == pytest.approx(MANY * sum(seen))
    assert sum(curves_left(bench, planned) for planned in runs) == 0
    for row, planned in zip(rows, runs, strict=True):
        usual = {name: losses["all"] for name, losses in bench.reported.losses(planned.lora).items()}
        assert row["strengths"]["1"] == usual
        assert len({losses["report"] for losses in row["strengths"].values()}) == len(STRENGTHS)


def test_conditions_are_compared_by_the_pairs_of_each_seed() -> None:
    losses = {("flat", 0): 0.3, ("plain", 0): 0.1, ("flat", 1): 0.7, ("plain", 1): 0.4}
    rows = [
        {"arm": arm, "seed": seed, "felt": {"in int8": {"report": loss, "flat": 2 * loss}}}
        for (arm, seed), loss in losses.items()
    ]
    (found,) = _compared(rows, {"flat": "plain"})
    assert (found["arm"], found["against"]) == ("flat", "plain")
    in_int8 = found["conditions"]["in int8"]
    assert in_int8["report"]["differences"] == pytest.approx([0.2, 0.3])
    assert in_int8["flat"]["mean"] == pytest.approx(0.5)


def test_few_images_are_always_the_same_ones_with_their_captions(tmp_path: Path) -> None:
    training = save_icons(tmp_path / "training", 6)
    few = few_images(training, 2, tmp_path / "few")
    files = {file.name: file.read_bytes() for file in few.iterdir()}
    assert sorted(Path(name).suffix for name in files) == [".png", ".png", ".txt", ".txt"]
    assert all((training / name).read_bytes() == content for name, content in files.items())
    again = few_images(training, 2, tmp_path / "again")
    assert {file.name: file.read_bytes() for file in again.iterdir()} == files
    more = few_images(training, 4, tmp_path / "more")
    assert {file.name for file in more.iterdir()} > set(files)


@pytest.mark.slow  # a dozen steps of four runs
def test_the_cost_of_an_arm_is_that_of_its_own_steps_and_leaves_no_run(
    study_of: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper_variants_bench, "COST_SECONDS", 0.0)
    study = Study(parser().parse_args(study_of))
    group = Group({"sam:rho=0.1": "lora"}, [9])  # given, so that nothing is passed to find it
    bench = study.bench(group)
    lora, sam = bench.planned(group)
    with samples_seen() as seen:
        plain = bench.cost(lora, lora)
    passes = len(seen)
    with samples_seen() as seen:
        costly = bench.cost(sam, lora)
    assert 2 * len(seen) == 3 * passes, "of the two arms one takes two passes"
    assert 0 < costly["ratio"][0] <= costly["ratio"][1] <= costly["ratio"][2]
    assert costly["peak_bytes"] > plain["peak_bytes"] > 0, "it keeps the slope of W"
    assert not any(planned.run.folder.exists() for planned in (lora, sam))


def test_the_settings_of_a_preset_take_the_place_of_the_study_s_but_for_what_only_saves_memory(
    study_of: list[str],
) -> None:
    study, group = Study(parser().parse_args(study_of)), preset_group(1)
    bench = study.bench(group)
    lora, sam, _ = bench.planned(group)
    quality = TrainConfig().updated_from(preset_file("quality"))
    expected = quality.replace(gradient_checkpointing=False, mixed_precision=None)
    assert (lora.config.optim, lora.config.adapter) == (expected.optim, expected.adapter)
    assert lora.config.optim.max_train_steps == 1500 != study.options.steps
    assert (lora.config.perturb.method, sam.config.perturb.method) == ("lora", "sam")
    assert lora.run.folder.is_relative_to(study.work / "preset-quality")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], []),
        (["--workers", "3"], [(3, None)]),
        (["--cluster", "local"], [(None, "local")]),
        (["--workers", "2", "--cluster", "ray://host:10001"], [(2, "ray://host:10001")]),
    ],
    ids=str,
)
def test_the_runs_are_trained_by_the_workers_and_on_the_cluster_of_the_command_line(
    study_of: list[str], flags: list[str], expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Any] = []
    monkeypatch.setattr(paper_variants_bench, "train_at_once", lambda runs, *where: places.append(where))
    monkeypatch.setattr(paper_variants_bench, "trained", lambda planned: None)
    monkeypatch.setattr(Bench, "measured", lambda bench, planned: {"points": [{"search": 0.0}]})
    Study(parser().parse_args([*study_of, *flags])).rows(Group({THIN: FULL}, [0]))
    assert places == expected


def bench_and_run(arguments: list[str]) -> tuple[Bench, PlannedRun]:
    study = Study(parser().parse_args(arguments))
    group = Group({THIN: FULL}, [0])
    bench = study.bench(group)
    planned = bench.planned(group)[0]
    paper_variants_bench.trained(planned)
    return bench, planned
