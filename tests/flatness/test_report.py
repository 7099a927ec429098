"""`flatness` on the tiny random pipeline: W' is PEFT's, the base is unchanged, all files are written."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from tiny_runs import save_lora
from torch import nn

from flatlora_diffusion.adapter.layers import lora_layers
from flatlora_diffusion.adapter.lora import add_lora
from flatlora_diffusion.charts.palette import BASE, FLAT_LORA, INK, LORA, PAPER
from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.config import AdapterConfig, ConfigError, FlatnessConfig, ModelConfig, TrainConfig
from flatlora_diffusion.data.dataset import load_samples, manifest
from flatlora_diffusion.evaluation.finished_runs import read_runs
from flatlora_diffusion.evaluation.probe import Probe, fixed_probe, loss_increases, probe_loss
from flatlora_diffusion.families.objective import sample_losses
from flatlora_diffusion.families.sdxl.objective import SdxlObjective
from flatlora_diffusion.families.sdxl.pipeline import Sdxl, load_sdxl
from flatlora_diffusion.flatness import report as flatness_report
from flatlora_diffusion.flatness.curvature import top_eigenvalues, trace
from flatlora_diffusion.flatness.functional import Weights, noise, scales, shifted, value
from flatlora_diffusion.flatness.landscape import expected_increase, worst_increases
from flatlora_diffusion.flatness.measure import MeasuredModel, measure_flatness
from flatlora_diffusion.flatness.merged_weights import (
    Delta,
    base_weights,
    lora_deltas,
    loss_of_factors,
    loss_on_probe,
    merged,
)
from flatlora_diffusion.flatness.perturbed_models import OtherModels, round_factors, round_to, truncate_rank, variants
from flatlora_diffusion.flatness.report import flatness
from flatlora_diffusion.flatness.run_charts import charts_of
from flatlora_diffusion.flatness.surface_page import write_surface_page
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir

QUICK = FlatnessConfig(
    sigmas=(0.0, 0.2),
    rise_draws=2,
    radii=(0.01,),
    eigenvalues=1,
    lanczos_steps=2,
    trace_probes=2,
    surface_points=3,
    slice_directions=2,
)


def load(base: Path) -> Sdxl:
    return load_sdxl(ModelConfig(pretrained_model_name_or_path=str(base)), torch.device("cpu"), torch.float32)


def with_lora(sdxl: Sdxl, seed: int = 0, **adapter: object) -> Sdxl:
    """The base with a LoRA whose product BA is not zero."""
    add_lora(sdxl.denoiser, AdapterConfig(**adapter), seed=0)  # type: ignore[arg-type]
    for index, layer in enumerate(lora_layers(sdxl.denoiser).values()):
        rng = torch.Generator().manual_seed(100 * seed + index)
        weight = layer.lora_B["default"].weight
        weight.data.copy_(torch.randn(weight.shape, generator=rng) * 0.3)
    return sdxl


@pytest.fixture
def sdxl(base: Path) -> Sdxl:
    return load(base)


@pytest.fixture
def probe(sdxl: Sdxl, icons: Path) -> Probe:
    return fixed_probe(sdxl, load_samples(icons).samples, 32, seed=0, draws=2)


@pytest.fixture
def make_run(base: Path, icons: Path, tmp_path: Path) -> Callable[..., Path]:
    """A run folder as training leaves it."""

    def make(name: str, seed: int = 0, ended: str = "finished", **settings: object) -> Path:
        folder = tmp_path / name
        result = {"pretrained_model_name_or_path": "base", "instance_data_dir": "icons", "rank": 4, **settings}
        run = RunDir(folder)
        run.start(TrainConfig.from_dict(result).to_dict(), manifest(load_samples(icons).samples))
        save_lora(with_lora(load(base), seed, rank=4).pipeline, folder)
        run.add_event({"event": ended, "step": 1})
        return folder

    return make


@pytest.mark.parametrize("adapter", [{}, {"lora_target_modules": "conv"}, {"use_dora": True}])
def test_loss_at_w_prime_is_that_of_the_loaded_lora(
    sdxl: Sdxl, base: Path, probe: Probe, adapter: dict[str, Any]
) -> None:
    other = with_lora(load(base), **adapter)
    for layer in lora_layers(other.denoiser).values():
        if "default" in layer.lora_magnitude_vector:
            layer.lora_magnitude_vector["default"].weight.data *= 1.1
    deltas = lora_deltas(other.denoiser)
    expected = probe_loss(other.denoiser, SdxlObjective(sdxl.scheduler), probe)
    weights = base_weights(sdxl.denoiser, deltas)
    loss = loss_on_probe(sdxl.denoiser, SdxlObjective(sdxl.scheduler), probe, batch_size=4)
    assert value(loss, merged(weights, deltas)) == pytest.approx(expected, rel=1e-5)
    assert value(loss, weights) == pytest.approx(
        probe_loss(sdxl.denoiser, SdxlObjective(sdxl.scheduler), probe), rel=1e-6
    )
    assert value(loss, weights) != pytest.approx(expected, rel=1e-4)
    assert (
        merged(weights, deltas, 0.0)["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
        is (weights["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"])
    )


def test_rise_is_that_of_the_training_perturbation(sdxl: Sdxl, base: Path, probe: Probe) -> None:
    other, objective = with_lora(load(base)), SdxlObjective(sdxl.scheduler)
    deltas = lora_deltas(other.denoiser)
    weights = merged(base_weights(sdxl.denoiser, deltas), deltas)
    loss = loss_on_probe(sdxl.denoiser, objective, probe, 8)
    eps = noise(scales(weights, "filter"), weights, seed=3, draw=0)
    mine = value(loss, shifted(weights, eps, 0.5)) - value(loss, weights)
    assert mine == pytest.approx(loss_increases(other.denoiser, objective, probe, 0.5, draws=1, seed=3)[0], rel=1e-3)


def test_moving_scale_between_a_and_b_changes_no_figure(sdxl: Sdxl, base: Path, probe: Probe) -> None:
    deltas = lora_deltas(with_lora(load(base)).denoiser)
    moved = {name: replace(delta, down=delta.down * 8, up=delta.up / 8) for name, delta in deltas.items()}
    weights = base_weights(sdxl.denoiser, deltas)
    one, other = (
        asdict(
            measure_flatness(
                sdxl,
                SdxlObjective(sdxl.scheduler),
                weights,
                MeasuredModel("arm", result, {"train": probe}),
                QUICK,
                OtherModels(),
            )
        )
        for result in (deltas, moved)
    )
    for name in (
        "losses",
        "rises",
        "worst",
        "worst_factors",
        "curvature",
        "slices",
        "surface",
        "strengths",
        "variants",
    ):
        assert flat(one[name]) == pytest.approx(flat(other[name]), rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("adapter", [{}, {"lora_target_modules": "conv", "lora_alpha": 2.0}])
def test_the_worst_step_of_a_and_b_is_that_of_the_loaded_lora(
    sdxl: Sdxl, base: Path, probe: Probe, adapter: dict[str, Any]
) -> None:
    """PEFT's own gradient of A and B, which of a DoRA leaves its norm out, and A and B moved by hand."""
    other, objective, radius = with_lora(load(base), **adapter).denoiser.eval(), SdxlObjective(sdxl.scheduler), 0.01
    deltas = lora_deltas(other)
    loss = loss_on_probe(sdxl.denoiser, objective, probe, batch_size=4)
    (result,) = worst_increases(*loss_of_factors(loss, base_weights(sdxl.denoiser, deltas), deltas), [radius])
    still = probe_loss(other, objective, probe)
    sample_losses(other, objective, probe.batch, probe.noise, probe.timesteps).mean().backward()
    factors = [one for name, one in other.named_parameters() if "lora_A" in name or "lora_B" in name]
    units = [one.flatten(1).norm(dim=1).view(-1, *[1] * (one.ndim - 1)) / one[0].numel() ** 0.5 for one in factors]
    steepest = [unit * one.grad for unit, one in zip(units, factors, strict=True) if one.grad is not None]
    length = torch.stack([part.norm() for part in steepest]).norm()
    with torch.no_grad():
        for one, unit, part in zip(factors, units, steepest, strict=True):
            one += radius * sum(each.numel() for each in factors) ** 0.5 * unit * part / length
    assert result == pytest.approx(probe_loss(other, objective, probe) - still, rel=1e-3)
    assert result > 1e-4


