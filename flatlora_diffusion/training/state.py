"""Everything that a training step needs: the base with its LoRA, the perturbation, optimizer, schedule and batches."""

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
from flatlora_diffusion.adapter.new_tokens import embedding_parameters, in_captions
from flatlora_diffusion.adapter.setup import adapt, adapted_models, start_from, trainable_of
from flatlora_diffusion.config import SAMPLES, TEXT_PARTS, ConfigError, ModelConfig, TrainConfig
from flatlora_diffusion.data.batches import Batches, build_batches
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.lora_files.metadata import portable_base_name
from flatlora_diffusion.lora_files.reading import ImportedLora, load_init_lora
from flatlora_diffusion.method.build import step_gradient
from flatlora_diffusion.method.flat_lora import FlatLora
from flatlora_diffusion.method.gradient import GradientInputs, StepGradient
from flatlora_diffusion.sdxl.denoiser import denoiser_of
from flatlora_diffusion.sdxl.device import DTYPES
from flatlora_diffusion.sdxl.objective import Objective, objective_of
from flatlora_diffusion.sdxl.pipeline import Sdxl, load_sdxl
from flatlora_diffusion.storage.rng import derive_seed
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.training.optimizer import optimizer_of
from flatlora_diffusion.training.resolve_config import settled
from flatlora_diffusion.training.trackers import end_trackers

CPU = torch.device("cpu")
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet_ml": "comet_ml"}  # and their packages


@dataclass(frozen=True)
class Rise:
    """How far an ascent has lifted a step's loss, as a share of it, and how far it does to first order."""

    found: float
    expected: float


@dataclass
class Progress:
    """What changes while a run goes on.

    Attributes:
        config: the run's settings; rho and the length of a ramp may be settled after the rest.
        gradient: how the gradient of a step is taken.
        steps_done: optimizer steps done; None while an update is half done.
        skipped_steps: steps in a row that fp16's scaler has left out.
        last_step: the step whose weights are the result, where held-out images or folds have chosen it.
        average: in words what the weights are the average of, for a run with --members.
        draws: hash of what the last step drew, its eps apart.
        rise: how far the last step's perturbation increased the loss, where the method ascends.
    """

    config: TrainConfig
    gradient: StepGradient
    steps_done: int | None = 0
    skipped_steps: int = 0
    last_step: int | None = None
    average: str = ""
    draws: str = ""
    rise: Rise | None = None


@dataclass(frozen=True)
class TrainState:
    """Everything that a training step needs.

    Attributes:
        model: what the loss calls, as accelerate has wrapped it.
        tokens: pivotal tuning's new tokens by placeholder.
        base: the base's name, as files and other tools know it.
        ranks: the ranks that AdaLoRA's layers have left.
        heldout: images of the run that are not trained on.
        progress: what changes from step to step.
    """

    accelerator: Accelerator
    sdxl: Sdxl
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
    base: str | None
    progress: Progress
    ranks: RankBudget | None = None
    heldout: Sequence[Sample] = ()

    @property
    def config(self) -> TrainConfig:
        """The run's settings as they are now."""
        return self.progress.config

    @property
    def gradient(self) -> StepGradient:
        """How the gradient of a step is taken now."""
        return self.progress.gradient

    @property
    def flats(self) -> Sequence[FlatLora]:
        """The perturbation of each adapted model; none where the method draws no eps."""
        return self.gradient.flats

    @property
    def end(self) -> int:
        """The step after which the result is as it is."""
        last = self.progress.last_step
        return self.total_steps if last is None else last

    def penalty(self) -> Tensor | None:
        """AdaLoRA's penalty, which is added to the loss of the images; None for other adapters."""
        return None if self.ranks is None else orthogonality(self.sdxl.unet)

    def begin_gradient(self) -> None:
        """Build the method's gradient anew, for the settings and weights as they are now."""
        adapted = adapted_models(self.sdxl.pipeline, self.config.adapter)
        inputs = GradientInputs(adapted, self.trainable, self.config.perturb, self.batches.seed, self.total_steps)
        self.progress.gradient = step_gradient(inputs)

    def trains_tokens(self, step: int) -> bool:
        """Whether pivotal tuning still trains its new tokens in `step`."""
        return bool(self.tokens) and step < self.config.tokens.train_text_encoder_ti_frac * self.total_steps


@dataclass(frozen=True)
class Given:
    """What a run is built from: `config` leaves nothing open, and all that is read has been read."""

    config: TrainConfig
    accelerator: Accelerator
    sdxl: Sdxl
    objective: Objective
    initial: ImportedLora | None
    base: str | None


