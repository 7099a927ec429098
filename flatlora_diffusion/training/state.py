"""Everything that a training step needs: the base with its LoRA, the perturbation, optimizer, schedule and feed."""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, broadcast_object_list
from diffusers.training_utils import EMAModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flatlora_diffusion.adapter.lora import add_lora, add_text_lora, trainable_parameters
from flatlora_diffusion.adapter.new_tokens import add_tokens, embedding_parameters
from flatlora_diffusion.config import SAMPLES, ConfigError, TrainConfig
from flatlora_diffusion.data.batches import Feed
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.data.prompts import warn_of_cut_captions
from flatlora_diffusion.ground.run_dir import RunDir
from flatlora_diffusion.lora_files.initial import read_lora, set_lora
from flatlora_diffusion.method.perturbation import FlatLora
from flatlora_diffusion.sdxl.denoiser import Denoiser
from flatlora_diffusion.sdxl.device import DTYPES, TEXT_PARTS, this_process
from flatlora_diffusion.sdxl.objective import Objective, is_edm_scheduler, objective_of
from flatlora_diffusion.sdxl.pipeline import Sdxl, load_sdxl
from flatlora_diffusion.training.optimizer import Group, make_lr_schedule, make_optimizer

logger = logging.getLogger(__name__)

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet_ml": "comet_ml"}  # and their packages


@dataclass
class TrainState:
    """Everything that a training step needs. `model` is what the loss calls, as accelerate has wrapped it."""

    config: TrainConfig
    accelerator: Accelerator
    sdxl: Sdxl
    model: nn.Module
    objective: Objective
    trainable: dict[str, nn.Parameter]
    optimizer: Any
    lr_schedule: torch.optim.lr_scheduler.LambdaLR
    flats: list[FlatLora]
    feed: Feed
    run: RunDir
    total_steps: int
    ema: EMAModel | None
    tokens: dict[str, list[str]]
    steps_done: int | None = 0  # None while an update is half done
    skipped_steps: int = 0  # how many the scaler of fp16 has left out in a row
    draws: str = ""  # the hash of what the last step drew, its eps apart

    def trains_tokens(self, step: int) -> bool:
        """Whether pivotal tuning still trains its new tokens in `step`."""
        return bool(self.tokens) and step < self.config.tokens.train_text_encoder_ti_frac * self.total_steps


def seeded(config: TrainConfig) -> TrainConfig:
    """`config` with a seed: its own, or one from the operating system, the same on all processes."""
    if config.run.seed is not None:
        return config
    this_process()  # starts the process group that the broadcast needs
    (seed,) = broadcast_object_list([secrets.randbelow(2**31)])
    logger.info("seed %d", seed)
    return config.replace(seed=seed)


