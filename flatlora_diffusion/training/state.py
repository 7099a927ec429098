"""The state of a run: the base with its LoRA, the gradient computation, optimizer, schedule and batches."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flatlora_diffusion.adapter.adalora import RankBudget, orthogonality
from flatlora_diffusion.adapter.new_tokens import embedding_parameters, replace_in_captions
from flatlora_diffusion.adapter.setup import adapt, adapted_models, load_initial, trainable_by_part
from flatlora_diffusion.config import SAMPLES, ConfigError, ModelConfig, TrainConfig
from flatlora_diffusion.data.batches import Batches, build_batches
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.families.base import Base
from flatlora_diffusion.families.device import DTYPES
from flatlora_diffusion.families.objective import Objective
from flatlora_diffusion.families.registry import load_base
from flatlora_diffusion.lora_files.metadata import portable_base_name
from flatlora_diffusion.lora_files.reading import load_init_lora
from flatlora_diffusion.method.flat_lora import FlatLora
from flatlora_diffusion.method.gradient import GradientInputs, StepGradient, step_gradient
from flatlora_diffusion.storage.rng import derive_seed
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.training.optimizer import build_optimizer
from flatlora_diffusion.training.resolve_config import resolve_after_loading
from flatlora_diffusion.training.trackers import end_trackers

CPU = torch.device("cpu")
TRACKERS = ("tensorboard", "wandb", "comet_ml")  # names of packages, too


@dataclass(frozen=True)
class LossIncrease:
    """How far SAM's perturbation increases a step's loss, relative to the loss.

    `measured` by the losses of the step, `expected` to first order, by rho and the gradient.
    """

    measured: float
    expected: float


@dataclass
class Progress:
    """The mutable part of a run's state.

    Attributes:
        config: the run's settings; rho and the length of sigma's ramp may be resolved late.
        gradient: computes the gradient of a step.
        steps_done: optimizer steps done; None during an update.
        skipped_steps: the last steps in a row that fp16's scaler has skipped.
        loss_scale: that of the last step; None without fp16's scaler.
        last_step: the step whose weights are the result, if held-out images have chosen it.
        average: with --members, a description of the average that the weights are.
        draws: hash of what the last step drew, except for eps.
        loss_increase: that of the last step, if the method is SAM-like.
        missed_ascents: steps in which a SAM-like method had a gradient to descend but none to climb.
    """

    config: TrainConfig
    gradient: StepGradient
    steps_done: int | None = 0
    skipped_steps: int = 0
    loss_scale: float | None = None
    last_step: int | None = None
    average: str = ""
    draws: str = ""
    loss_increase: LossIncrease | None = None
    missed_ascents: int = 0


@dataclass(frozen=True)
class TrainState:
    """Everything that a training step needs.

    Attributes:
        model: the module that the loss calls, as wrapped by accelerate.
        tokens: pivotal tuning's new tokens by placeholder.
        base_name: the base's name for files and other tools.
        ranks: AdaLoRA's budget of ranks.
        heldout: images of the run that are not trained on.
    """

    accelerator: Accelerator
    base: Base
    model: nn.Module
    objective: Objective
    trainable: dict[str, nn.Parameter]
    optimizer: Any
    lr_schedule: torch.optim.lr_scheduler.LambdaLR
    batches: Batches
    run: RunDir
    total_steps: int
    ema: EMAModel | None
    tokens: dict[str, list[str]]
    base_name: str | None
    progress: Progress
    ranks: RankBudget | None = None
    heldout: Sequence[Sample] = ()

    @property
    def config(self) -> TrainConfig:
        """The run's settings as they are now."""
        return self.progress.config

    @property
    def gradient(self) -> StepGradient:
        """Computes the gradient of a step."""
        return self.progress.gradient

    @property
    def flats(self) -> Sequence[FlatLora]:
        """The perturbation of each adapted model; empty if the method draws no eps."""
        return self.gradient.flats

    @property
    def end(self) -> int:
        """The step whose weights are the result."""
        last = self.progress.last_step
        return self.total_steps if last is None else last

    def penalty(self) -> Tensor | None:
        """AdaLoRA's penalty, which is added to the loss; None for other adapters."""
        return None if self.ranks is None else orthogonality(self.base.denoiser)

    def rebuild_gradient(self) -> None:
        """Recreate the gradient computation for the current settings and weights."""
        adapted = adapted_models(self.base.pipeline, self.config.adapter)
        inputs = GradientInputs(adapted, self.trainable, self.config.perturb, self.batches.seed, self.total_steps)
        self.progress.gradient = step_gradient(inputs)

    def trains_tokens(self, step: int) -> bool:
        """Whether `step` still trains pivotal tuning's new tokens."""
        return bool(self.tokens) and step < self.config.tokens.train_text_encoder_ti_frac * self.total_steps

    def close(self) -> None:
        """End loader threads, hooks and trackers, and free the memory; the state cannot be used afterwards."""
        self.batches.close()
        self.gradient.detach()
        # If DDP held the last reference to the process group, freeing it could deadlock with a thread that waits for
        # the GIL.
        object.__setattr__(self, "model", self.accelerator.unwrap_model(self.model))
        self.accelerator.free_memory()
        end_trackers(self.accelerator)


LoadBase = Callable[[ModelConfig, torch.device, torch.dtype], Base]