def prepare(
    config: TrainConfig,
    samples: Sequence[Sample],
    class_samples: Sequence[Sample] = (),
    heldout: Sequence[Sample] = (),
    load: Callable[[ModelConfig, torch.device, torch.dtype], Sdxl] = load_sdxl,
) -> TrainState:
    """Settle what `config`, which has its seed, leaves open (precision, resolution, steps), then build from it.

    `load` gets the base. From here on captions hold pivotal tuning's new tokens in place of their placeholders.
    """
    given = _given(config, samples, load)
    config, accelerator, sdxl = given.config, given.accelerator, given.sdxl
    pipeline, processes, optim = sdxl.pipeline, accelerator.num_processes, config.optim
    total_steps = optim.max_train_steps
    assert config.run.seed is not None
    assert total_steps is not None
    tokens = adapt(pipeline, config)
    samples, class_samples = (in_captions(some, tokens) for some in (samples, class_samples))
    adapted = adapted_models(pipeline, config.adapter)
    trainable, embeddings = trainable_of(pipeline), embedding_parameters(pipeline)
    if given.initial is not None:
        start_from(pipeline, given.initial.updates, given.initial.magnitudes)
    optimizer, lr_schedule = optimizer_of(config, trainable, embeddings.values(), processes, adapted.values())
    if config.model.is_unet_last:
        sdxl.move((*TEXT_PARTS, "vae"), accelerator.device)
    batches = build_batches(config, sdxl, samples, processes, class_samples)
    if config.model.offload:  # what the steps do not need goes: all outputs of it are cached
        sdxl.move((*(() if config.encodes_in_steps else TEXT_PARTS), *(() if batches.needs_vae else ("vae",))), CPU)
    if config.model.is_unet_last:
        sdxl.move(("unet",), accelerator.device)
    encoders = {part: getattr(pipeline, part) for part in TEXT_PARTS}
    denoiser = denoiser_of(sdxl.unet, list(encoders.values()) if config.trains_text else [], sdxl.clip_skip)
    # Have DDP send no frozen weights: every process has loaded the same ones, and torchao's cannot be sent.
    frozen = [name for name, parameter in denoiser.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(denoiser, frozen)
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    inputs = GradientInputs(adapted, trainable, config.perturb, config.run.seed, total_steps)
    return TrainState(
        accelerator=accelerator,
        sdxl=sdxl,
        model=model,
        objective=given.objective,
        trainable=trainable,
        optimizer=optimizer,
        lr_schedule=lr_schedule,
        batches=batches,
        run=RunDir(Path(config.run.output_dir)),
        total_steps=total_steps,
        # Of the weights where they are trained, now that the UNet has moved.
        ema=EMAModel(trainable.values(), decay=optim.ema_decay, foreach=True) if optim.use_ema else None,
        ranks=RankBudget(sdxl.unet, total_steps) if config.adapter.adapter == "adalora" else None,
        tokens=tokens,
        base=given.base,
        progress=Progress(config, step_gradient(inputs)),
        heldout=heldout,
    )


def _given(
    config: TrainConfig,
    samples: Sequence[Sample],
    load: Callable[[ModelConfig, torch.device, torch.dtype], Sdxl],
) -> Given:
    accelerator = _accelerator(config)
    set_backends(config)
    precision = accelerator.mixed_precision
    dtype = DTYPES[config.optim.base_dtype or precision]
    sdxl = load(config.model, CPU if config.model.is_unet_last else accelerator.device, dtype)
    init_lora = config.adapter.init_lora
    initial = None if init_lora is None else load_init_lora(sdxl.pipeline, Path(init_lora))
    base = portable_base_name(config)
    objective = objective_of(config.objective, sdxl.scheduler)
    resolution = sdxl.checked_resolution(config.data.resolution)
    whole = settled(config, precision, resolution, sdxl.size_step, samples, accelerator.num_processes)
    return Given(whole, accelerator, sdxl, objective, initial, base)


@contextmanager
def dropout_draws(state: TrainState, step: int, slot: int) -> Iterator[None]:
    """LoRA dropout draws from the global generator: seed it for this micro-batch, then put it back."""
    if state.config.adapter.lora_dropout == 0:
        yield
        return
    device = state.accelerator.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(state.batches.seed, "dropout", step, slot))
        yield


def memory_in_use(device: torch.device) -> int:
    """Bytes: the peak of the device's allocator, or this process's resident memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


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


def put_away(state: TrainState) -> None:
    """End what goes on beside the steps, and give the memory back; `state` cannot be used afterwards."""
    state.batches.close()
    state.gradient.detach()
    # If DDP were the last to hold the process group, freeing it could deadlock with a thread that waits for Python
    object.__setattr__(state, "model", state.accelerator.unwrap_model(state.model))
    state.accelerator.free_memory()
    end_trackers(state.accelerator)


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
        accelerator = Accelerator(
            mixed_precision=config.optim.mixed_precision,
            log_with=[tracker for tracker in wanted if importlib.util.find_spec(TRACKERS[tracker])] or None,
            project_config=ProjectConfiguration(str(output), logging_dir=str(output / run.logging_dir)),
        )
    except ValueError as error:
        raise ConfigError(
            f"mixed_precision={config.optim.mixed_precision!r} cannot be used on this machine: {error}"
        ) from error
    check_distribution(accelerator.distributed_type)
    return accelerator


def check_distribution(kind: DistributedType) -> None:
    """Raises ConfigError for launchers that shard the frozen base, which saving does not know."""
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
