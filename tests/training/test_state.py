"""A prepared run: the base is frozen, a resumed DoRA is unchanged, unsupported launchers and trackers are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from one_process_ddp import in_ddp
from tiny_runs import samples_of, trained

from flatlora_diffusion.adapter.layers import lora_layers
from flatlora_diffusion.config import ConfigError, TrainConfig
from flatlora_diffusion.families.sdxl.pipeline import Sdxl
from flatlora_diffusion.training.checkpoint import load_state, save_state
from flatlora_diffusion.training.state import check_distribution, prepare, set_backends
from flatlora_diffusion.training.trainer import train_step


def test_sdxl_is_a_frozen_base(config: TrainConfig) -> None:
    state = prepare(config, samples_of(config))
    assert isinstance(state.base, Sdxl)
    pipeline, trained = state.base.pipeline, {id(parameter) for parameter in state.trainable.values()}
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        learns = {name: id(p) in trained for name, p in part.named_parameters() if p.requires_grad}
        assert all(learns.values())
        assert all("lora_" in name for name in learns)
        assert bool(learns) is (part is pipeline.unet)


def test_a_dora_on_a_half_precision_base_resumes_exactly(config: TrainConfig, tmp_path: Path) -> None:
    dora = config.replace(use_dora=True, learning_rate=0.0, mixed_precision="bf16")
    save_state(trained(dora, 1), tmp_path, 1)
    again = prepare(dora, samples_of(config))
    for layer in lora_layers(again.base.denoiser).values():
        layer.lora_magnitude_vector["default"].weight.data.zero_()
    assert load_state(again, tmp_path) == 1
    for name, layer in lora_layers(again.base.denoiser).items():
        norms = layer.get_base_layer().weight.float().norm(dim=1)
        magnitude = layer.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(magnitude, norms, rtol=1e-6, atol=0, msg=name)


def test_a_base_in_fp32_is_rounded_after_eps_was_added_and_not_before(config: TrainConfig) -> None:
    config = config.replace(mixed_precision="bf16", sigma=0.1, perturb_draw="full")
    half, whole = (prepare(config.replace(base_dtype=dtype), samples_of(config)) for dtype in (None, "fp32"))
    frozen = [layer.get_base_layer().weight.dtype for layer in lora_layers(whole.base.denoiser).values()]
    assert set(frozen) == {torch.float32}
    assert {part.dtype for part in (whole.base.denoiser, whole.base.pipeline.text_encoder)} == {torch.float32}
    assert half.base.denoiser.dtype == torch.bfloat16
    name, layer = next(iter(lora_layers(whole.base.denoiser).items()))
    weight, inputs = layer.get_base_layer().weight, torch.eye(layer.in_features)
    eps = whole.flats[0].noise(name, step=5).float()
    with whole.flats[0].perturb(step=5), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        seen = layer(inputs).float().T
    bias = layer.get_base_layer().bias
    assert bias is None, "else it were in what is seen"
    assert torch.equal(seen, (weight + eps).bfloat16().float())
    assert not torch.equal(seen, (weight.bfloat16().float() + eps).bfloat16().float())


def test_a_base_in_fp32_without_eps_trains_a_plain_lora(config: TrainConfig) -> None:
    config = config.replace(mixed_precision="bf16", base_dtype="fp32")
    none, plain = (trained(config.replace(**how)) for how in ({"sigma": 0.0}, {"method": "lora"}))
    for name, value in plain.trainable.items():
        assert torch.equal(none.trainable[name], value), name


def test_tf32_follows_the_settings(config: TrainConfig) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for wanted in (True, False, True):
            set_backends(config.replace(allow_tf32=wanted))
            assert torch.backends.cuda.matmul.allow_tf32 is wanted
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(
    ("report_to", "message"),
    [
        ("comet_ml", "report_to='comet_ml' needs the package comet_ml"),
        ("paper", "report_to='paper'.* tensorboard, wandb, comet_ml, all"),
    ],
)
def test_a_missing_tracker_is_an_error(config: TrainConfig, report_to: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(config.replace(report_to=report_to), samples_of(config))


def test_launchers_that_shard_the_base_are_refused() -> None:
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        with pytest.raises(ConfigError, match=f"configured for {kind.value}, which shards the base; use MULTI_GPU"):
            check_distribution(kind)
    check_distribution(DistributedType.MULTI_GPU)
    check_distribution(DistributedType.NO)


def test_several_processes_send_no_weights_of_a_quantized_base(config: TrainConfig) -> None:
    pytest.importorskip("torchao")
    state = prepare(config.replace(quantize_base="torchao-int8"), samples_of(config))
    with in_ddp(state.model) as model:
        object.__setattr__(state, "model", model)
        train_step(state, step=0)
    assert all(parameter.any() for name, parameter in state.trainable.items() if "lora_B" in name), "nothing learned"