def test_nothing_is_written_and_modes_and_attention_come_back(sdxl: Sdxl, base: Path, probe: Probe) -> None:
    deltas = lora_deltas(with_lora(load(base)).denoiser)
    before = state(sdxl.denoiser)
    sdxl.denoiser.train()
    weights = base_weights(sdxl.denoiser, deltas)
    measure_flatness(
        sdxl,
        SdxlObjective(sdxl.scheduler),
        weights,
        MeasuredModel("arm", deltas, {"train": probe}),
        QUICK,
        OtherModels(),
    )
    assert same(state(sdxl.denoiser), before)
    assert sdxl.denoiser.training
    assert all(isinstance(used, AttnProcessor2_0) for used in sdxl.denoiser.attn_processors.values())
    assert all(not parameter.requires_grad for parameter in sdxl.denoiser.parameters())


def test_nothing_is_written_after_an_exception(sdxl: Sdxl, base: Path, probe: Probe) -> None:
    deltas = lora_deltas(with_lora(load(base)).denoiser)
    before, weights = state(sdxl.denoiser), base_weights(sdxl.denoiser, deltas)
    loss = loss_on_probe(sdxl.denoiser, SdxlObjective(sdxl.scheduler), probe, 4)
    fails = sdxl.denoiser.conv_out.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    for measurement in (
        lambda: expected_increase(loss, weights, 0.3, 2, 0),
        lambda: worst_increases(loss, weights, [0.1]),
    ):
        with pytest.raises(KeyboardInterrupt):
            measurement()
    with pytest.raises(KeyboardInterrupt), sdxl.twice_differentiable():
        trace(loss, weights, "filter", 2, 0)
    fails.remove()
    assert same(state(sdxl.denoiser), before)
    assert all(isinstance(used, AttnProcessor2_0) for used in sdxl.denoiser.attn_processors.values())