def prepare(config: TrainConfig, samples: Sequence[Sample], class_samples: Sequence[Sample] = ()) -> TrainState:
    """Load the base, add the LoRA and settle what `config` leaves open (precision, resolution, steps, seed)."""
    accelerator = _accelerator(config)
    check_distribution(accelerator.distributed_type)
    config = seeded(config).replace(mixed_precision=accelerator.mixed_precision)
    set_backends(config)
    dtype = DTYPES[str(config.optim.mixed_precision)]
    # With --offload the UNet comes last, so that it need not share the device with the encoding of the images.
    is_unet_last = config.model.offload and config.model.quantize_base is None
    sdxl = load_sdxl(config.model, torch.device("cpu") if is_unet_last else accelerator.device, dtype)
    config = _resolved(config, sdxl)
    tokens = _adapt(sdxl, config)
    warn_of_cut_captions(sdxl.pipeline, [*samples, *class_samples], tokens)
    if is_unet_last:
        for part in (*TEXT_PARTS, "vae"):
            getattr(sdxl.pipeline, part).to(accelerator.device)
    device = accelerator.device
    feed = Feed(config, sdxl, samples, accelerator.num_processes, class_samples, tokens, device)
    total_steps = config.optim.max_train_steps or config.optim.num_train_epochs * feed.steps_per_epoch
    config = feed.config = config.replace(max_train_steps=total_steps)
    if config.model.offload:
        _offload(sdxl, feed)
        if is_unet_last:
            sdxl.unet.to(device)
    parts = {"unet": sdxl.unet, **{part: getattr(sdxl.pipeline, part) for part in TEXT_PARTS}}
    trainable = {
        f"{part}.{name}": parameter
        for part, model in parts.items()
        for name, parameter in trainable_parameters(model).items()
    }
    groups = _groups(config, sdxl, trainable)
    optim = config.optim
    per_step = optim.train_batch_size * optim.gradient_accumulation_steps * accelerator.num_processes
    optimizer = make_optimizer(optim, groups, per_step if optim.scale_lr else 1)
    lr_schedule = make_lr_schedule(optim, optimizer, groups, total_steps)
    model: nn.Module = sdxl.unet
    if config.trains_text:
        model = Denoiser(sdxl.unet, [parts[part] for part in TEXT_PARTS], config.model.clip_skip)
    _keep_base_local(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    return TrainState(
        config=config,
        accelerator=accelerator,
        sdxl=sdxl,
        model=model,
        objective=objective_of(config.objective, sdxl.scheduler),
        trainable=trainable,
        optimizer=optimizer,
        lr_schedule=lr_schedule,
        flats=_flats(config, parts, total_steps),
        feed=feed,
        run=RunDir(Path(config.run.output_dir)),
        total_steps=total_steps,
        ema=EMAModel(trainable.values(), decay=optim.ema_decay, foreach=True) if optim.use_ema else None,
        tokens=tokens,
    )


@contextmanager
def averaged(state: TrainState) -> Iterator[None]:
    """The exponential moving average in place of the trained weights while this is open; nothing without --use_ema."""
    if state.ema is None:
        yield
        return
    state.ema.store(state.trainable.values())
    state.ema.copy_to(state.trainable.values())
    try:
        yield
    finally:
        state.ema.restore(state.trainable.values())


def _accelerator(config: TrainConfig) -> Accelerator:
    run = config.run
    wanted = list(TRACKERS) if run.report_to == "all" else [] if run.report_to == "none" else [run.report_to]
    for tracker in wanted:
        if tracker not in TRACKERS:
            raise ConfigError(f"report_to={tracker!r} is not one of {', '.join(TRACKERS)}, all, none")
        if importlib.util.find_spec(TRACKERS[tracker]) is None and run.report_to != "all":
            raise ConfigError(f"report_to={tracker!r} needs the package {TRACKERS[tracker]}, or use --report_to none")
    output = Path(run.output_dir)
    try:
        return Accelerator(
            mixed_precision=config.optim.mixed_precision,
            log_with=[tracker for tracker in wanted if importlib.util.find_spec(TRACKERS[tracker])] or None,
            project_config=ProjectConfiguration(str(output), logging_dir=str(output / run.logging_dir)),
        )
    except ValueError as error:
        raise ConfigError(
            f"mixed_precision={config.optim.mixed_precision!r} cannot be used on this machine: {error}"
        ) from error


def check_distribution(kind: DistributedType) -> None:
    """Raises ConfigError for launchers that shard the frozen base, which the perturbation and saving do not know."""
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"accelerate was configured for {kind.value}, which shards the base; use MULTI_GPU, and --quantize_base "
            f"if the base does not fit ({SAMPLES / 'presets' / 'accelerate'} has ready files)"
        )


def set_backends(config: TrainConfig) -> None:
    """Choose the kernels as `config` says: TF32 or not, and with --deterministic an error for any that is not."""
    torch.backends.cuda.matmul.allow_tf32 = config.model.allow_tf32
    if config.optim.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(config.optim.deterministic)