def prepare(
    config: TrainConfig,
    samples: Sequence[Sample],
    class_samples: Sequence[Sample] = (),
    heldout: Sequence[Sample] = (),
    load: LoadBase = load_base,
) -> TrainState:
    """Load the base by `load` and build everything that a training step needs.

    In the state's samples pivotal tuning's new tokens replace the placeholders. `class_samples` are for prior
    preservation, `heldout` are images of the run that are not trained on.
    """
    accelerator = _accelerator(config)
    set_backends(config)
    precision, processes = accelerator.mixed_precision, accelerator.num_processes
    dtype = DTYPES[config.optim.base_dtype or precision]
    base = load(config.model, CPU if config.model.is_unet_last else accelerator.device, dtype)
    resolution = base.checked_resolution(config.data.resolution)
    config = resolve_after_loading(config, precision, resolution, base.size_step, samples, processes)
    pipeline, optim, init_lora = base.pipeline, config.optim, config.adapter.init_lora
    initial = None if init_lora is None else load_init_lora(pipeline, Path(init_lora))  # before LoRA layers are added
    text_parts = base.family.text_parts
    total_steps = optim.max_train_steps
    assert config.run.seed is not None
    assert total_steps is not None
    tokens = adapt(pipeline, config)
    samples, class_samples = replace_in_captions(samples, tokens), replace_in_captions(class_samples, tokens)
    adapted = adapted_models(pipeline, config.adapter)
    trainable, embeddings = trainable_by_part(pipeline), embedding_parameters(pipeline)
    if initial is not None:
        load_initial(pipeline, initial.updates, initial.magnitudes)
    optimizer, lr_schedule = build_optimizer(config, trainable, embeddings.values(), processes, adapted.values())
    if config.model.is_unet_last:
        base.move((*text_parts, "vae"), accelerator.device)
    batches = build_batches(config, base, samples, processes, class_samples)
    if config.model.offload:  # the steps do not need models whose outputs are all cached
        base.move((*(() if config.encodes_in_steps else text_parts), *(() if batches.needs_vae else ("vae",))), CPU)
    if config.model.is_unet_last:
        base.move((base.family.denoiser,), accelerator.device)
    trained = base.trained_model(config.trains_text)
    # Have DDP send no frozen weights: all processes have loaded the same ones, and torchao's cannot be sent.
    frozen = [name for name, parameter in trained.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(trained, frozen)
    model, optimizer = accelerator.prepare(trained, optimizer)
    gradient_inputs = GradientInputs(adapted, trainable, config.perturb, config.run.seed, total_steps)
    return TrainState(
        accelerator=accelerator,
        base=base,
        model=model,
        objective=base.objective(config.objective),
        trainable=trainable,
        optimizer=optimizer,
        lr_schedule=lr_schedule,
        batches=batches,
        run=RunDir(Path(config.run.output_dir)),
        total_steps=total_steps,
        # After the UNet has moved, so that the averages are on the same device.
        ema=EMAModel(trainable.values(), decay=optim.ema_decay, foreach=True) if optim.use_ema else None,
        ranks=RankBudget(base.denoiser, total_steps) if config.adapter.adapter == "adalora" else None,
        tokens=tokens,
        base_name=portable_base_name(config),
        progress=Progress(config, step_gradient(gradient_inputs)),
        heldout=heldout,
    )


@contextmanager
def seeded_dropout(state: TrainState, step: int, slot: int) -> Iterator[None]:
    """Seed the global generator, which LoRA dropout draws from, for this micro-batch and restore it at the end."""
    if state.config.adapter.lora_dropout == 0:
        yield
        return
    device = state.accelerator.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(state.batches.seed, "dropout", step, slot))
        yield


def memory_in_use(device: torch.device) -> int:
    """Bytes: the peak of a CUDA device's allocator, or this process's resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


@contextmanager
def ema_weights(state: TrainState) -> Iterator[None]:
    """Use the exponential moving average in place of the trained weights; does nothing without --use_ema."""
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
    names = list(TRACKERS) if run.report_to == "all" else [] if run.report_to == "none" else [run.report_to]
    for tracker in names:
        if tracker not in TRACKERS:
            raise ConfigError(f"report_to={tracker!r} is unknown; use {', '.join(TRACKERS)}, all or none")
        if importlib.util.find_spec(tracker) is None and run.report_to != "all":
            raise ConfigError(f"report_to={tracker!r} needs the package {tracker}; install it or use --report_to none")
    output = Path(run.output_dir)
    try:
        accelerator = Accelerator(
            mixed_precision=config.optim.mixed_precision,
            log_with=[tracker for tracker in names if importlib.util.find_spec(tracker)] or None,
            project_config=ProjectConfiguration(str(output), logging_dir=str(output / run.logging_dir)),
        )
    except ValueError as error:
        raise ConfigError(
            f"mixed_precision={config.optim.mixed_precision!r} cannot be used on this machine: {error}"
        ) from error
    check_distribution(accelerator.distributed_type)
    return accelerator


def check_distribution(kind: DistributedType) -> None:
    """Raise ConfigError for launchers that shard the frozen base: checkpoints cannot save shards."""
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"accelerate was configured for {kind.value}, which shards the base; use MULTI_GPU, and --quantize_base "
            f"if the base does not fit ({SAMPLES / 'presets' / 'accelerate'} has ready files)"
        )


def set_backends(config: TrainConfig) -> None:
    """Choose the kernels: TF32 or not, and with --deterministic an error for kernels that are not deterministic."""
    torch.backends.cuda.matmul.allow_tf32 = config.model.allow_tf32
    if config.optim.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(config.optim.deterministic)