@pytest.mark.long
def test_curvature_of_the_unet_is_that_of_finite_differences(sdxl: Sdxl, base: Path, probe: Probe) -> None:
    """The fused attention has no second derivative, and the plain one gives the same loss."""
    sdxl.denoiser.double()
    probe = replace(probe, batch=probe.batch.map(lambda part: part.double()), noise=probe.noise.double())
    names = list(lora_deltas(with_lora(load(base)).denoiser))[:2]
    weights = {name: weight.double() for name, weight in base_weights(sdxl.denoiser, names).items()}
    loss = loss_on_probe(sdxl.denoiser, SdxlObjective(sdxl.scheduler), probe, 3)
    fused = value(loss, weights)
    with sdxl.twice_differentiable():
        assert value(loss, weights) == pytest.approx(fused, rel=1e-6)
        top = top_eigenvalues(loss, weights, "filter", 1, 30, seed=0)[0]
        result = trace(loss, weights, "filter", 40, seed=0)
    rise = expected_increase(loss, weights, 0.5, 40, seed=0)
    assert rise.mean == pytest.approx(0.5**2 / 2 * result.mean, abs=4 * (rise.error + result.error / 8), rel=0.05)
    assert top.value > 0
    assert top.residual < 0.05 * top.value


def test_fewer_bits_round_as_they_say() -> None:
    values = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-3], [1], [10], [0]])
    assert torch.equal(round_to(values, "fp16"), values.half().float())
    assert torch.equal(round_to(values, "fp8"), values.to(torch.float8_e4m3fn).float())
    assert round_to(torch.tensor([[1e6]]), "fp8").item() == 448
    steps = values.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((round_to(values, "int8") - values).abs() <= steps / 2 + 1e-9).all())
    assert len(round_to(values, "int8")[1].unique()) <= 255
    assert torch.equal(round_to(values, "int8")[3], values[3])


def test_cut_ranks_are_the_best_there_are() -> None:
    rng = torch.Generator().manual_seed(0)
    delta = Delta(torch.randn(5, 9, generator=rng), torch.randn(7, 5, generator=rng))
    change = delta.up @ delta.down
    values = torch.linalg.svdvals(change)
    for rank in (1, 3):
        cut = truncate_rank({"w": delta}, rank)["w"]
        assert cut.down.shape == (rank, 9)
        missed = torch.linalg.matrix_norm(change - cut.up @ cut.down)
        assert float(missed) == pytest.approx(float(values[rank:].square().sum().sqrt()), rel=1e-4)
    assert [name for name, _ in variants({"w": change}, {"w": delta}, OtherModels()) if "rank" in name] == [
        "LoRA cut to rank 1",
        "LoRA cut to rank 2",
        "LoRA cut to rank 4",
    ]
    assert torch.allclose(round_factors({"w": delta}, "fp16")["w"].down, delta.down, rtol=1e-3)


