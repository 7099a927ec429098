"""Training on the tiny random pipeline: pairing, resuming, errors that stop a run, and its files."""

from __future__ import annotations

import json
import random
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import trained
from torch import Tensor

from flatlora_diffusion.adapter.lora import trainable_parameters
from flatlora_diffusion.config import ConfigError, RunError, TrainConfig, for_method
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.data.epochs import steps_per_epoch
from flatlora_diffusion.lora_files.diffusers_file import LORA_FILE
from flatlora_diffusion.method.flat_lora import FlatLora
from flatlora_diffusion.method.rivals import sam
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.training import micro_batches, trainer
from flatlora_diffusion.training.checkpoint import load_state, save_state
from flatlora_diffusion.training.state import TrainState, prepare, seeded_dropout
from flatlora_diffusion.training.trainer import train, train_step


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    return config.replace(
        max_train_steps=4, lora_alpha=8, random_flip=True, sigma_schedule="cosine", report_to="tensorboard"
    )


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / LORA_FILE)


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_training_moves_the_lora_and_lowers_the_loss_of_one_repeated_batch(config: TrainConfig) -> None:
    state = prepare(
        config.replace(learning_rate=3e-2, method="lora"),
        load_samples(Path(str(config.data.instance_data_dir))).samples,
    )
    before = {name: value.detach().clone() for name, value in state.trainable.items()}
    first = [train_step(state, step=0) for _ in range(12)]
    assert first[-1] < first[0]
    assert all(not torch.equal(before[name], value) for name, value in state.trainable.items())


def test_flat_lora_with_sigma_0_is_plain_lora_bit_for_bit(config: TrainConfig, tmp_path: Path) -> None:
    train(config.replace(method="lora", output_dir=str(tmp_path / "lora")))
    train(config.replace(method="flat-lora", sigma=0.0, output_dir=str(tmp_path / "flat")))
    assert_equal(weights(tmp_path / "lora"), weights(tmp_path / "flat"))


def test_lora_and_flat_lora_have_the_same_initialization_and_draws(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Any]] = {"lora": [], "flat-lora": []}
    plain_loss = micro_batches.diffusion_loss
    for method, draws in seen.items():

        def recording(
            unet: Any, objective: Any, batch: Any, noise: Tensor, timesteps: Tensor, to: Any = draws
        ) -> Tensor:
            to.append(
                (
                    batch.latents.clone(),
                    batch.prompts["prompt_embeds"].clone(),
                    batch.geometry["add_time_ids"],
                    noise,
                    timesteps,
                )
            )
            return plain_loss(unet, objective, batch, noise, timesteps)

        monkeypatch.setattr(micro_batches, "diffusion_loss", recording)
        train(config.replace(method=method, gradient_accumulation_steps=2, output_dir=str(tmp_path / method)))
    assert len(seen["lora"]) == len(seen["flat-lora"]) == 8
    for first, second in zip(*seen.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    different = [torch.equal(a[3], b[3]) for i, a in enumerate(seen["lora"]) for b in seen["lora"][:i]]
    assert not any(different), "two micro-batches drew the same noise"
    begun = {method: RunDir(tmp_path / method).events()[0] for method in seen}
    assert begun["lora"]["event"] == "start"
    assert begun["lora"]["lora"] == begun["flat-lora"]["lora"], "the first weights differ"
    losses = {method: RunDir(tmp_path / method).events()[1]["loss"] for method in seen}
    assert losses["lora"] == losses["flat-lora"], "sigma is 0 at step 0, so the first losses must be equal"
    assert not torch.equal(
        next(iter(weights(tmp_path / "lora").values())), next(iter(weights(tmp_path / "flat-lora").values()))
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixed_precision": "bf16"},
        pytest.param({"perturb_draw": "full", "perturb_norm_every": 1}, marks=pytest.mark.long),
        pytest.param({"lora_dropout": 0.0}, marks=pytest.mark.long),
        {"train_text_encoder": True},
    ],
    ids=["fp32", "bf16", "full draws", "in the branch", "two models"],
)
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(config: TrainConfig, changes: dict[str, Any]) -> None:
    whole = config.replace(
        gradient_accumulation_steps=2,
        lr_scheduler="cosine",
        lr_warmup_steps=1,
        caption_dropout=0.3,
        checkpointing_steps=2,
        **{"lora_dropout": 0.1, **changes},
    )
    run = train(whole).parent
    unbroken = weights(run)
    (run / LORA_FILE).unlink()
    train(whole.replace(resume_from_checkpoint="checkpoint-2", seed=None))
    assert_equal(unbroken, weights(run))
    steps = [event["step"] for event in RunDir(run).events() if event["event"] == "step"]
    assert steps == [0, 1, 2, 3, 2, 3]


