"""The loss of each training image at fixed noise and timesteps: at the start, at each checkpoint and at the end."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flatlora_diffusion.config import METHODS
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.evaluation.image_changes import highlights, image_changes
from flatlora_diffusion.evaluation.probe import Probe, draw_losses, fixed_probe, with_prompts
from flatlora_diffusion.families.sampling import eval_on_denoiser_device
from flatlora_diffusion.storage.rng import generator
from flatlora_diffusion.training.state import TrainState, ema_weights

logger = logging.getLogger(__name__)

MAX_IMAGES = 100  # more rows than anybody reads, and a measurement would take longer than many steps
_PURPOSE = "image_losses"
_SEED = 0  # of every run, so that runs can be compared
_SAMPLES = 16  # in a batch of the VAE and, if they fit, of the UNet


class ImageLosses:
    """Measures the loss of each image of --image_loss_draws and adds it to the run's events.

    Class images are left out. The noise is a function of the image's content, and all images have the same timesteps.
    """

    def __init__(self, state: TrainState, first_step: int) -> None:
        """Measure the start of a new run, or the checkpoint `first_step` if a stop left it unmeasured."""
        self._state = state
        self._draws = state.config.run.image_loss_draws
        self._samples = _chosen(state.batches.samples)
        logger.info("%s", _cost_text(state, len(self._samples)))
        self._timesteps = state.base.timesteps_at(stratified_shares(self._draws))
        with eval_on_denoiser_device(state.base):
            self._probes = list(self._encoded())
        is_checkpoint = first_step % state.config.run.checkpointing_steps == 0
        if is_checkpoint and all(event["step"] != first_step for event in state.run.image_losses()):
            self.measure(first_step)

    def measure(self, step: int) -> None:
        """Measure the weights after `step` steps, without eps; before the first step also without captions."""
        state = self._state
        with ema_weights(state):
            losses = self._by_image()
            # A caption that fits its image lowers the base's loss (arXiv:2303.16203).
            bare = {} if step else {"without_caption": self._by_image(has_caption=False)}
        state.run.add_event({"event": "image_losses", "step": step, "losses": losses, **bare})
        changes = image_changes([state.run.image_losses()]) if step == state.end else None
        for reason, names in highlights(changes.images).items() if changes is not None else ():
            logger.info("loss by image, %s: %s", reason.lower(), ", ".join(names))

    def _encoded(self) -> Iterator[tuple[Sequence[Sample], Probe]]:
        """Parts of the images with their latents and prompt embeddings on the CPU, without noise."""
        state = self._state
        background, count = state.config.data.background_color, max(1, _SAMPLES // self._draws)
        for start in range(0, len(self._samples), count):
            part = self._samples[start : start + count]
            probe = fixed_probe(state.base, part, state.batches.resolution, _SEED, draws=1, background=background)
            yield part, replace(probe, batch=probe.batch.map(Tensor.cpu))

    def _by_image(self, has_caption: bool = True) -> dict[str, list[float]]:
        """The loss of each draw by the image's name, with six digits."""
        return {
            sample.id: [float(f"{loss:.6g}") for loss in row]
            for part, probe in self._probes
            for sample, row in zip(part, self._measured(part, probe, has_caption).tolist(), strict=True)
        }

    def _measured(self, part: Sequence[Sample], probe: Probe, has_caption: bool) -> Tensor:
        """The loss of each image and draw, (N, draws)."""
        state, device = self._state, self._state.base.denoiser.device
        if not has_caption and state.base.zeros_empty_prompt:
            probe = _with_zero_prompts(probe)
        elif state.config.trains_text or not has_caption:  # trained encoders change the prompts' embeddings
            with eval_on_denoiser_device(state.base):
                probe = with_prompts(probe, state.base, [sample.caption if has_caption else "" for sample in part])
        batch = probe.batch.map(lambda value: value.to(device).repeat_interleave(self._draws, dim=0))
        noise = torch.cat([image_noise(sample, self._draws, probe.batch.latents.shape[1:]) for sample in part])
        timesteps = self._timesteps.repeat(len(part))
        drawn = Probe(batch, noise.to(device), timesteps.to(device), self._draws)
        return draw_losses(state.base.denoiser, state.objective.unweighted(), drawn)


def _with_zero_prompts(probe: Probe) -> Probe:
    """Replace the prompt embeddings by zeros, which are such a base's empty prompt."""
    zeros = {name: torch.zeros_like(value) for name, value in probe.batch.prompts.items()}
    return replace(probe, batch=replace(probe.batch, prompts=zeros))


def _chosen(samples: Sequence[Sample]) -> list[Sample]:
    """At most MAX_IMAGES, chosen by their hashes and in their order."""
    chosen = {id(sample) for sample in sorted(samples, key=lambda sample: (sample.sha256, sample.id))[:MAX_IMAGES]}
    return [sample for sample in samples if id(sample) in chosen]


def _cost_text(state: TrainState, count: int) -> str:
    """Which images are measured, and the cost relative to that of the training."""
    config, total = state.config, len(state.batches.samples)
    images = f"{count} images" if count == total else f"{count} of the {total} images, chosen by their hashes"
    measurements = 2 + -(-state.total_steps // config.run.checkpointing_steps)  # at the start two
    trained = state.total_steps * state.batches.slots * config.optim.train_batch_size
    passes = trained * METHODS[config.perturb.method].passes
    share = measurements * count * config.run.image_loss_draws / passes
    return f"image_loss_draws={config.run.image_loss_draws} measures {images}, for up to {share:.0%} more computation"


def stratified_shares(draws: int) -> Tensor:
    """One share in each of `draws` equal parts of [0, 1), (draws,), equal for all images and runs."""
    shares = torch.rand(draws, generator=generator("cpu", _SEED, _PURPOSE, "timesteps"))
    return (torch.arange(draws) + shares) / draws


def image_noise(sample: Sample, draws: int, shape: Sequence[int]) -> Tensor:
    """The noise of an image's draws, (draws, *shape) on the CPU."""
    return torch.randn((draws, *shape), generator=generator("cpu", _SEED, _PURPOSE, sample.sha256))