def test_a_lora_meets_a_rough_base_a_second_lora_and_another_base() -> None:
    rng = torch.Generator().manual_seed(0)
    base, other = torch.randn(6, 8, generator=rng), torch.randn(6, 8, generator=rng)
    one, two = (Delta(torch.randn(1, 8, generator=rng), torch.randn(6, 1, generator=rng)) for _ in range(2))
    result = dict(variants({"w": base}, {"w": one}, OtherModels({"w": two}, {"w": other, "rest": other})))
    change, second = one.up @ one.down, two.up @ two.down
    assert torch.equal(result["base in int8, LoRA whole"]["w"], round_to(base, "int8") + change)
    assert torch.equal(result["with the second LoRA"]["w"], base + change + second)
    assert torch.equal(result["second LoRA alone"]["w"], base + second)
    assert torch.equal(result["on the other base"]["w"], other + change)
    assert torch.equal(result["on the other base"]["rest"], other)
    assert torch.equal(result["other base alone"]["w"], other)


def test_a_report_has_all_files_and_figures(
    make_run: Callable[..., Path],
    base: Path,
    icons: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    one, two = make_run("plain", method="lora"), make_run("flat", seed=1)
    held = tmp_path / "held"
    held.mkdir()
    Image.new("RGB", (40, 40), "teal").save(held / "a.png")
    (held / "a.txt").write_text("a teal icon", encoding="utf-8")
    out = tmp_path / "out"
    flags = ["--output_dir", str(out), "--heldout_dir", str(held), "--instance_data_dir", str(icons)]
    flags += ["--pretrained_model_name_or_path", str(base), "--surface_points", "3", "--slice_directions", "2"]
    flags += ["--rise_draws", "2", "--lanczos_steps", "2", "--eigenvalues", "1", "--sigmas", "0.1", "--radii", "0.01"]
    flags += ["--second_lora", str(two), "--other_base", str(base)]
    with caplog.at_level(logging.INFO):
        assert main(["flatness", str(one), str(two), *flags]) == 0
    assert caplog.messages[0] == f"base: {base}, 32 pixels"
    printed = capsys.readouterr().out
    assert printed.startswith(f"base: .../{base.name}\n"), "a file keeps no path"
    assert "| Base |" in printed.replace("  ", "")
    assert "difference to plain, Eq. 7, sigma 0.1" in printed
    assert re.search(r"\| worst-case loss increase in A and B, radius 0\.01 +\|  +\| +\d\S+ \| +\d\S+ \|", printed)
    result = json.loads((out / "flatness.json").read_text(encoding="utf-8"))
    assert [figures["name"] for figures in result["figures"]] == ["Base", "plain", "flat"]
    for figures in result["figures"]:
        assert figures["surface"][1][1] == figures["losses"]["train"]
        assert [part[1] for part in figures["slices"]] == [figures["losses"]["train"]] * 2
        assert all(set(losses) == {"train", "heldout"} for losses in figures["strengths"].values())
    assert [len(figures["worst_factors"]) for figures in result["figures"]] == [0, 1, 1], "the base has no A and B"
    arm = result["figures"][1]
    assert arm["worst_factors"][0] > 0
    assert arm["worst_factors"] != arm["worst"]
    assert arm["strengths"]["1.0"] == arm["losses"]
    assert arm["strengths"]["0.0"] == result["figures"][0]["losses"]
    assert arm["variants"]["on the other base"] == pytest.approx(arm["losses"]), "here it is the same base"
    assert result["figures"][2]["variants"]["second LoRA alone"] == pytest.approx(result["figures"][2]["losses"])
    assert arm["variants"]["with the second LoRA"]["train"] != arm["losses"]["train"]
    assert len(result["runs"]["plain"]["sha256"]) == 64
    assert result["runs"]["plain"]["sha256"] != result["runs"]["flat"]["sha256"]
    assert str(tmp_path) not in (out / "flatness.json").read_text(encoding="utf-8")
    for name in ("rise.png", "slices.png", "strength.png", "surface.png"):
        assert Image.open(out / name).width > 500
    pixels = np.asarray(Image.open(out / "strength.png").convert("RGB")).reshape(-1, 3)
    seen = {f"#{pixel.tobytes().hex()}" for pixel in np.unique(pixels, axis=0)}
    assert {look.tone.light for look in (BASE, LORA, FLAT_LORA)} <= seen, "each method in its own colour"
    for name, chart in charts_of(result).items():  # drawn anew of the figures it is the same chart
        chart.save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()


def test_losses_are_those_of_the_objective_and_the_text_layer_that_were_trained(
    make_run: Callable[..., Path], base: Path, icons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result: list[Any] = []

    def watched(unet: Any, objective: SdxlObjective, weights: Weights, model: MeasuredModel, *rest: Any) -> None:
        result.append((objective, model))

    monkeypatch.setattr(flatness_report, "measure_flatness", watched)
    monkeypatch.setattr(flatness_report, "_write", lambda *args: None)
    run = make_run("plain", clip_skip=1, do_edm_style_training=True)
    config = FlatnessConfig(
        runs=(str(run),),
        output_dir=str(tmp_path / "out"),
        pretrained_model_name_or_path=str(base),
        instance_data_dir=str(icons),
    )
    flatness(config)
    pipeline, captions = load(base).pipeline, [sample.caption for sample in load_samples(icons).samples]
    prompts = pipeline.encode_prompt(captions, do_classifier_free_guidance=False, clip_skip=1)[0]
    assert len(result) == 2
    for objective, model in result:
        assert objective.edm
        assert torch.equal(model.probes["train"].batch.prompts["prompt_embeds"], prompts)


def test_the_probe_has_the_draws_of_the_settings_and_is_taken_in_their_batches(
    make_run: Callable[..., Path], base: Path, icons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SeenError(Exception):
        pass

    def watched(unet: Any, objective: SdxlObjective, probe: Probe, batch_size: int) -> Any:
        raise SeenError(probe.draws, len(probe.timesteps), batch_size)

    monkeypatch.setattr("flatlora_diffusion.flatness.measure.loss_on_probe", watched)
    config = replace(
        QUICK,
        runs=(str(make_run("plain")),),
        output_dir=str(tmp_path / "out"),
        pretrained_model_name_or_path=str(base),
        instance_data_dir=str(icons),
        probe_draws=3,
        probe_batch_size=5,
    )
    with pytest.raises(SeenError) as seen:
        flatness(config)
    assert seen.value.args == (3, 3 * 3, 5)


def test_the_page_works_offline(make_run: Callable[..., Path], base: Path, icons: Path, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    config = replace(
        QUICK,
        runs=(str(make_run("plain")),),
        pretrained_model_name_or_path=str(base),
        instance_data_dir=str(icons),
        output_dir=str(tmp_path / "out"),
        curvature=False,
    )
    page = (flatness(config) / "surface.html").read_text(encoding="utf-8")
    assert "Plotly.newPlot" in page
    assert len(page) > 1_000_000, "plotly.js is not in it"
    assert not re.search(r"<(script|link)[^>]*(src|href)=", page)
    result = json.loads((tmp_path / "out" / "flatness.json").read_text(encoding="utf-8"))
    assert result["figures"][1]["curvature"] == {}
    assert result["figures"][1]["rises"]["filter"][0]["values"] == [0.0, 0.0]


@pytest.mark.parametrize("tone", ["dark", pytest.param("light", marks=pytest.mark.long)])
def test_a_surface_to_turn_has_the_colours_that_the_reader_sees_pages_in(
    chromium: Any, tmp_path: Path, tone: Any
) -> None:
    bowl = [[float(a * a + b * b) for a in (-1, 0, 1)] for b in (-1, 0, 1)]
    write_surface_page(tmp_path / "surface.html", [("bowl", bowl), ("flat", bowl)], (-1, 0, 1), "title")
    page = chromium.new_page(color_scheme=tone)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto((tmp_path / "surface.html").as_uri())
    layout = page.evaluate("(({paper_bgcolor, font}) => [paper_bgcolor, font.color])(surfaces._fullLayout)")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.close()
    assert layout == [getattr(PAPER, tone), getattr(INK, tone)]
    assert ground == "rgb({}, {}, {})".format(*bytes.fromhex(getattr(PAPER, tone)[1:]))
    assert complaints == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pretrained_model_name_or_path": "elsewhere"}, "run other was trained on another base than plain"),
        ({"prediction_type": "v_prediction"}, "prediction_type='v_prediction', not None"),
        ({"ended": "stopped"}, "run other has not finished"),
    ],
)
def test_a_run_that_does_not_fit_is_named(
    make_run: Callable[..., Path], settings: dict[str, str], message: str
) -> None:
    one, two = make_run("plain"), make_run("other", **settings)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_runs([str(one), str(two)])


def test_an_output_that_cannot_be_written_is_named_before_anything_is_measured(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flatness_report, "load_base", lambda *_: pytest.fail("it was loaded"))
    (tmp_path / "file").write_text("")
    config = replace(QUICK, runs=(str(make_run("plain")),), output_dir=str(tmp_path / "file" / "out"))
    with pytest.raises(ConfigError, match=r"output_dir='.*out' cannot be written: .+; give another folder"):
        flatness(config)


@pytest.mark.parametrize("name", ["rise.png", "flatness.md"])
def test_a_file_that_belongs_to_no_earlier_result_is_not_replaced(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(flatness_report, "load_base", lambda *_: pytest.fail("it was loaded"))
    (tmp_path / name).write_bytes(b"the user's")
    config = replace(QUICK, runs=(str(make_run("plain")),), output_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=f"output_dir=.* holds {name}"):
        flatness(config)


@pytest.mark.parametrize("setting", ["instance_data_dir", "heldout_dir"])
def test_charts_are_not_put_among_images(
    make_run: Callable[..., Path], icons: Path, tmp_path: Path, setting: str
) -> None:
    more = tmp_path / "more"
    more.mkdir()
    out = icons if setting == "instance_data_dir" else more
    config = replace(QUICK, runs=(str(make_run("plain")),), instance_data_dir=str(icons), heldout_dir=str(more))
    with pytest.raises(ConfigError, match=f"output_dir=.* is {setting}="):
        flatness(replace(config, output_dir=str(out)))


def test_other_images_and_missing_runs_are_named(
    make_run: Callable[..., Path], base: Path, icons: Path, tmp_path: Path
) -> None:
    one, two = make_run("plain"), make_run("other")
    with pytest.raises(ConfigError, match="run nowhere "):
        read_runs([str(one), str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match="given twice"):
        read_runs([str(one), str(one / ".." / "plain")])
    with pytest.raises(ConfigError, match="no run was given"):
        read_runs([])
    entries = json.loads((two / "manifest.json").read_text(encoding="utf-8"))
    (two / "manifest.json").write_text(json.dumps(entries[1:]), encoding="utf-8")
    with pytest.raises(ConfigError, match="run other was trained on other images or captions than plain"):
        read_runs([str(one), str(two)])
    changed = tmp_path / "changed"
    shutil.copytree(icons, changed)
    (changed / "icon-0.txt").write_text("something else", encoding="utf-8")
    config = replace(QUICK, runs=(str(one),), instance_data_dir=str(changed), pretrained_model_name_or_path=str(base))
    with pytest.raises(ConfigError, match="not those of run plain"):
        flatness(config)
    with pytest.raises(ConfigError, match=r"heldout_dir has images that were trained on: icon-0\.png"):
        flatness(replace(config, instance_data_dir=str(icons), heldout_dir=str(icons)))


def test_runs_with_one_name_are_told_apart(make_run: Callable[..., Path], tmp_path: Path) -> None:
    one, two = make_run("a/lora"), make_run("b/lora")
    assert [run.name for run in read_runs([str(one), str(two)])] == ["a/lora", "b/lora"]
    (two / LORA_FILE).unlink()
    with pytest.raises(ConfigError, match="run b/lora has not finished"):
        read_runs([str(one), str(two)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"surface_points": 4}, "surface_points=4 .*5"),
        ({"sigmas": ()}, "sigmas is empty"),
        ({"radii": ()}, "radii is empty"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FlatnessConfig(**settings)  # type: ignore[arg-type]


def state(module: nn.Module) -> Weights:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: Weights, two: Weights) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def flat(result: object) -> list[float]:
    """All numbers in nested dicts and lists."""
    if isinstance(result, dict):
        return [number for value in result.values() for number in flat(value)]
    if isinstance(result, list | tuple):
        return [number for value in result for number in flat(value)]
    assert isinstance(result, float)
    return [result]