def test_resume_refuses_changed_images_and_unknown_checkpoints(
    config: TrainConfig, icons: Path, tmp_path: Path
) -> None:
    train(config.replace(checkpointing_steps=2))
    with pytest.raises(ConfigError, match=r"checkpoint-7.*checkpoint-2, checkpoint-4"):
        train(config.replace(resume_from_checkpoint="checkpoint-7"))
    with pytest.raises(ConfigError, match="checkpoint-4 was made with rank=4, not 2; perturb_seed=None, not 5"):
        train(config.replace(resume_from_checkpoint="latest", rank=2, perturb_seed=5))
    with pytest.raises(ConfigError, match="holds no run to resume"):
        train(config.replace(resume_from_checkpoint="checkpoint-4", output_dir=str(tmp_path / "nowhere")))
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in icons.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    (changed / "icon-0.txt").write_text("another caption", encoding="utf-8")
    with pytest.raises(ConfigError, match="have changed since checkpoint-4"):
        train(config.replace(resume_from_checkpoint="latest", instance_data_dir=str(changed)))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_trainable_weights_are_fp32_and_the_base_is_never_written(config: TrainConfig, precision: str) -> None:
    state = prepare(
        config.replace(mixed_precision=precision), load_samples(Path(str(config.data.instance_data_dir))).samples
    )
    frozen = {name: p.detach().clone() for name, p in state.base.denoiser.named_parameters() if not p.requires_grad}
    for step in range(2):
        train_step(state, step)
    assert {p.dtype for p in trainable_parameters(state.base.denoiser).values()} == {torch.float32}
    for name, parameter in state.base.denoiser.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    assert next(iter(frozen.values())).dtype == (torch.float32 if precision == "no" else torch.bfloat16)


def global_generators() -> list[Any]:
    kind, keys, *rest = np.random.get_state()
    return [torch.get_rng_state().tolist(), [kind, list(keys), *rest], random.getstate()]


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_dropout": 0.1, "validation_prompt": "an icon", "num_validation_images": 1},
        {"adapter": "lora-ga"},
        *(
            pytest.param(changes, marks=pytest.mark.long)
            for changes in (
                {"adapter": "pissa"},
                {"adapter": "adalora"},
                {"adapter": "full", "lora_alpha": None},
                {"method": "bi-lora"},
            )
        ),
        {"method": "sam", "rho_rise": 0.2, "max_train_steps": 2},
    ],
    ids=str,
)
def test_training_neither_writes_nor_reads_the_global_generators(
    config: TrainConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    learned = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = global_generators()
        settings = {"max_train_steps": 1, "output_dir": str(tmp_path / f"{seed}"), **changes}
        learned.append(train(config.replace(**settings)))
        assert global_generators() == before
    first, second = map(load_file, learned)
    assert_equal(first, second)


def learned(config: TrainConfig, steps: int = 3) -> dict[str, Tensor]:
    """The weights of the LoRA after some steps."""
    return {name: value.detach() for name, value in trained(config, steps).trainable.items()}


def test_gradient_checkpointing_changes_nothing(config: TrainConfig) -> None:
    first, second = learned(config), learned(config.replace(gradient_checkpointing=True))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-3, atol=1e-5)