def _resolved(config: TrainConfig, sdxl: Sdxl) -> TrainConfig:
    """`config` with the resolution settled. Raises ConfigError for a size that cannot be."""
    resolution = config.data.resolution or sdxl.resolution
    if resolution % sdxl.size_step:
        near = max(1, round(resolution / sdxl.size_step)) * sdxl.size_step
        raise ConfigError(
            f"resolution={resolution} must be a multiple of {sdxl.size_step} for this base; {near} is the nearest"
        )
    if config.objective.snr_gamma is not None and is_edm_scheduler(sdxl.pipeline.scheduler):
        raise ConfigError("--snr_gamma does not fit this base, whose scheduler is EDM; leave it out")
    return config.replace(resolution=resolution)


def _adapt(sdxl: Sdxl, config: TrainConfig) -> dict[str, list[str]]:
    """Add what is trained: LoRAs in fp32 and new tokens, which are returned by placeholder."""
    assert config.run.seed is not None
    pipeline, seed, adapter = sdxl.pipeline, config.run.seed, config.adapter
    initial = None if adapter.init_lora is None else read_lora(pipeline, Path(adapter.init_lora))
    init_seed = seed if adapter.lora_init_seed is None else adapter.lora_init_seed
    add_lora(sdxl.unet, adapter, init_seed)
    if adapter.train_text_encoder:
        for part in TEXT_PARTS:
            add_text_lora(getattr(pipeline, part), adapter, init_seed, part, config.model.clip_skip)
    if initial is not None:
        set_lora(pipeline, initial)
    tokens = add_tokens(pipeline, config.tokens, seed) if config.tokens.train_text_encoder_ti else {}
    sdxl.unet.train()
    if config.trains_text:
        for part in TEXT_PARTS:
            getattr(pipeline, part).train()
    if config.optim.gradient_checkpointing:
        sdxl.unet.enable_gradient_checkpointing()
        if config.trains_text:
            for part in TEXT_PARTS:
                getattr(pipeline, part).gradient_checkpointing_enable({"use_reentrant": False})
    return tokens


def _offload(sdxl: Sdxl, feed: Feed) -> None:
    """Move to the CPU what the steps do not need: all outputs of it are cached."""
    if not feed.config.trains_text:
        for part in TEXT_PARTS:
            getattr(sdxl.pipeline, part).to("cpu")
    if not feed.needs_vae:
        sdxl.vae.to("cpu")


def _groups(config: TrainConfig, sdxl: Sdxl, trainable: dict[str, nn.Parameter]) -> list[Group]:
    embeddings = list(embedding_parameters(sdxl.pipeline).values())
    rows = {id(parameter) for parameter in embeddings}
    unet = [parameter for name, parameter in trainable.items() if name.startswith("unet.")]
    text = [p for name, p in trainable.items() if not name.startswith("unet.") and id(p) not in rows]
    tokens = config.tokens
    groups = [
        Group(unet),
        Group(text, is_text=True, share=tokens.train_text_encoder_frac),
        Group(embeddings, is_text=True, share=tokens.train_text_encoder_ti_frac),
    ]
    return [group for group in groups if group.parameters]


def _keep_base_local(model: nn.Module) -> None:
    """Have DDP send no frozen weights: every process has loaded the same ones, and torchao's cannot be sent."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)


def _flats(config: TrainConfig, parts: dict[str, Any], total_steps: int) -> list[FlatLora]:
    """The perturbation of each part that has a LoRA; none for plain LoRA."""
    perturb, seed = config.perturb, config.run.seed
    assert seed is not None
    if perturb.method != "flat-lora":
        return []
    names = ["unet", *(TEXT_PARTS if config.adapter.train_text_encoder else ())]
    return [
        FlatLora(
            parts[name],
            sigma=perturb.strength,
            schedule=perturb.sigma_schedule,
            total_steps=total_steps,
            seed=seed if perturb.perturb_seed is None else perturb.perturb_seed,
            noise=perturb.perturb_noise,
            prefix=name,
        )
        for name in names
    ]