def test_one_eps_per_step_or_per_micro_batch(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = load_samples(Path(str(config.data.instance_data_dir))).samples
    config = config.replace(perturb_draw="low_rank", gradient_accumulation_steps=2)
    each = [(5, 0), (5, 1)]
    for per, expected in (("step", [(5, 0)]), ("microbatch", each)):
        state = prepare(config.replace(perturb_per=per), samples)
        (flat,) = state.flats
        opened: list[tuple[int, int]] = []
        real = flat.perturb
        monkeypatch.setattr(flat, "perturb", lambda s, k, to=opened, real=real: (to.append((s, k)), real(s, k))[1])
        train_step(state, step=5)
        assert opened == expected


def test_the_kind_of_draw_reaches_the_training(config: TrainConfig) -> None:
    samples = load_samples(Path(str(config.data.instance_data_dir))).samples
    for draw in ("full", "low_rank"):
        (flat,) = prepare(config.replace(perturb_draw=draw), samples).flats
        assert flat.state_dict()["draw"] == draw


def stds_now(flat: FlatLora) -> Tensor:
    """||W'_i|| / sqrt(n) of all rows."""
    bases = {name: layer.get_base_layer().weight for name, layer in flat.layers.items()}
    return torch.cat([flat.filter_norms(name) / weight[0].numel() ** 0.5 for name, weight in bases.items()])


def test_norms_of_the_default_interval_are_off_by_less_than_half_a_percent(config: TrainConfig) -> None:
    """Each entry of A and B moves by at most the learning rate in a step of Adam, so ||W'_i|| hardly changes.

    This is the worst row of all layers at the default learning rate.
    """
    samples = load_samples(Path(str(config.data.instance_data_dir))).samples
    usual = {"learning_rate": TrainConfig().optim.learning_rate, "rank": TrainConfig().adapter.rank}
    changes = {**usual, "sigma_schedule": "constant", "max_train_steps": 20}
    state = prepare(config.replace(**changes, lr_scheduler="constant"), samples)
    (flat,) = state.flats
    off = []
    for step in range(10):
        train_step(state, step)
        norms = flat.norm_state()
        assert norms is not None
        assert norms.interval == 0
        off.append(float((norms.stds / stds_now(flat) - 1).abs().max()))
    print("largest relative error of a filter norm by its age in steps:", [f"{value:.1e}" for value in off])
    assert 0 < off[0] < off[-1] < 0.005
    train_step(state, 10)
    later = flat.norm_state()
    assert later is not None
    assert float((later.stds / stds_now(flat) - 1).abs().max()) < off[-1], "they were not taken anew"


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_images_of_its_micro_batch(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "class.png")
    samples = load_samples(Path(str(config.data.instance_data_dir))).samples
    config = config.replace(train_batch_size=1, gradient_accumulation_steps=3)
    state = prepare(config, samples, load_samples(tmp_path, "an icon").samples)
    real, factors = micro_batches.diffusion_loss, iter([1.0, float("nan"), 1.0])
    monkeypatch.setattr(micro_batches, "diffusion_loss", lambda *args: real(*args) * next(factors))
    before = [parameter.detach().clone() for parameter in state.trainable.values()]
    bad = state.batches.samples_at(0, 1)[0].id
    message = (
        f"the loss of step 0 is not finite with these images: {bad}, class.png; resume with a lower --learning_rate"
    )
    with pytest.raises(RunError, match=message):
        train_step(state, step=0)
    assert all(torch.equal(a, b) for a, b in zip(before, state.trainable.values(), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_before_the_step(config: TrainConfig, value: float) -> None:
    state = prepare(config, load_samples(Path(str(config.data.instance_data_dir))).samples)
    before = [parameter.detach().clone() for parameter in state.trainable.values()]
    next(iter(state.trainable.values())).register_hook(lambda gradient: torch.full_like(gradient, value))
    images = ", ".join(sample.id for sample in state.batches.samples_at(0, 0))
    with pytest.raises(RunError, match=f"the gradient of step 0 is not finite with these images: {images}; "):
        train_step(state, step=0)
    assert all(torch.equal(a, b) for a, b in zip(before, state.trainable.values(), strict=True))


def test_a_gradient_norm_of_0_means_that_nothing_is_clipped(config: TrainConfig) -> None:
    off, never_reached, always = (learned(config.replace(max_grad_norm=norm)) for norm in (0.0, 1e9, 1e-9))
    assert all(torch.equal(value, never_reached[name]) for name, value in off.items())
    # far below AdamW's epsilon, so that its steps get small too
    norms = [sum(float(v.square().sum()) for k, v in state.items() if "lora_B" in k) for state in (off, always)]
    assert 0 < norms[1] < 0.1 * norms[0]


def test_a_second_training_in_one_process_may_have_another_precision(config: TrainConfig, tmp_path: Path) -> None:
    files = [
        train(config.replace(max_train_steps=1, mixed_precision=precision, output_dir=str(tmp_path / precision)))
        for precision in ("no", "bf16")
    ]
    assert all(file.is_file() for file in files)


def prepared_with_a_scaler(config: TrainConfig) -> tuple[TrainState, torch.amp.GradScaler]:
    """A state whose gradients are scaled as for fp16 on a GPU."""
    state = prepare(config, load_samples(Path(str(config.data.instance_data_dir))).samples)
    state.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    groups = [{**group, "fused": None} for group in state.optimizer.optimizer.param_groups]  # as for fp16
    scaler.scale(torch.ones(()))  # it gets its state on first use
    return replace(state, optimizer=AcceleratedOptimizer(torch.optim.AdamW(groups), scaler=scaler)), scaler


def test_the_fp16_scaler_skips_a_step_whose_gradient_overflows(config: TrainConfig) -> None:
    state, scaler = prepared_with_a_scaler(config)
    before = [parameter.detach().clone() for parameter in state.trainable.values()]
    next(iter(state.trainable.values())).register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    train_step(state, step=0)
    assert all(torch.equal(a, b) for a, b in zip(before, state.trainable.values(), strict=True))
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("method", ["nbar", "lora"])
def test_a_skipped_fp16_step_changes_no_weight_and_no_ema(config: TrainConfig, method: str) -> None:
    settings = {} if method == "lora" else {"bar_strength": 10.0}
    state, _ = prepared_with_a_scaler(config.replace(method=method, use_ema=True, **settings))
    assert state.ema is not None
    for step in range(2):
        train_step(state, step)
    before = [parameter.detach().clone() for parameter in (*state.trainable.values(), *state.ema.shadow_params)]
    taken = state.ema.optimization_step
    next(iter(state.trainable.values())).register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    train_step(state, step=2)
    after = [*state.trainable.values(), *state.ema.shadow_params]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert state.ema.optimization_step == taken == 2


def test_a_sam_step_without_ascent_is_logged_once(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sam, "_can_ascend", lambda length: False)
    state = prepare(
        config.replace(**for_method("sam"), rho=0.05, rho_rise=None),
        load_samples(Path(str(config.data.instance_data_dir))).samples,
    )
    for step in range(2):
        train_step(state, step)
    assert caplog.text.count("method=sam: ") == 1
    assert "step 0" in caplog.text


def test_the_scaler_of_fp16_goes_on_in_a_resumed_run(config: TrainConfig, tmp_path: Path) -> None:
    state, scaler = prepared_with_a_scaler(config)
    first = next(iter(state.trainable.values()))
    hook = first.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    train_step(state, step=0)  # the scale is halved
    hook.remove()
    train_step(state, step=1)  # and the steps since then are counted
    save_state(state, tmp_path, 2)
    again, resumed = prepared_with_a_scaler(config)
    assert load_state(again, tmp_path) == 2
    assert (resumed.get_scale(), resumed._get_growth_tracker()) == (2.0, 1)
    assert resumed.state_dict() == scaler.state_dict()


def test_an_fp16_run_stops_after_20_skipped_steps_in_a_row(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trainer.MAX_SKIPPED_STEPS == 20
    monkeypatch.setattr(trainer, "MAX_SKIPPED_STEPS", 3)
    state, _ = prepared_with_a_scaler(config)
    state.progress.config = state.config.replace(mixed_precision="fp16")
    overflows = True
    first = next(iter(state.trainable.values()))
    first.register_hook(lambda gradient: gradient.fill_(float("inf")) if overflows else gradient)
    for step in range(5):
        overflows = step != 2  # a finite step resets the count
        train_step(state, step)
    with pytest.raises(RunError, match=r"the gradient of step 5 is not finite .* --mixed_precision bf16"):
        train_step(state, 5)


@pytest.mark.parametrize(("device", "forked"), [("cpu", []), ("cuda:1", [torch.device("cuda:1")])])
def test_dropout_keeps_the_state_of_no_other_device(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, device: str, forked: list[torch.device]
) -> None:
    state = prepare(config.replace(lora_dropout=0.1), load_samples(Path(str(config.data.instance_data_dir))).samples)
    asked: Any = []
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices=None: (asked.append(devices), nullcontext())[1])
    monkeypatch.setattr(type(state.accelerator), "device", torch.device(device))
    with seeded_dropout(state, step=0, slot=0):
        pass
    assert asked == [forked]


def test_the_run_folder_records_the_run_without_absolute_paths_and_token(config: TrainConfig, tmp_path: Path) -> None:
    config = config.replace(
        checkpointing_steps=1,
        checkpoints_total_limit=2,
        validation_prompt="an icon",
        num_validation_images=2,
        hub_token="hf_thisIsASecret123",
    )
    path = train(config)
    run = RunDir(path.parent)
    steps = [event for event in run.events() if event["event"] == "step"]
    assert [event["step"] for event in steps] == [0, 1, 2, 3]
    assert set(steps[0]) == {"event", "step", "loss", "lr", "sigma", "draws", "seconds", "eta", "memory"}
    assert [event["sigma"] for event in steps] == pytest.approx([0, 0.1 * 0.146447, 0.05, 0.1 * 0.853553], rel=1e-4)
    *_, proof, finished, preview, change = run.events()
    assert finished == run.ending() == {"event": "finished", "step": 4}
    assert proof["event"] == "proof"
    assert proof["update_norms"]["unet"] > 0
    about = {"prompts": ["an icon", "an icon"], "seeds": [0, 1]}
    assert preview == {"event": "preview", "step": 4, "images": ["step-4-0.png", "step-4-1.png"], **about}
    assert change["event"] == "image_change"
    assert change["levels"] > 0
    assert [folder.name for folder in run.checkpoints()] == ["checkpoint-3", "checkpoint-4"]
    assert {file.name for file in run.images.iterdir()} == {
        f"{name}-{index}.png" for name in ("base", "step-2", "step-4") for index in (0, 1)
    }
    saved = json.loads(run.config_file.read_text())
    assert saved["resolution"] == 32
    train(config.replace(max_train_steps=5, resume_from_checkpoint="latest", validation_prompt=None))
    assert run.ending() == {"event": "finished", "step": 5}
    for file in path.parent.rglob("*"):
        if file.is_file():
            assert tmp_path.parent.name.encode() not in file.read_bytes(), file.name
            assert b"thisIsASecret" not in file.read_bytes(), file.name


def test_a_folder_with_the_user_s_files_is_not_changed(config: TrainConfig, icons: Path, tmp_path: Path) -> None:
    """Training images in `images` and a README do not belong to a run."""
    project = tmp_path / "project"
    shutil.copytree(icons, project / "images")
    (project / "README.md").write_text("mine")
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"output_dir=.* images, README.md"):
        train(config.replace(instance_data_dir=str(project / "images"), output_dir=str(project)))
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before


def test_an_initial_lora_or_base_is_not_moved_aside_with_an_earlier_run(config: TrainConfig) -> None:
    """Otherwise the run could not be resumed, because it reads them again."""
    full = config.replace(method="lora", adapter="full", lora_alpha=None, checkpointing_steps=2, max_train_steps=2)
    folder = train(full).parent
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    for setting, place in (
        ("init_lora", LORA_FILE),
        ("init_lora", f"checkpoint-2/{LORA_FILE}"),
        ("pretrained_model_name_or_path", "merged"),
        ("pretrained_vae_model_name_or_path", "merged/vae"),
    ):
        with pytest.raises(ConfigError, match=rf"{setting}=.* output_dir"):
            train(full.replace(adapter="lora", **{setting: str(folder / place)}))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_a_merged_pipeline_is_moved_aside_with_its_run_and_another_of_that_name_stays(config: TrainConfig) -> None:
    config = config.replace(max_train_steps=1, sigma_schedule="constant")
    full = config.replace(method="lora", adapter="full", lora_alpha=None)
    folder = train(full).parent
    first = (folder / "merged" / "model_index.json").stat().st_mtime_ns
    train(config)
    assert (folder / "earlier-1" / "merged" / "model_index.json").stat().st_mtime_ns == first
    (folder / "merged").mkdir()  # as by `merge --output`, not by a run
    train(config)
    assert (folder / "merged").is_dir()
    train(full)
    assert not list((folder / "earlier-3" / "merged").iterdir()), "it is moved out of the way, not written over"


@pytest.mark.parametrize(
    ("images", "settings", "processes", "steps"),
    [
        (23, {"train_batch_size": 4}, 1, 6),
        (5, {"train_batch_size": 1, "gradient_accumulation_steps": 4}, 1, 2),
        (23, {"train_batch_size": 4, "gradient_accumulation_steps": 2}, 2, 2),
        (10, {"train_batch_size": 2, "gradient_accumulation_steps": 4, "num_class_images": 100}, 1, 13),
        (10, {"train_batch_size": 2, "num_class_images": 4}, 1, 5),
    ],
)
def test_an_epoch_has_as_many_steps_as_in_diffusers(
    images: int, settings: dict[str, Any], processes: int, steps: int
) -> None:
    """max(class, instance) images; batches of them per process; optimizer steps: each rounded up."""
    prior = {"with_prior_preservation": True, "class_data_dir": "x", "class_prompt": "x"}
    chosen = TrainConfig.from_dict(settings | (prior if "num_class_images" in settings else {}))
    assert steps_per_epoch(chosen, images, processes) == steps


def test_epochs_give_the_number_of_steps(config: TrainConfig) -> None:
    samples = load_samples(Path(str(config.data.instance_data_dir))).samples
    state = prepare(config.replace(max_train_steps=None, num_train_epochs=5, gradient_accumulation_steps=2), samples)
    assert state.total_steps == 5  # 3 images, so 2 batches, in steps of 2 batches
    assert [state.batches.epoch_after(step) for step in (-1, 0, 3)] == [0, 1, 4]


def test_latest_without_a_checkpoint_starts_a_run(config: TrainConfig, caplog: Any) -> None:
    first = config.replace(resume_from_checkpoint="latest", checkpointing_steps=1, max_train_steps=2)
    with caplog.at_level("INFO"):
        path = train(first)
    assert "has no checkpoint" in caplog.text
    run = RunDir(path.parent)
    assert run.config()["resume_from_checkpoint"] is None
    for checkpoint in run.checkpoints():
        shutil.rmtree(checkpoint)  # as after a run that was killed before its first one
    lines = run.events_file.read_text(encoding="utf-8").splitlines()
    run.events_file.write_text("".join(f"{line}\n" for line in lines if '"finished"' not in line), encoding="utf-8")
    (path.parent / "notes.txt").write_text("mine", encoding="utf-8")
    train(first)
    assert (path.parent / "earlier-1" / path.name).is_file()
    assert (path.parent / "notes.txt").read_text(encoding="utf-8") == "mine"
