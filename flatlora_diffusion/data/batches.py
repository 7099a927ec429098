"""Batches by their key: which images step and slot train on, how they are cropped, and their latents and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flatlora_diffusion.config import RunError, TrainConfig
from flatlora_diffusion.data.augmentation import Framing
from flatlora_diffusion.data.crops import View
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.data.images import ImageError
from flatlora_diffusion.data.latents import LatentCache, encoded_latents
from flatlora_diffusion.data.prompts import Prompts, prompts_of
from flatlora_diffusion.data.schedule import Schedule, schedule_of
from flatlora_diffusion.data.tags import drawn_caption
from flatlora_diffusion.sdxl.objective import Batch
from flatlora_diffusion.sdxl.pipeline import Sdxl, add_time_ids, posterior
from flatlora_diffusion.storage.atomic_io import explain_write_errors, remove_partial_files
from flatlora_diffusion.storage.rng import generator

_LONGEST_WRITE = 3600.0  # seconds; a file that another run has not finished in that time it never will


@dataclass(frozen=True)
class Showing:
    """One image of a batch and how it is seen."""

    sample: Sample
    view: View
    caption: str


@dataclass
class Batches:
    """Makes the batch of any (step, slot), where slot = micro_batch * world_size + rank. Holds no position.

    Images without latents are encoded when they are needed, on `device`, where batches are made.
    """

    config: TrainConfig
    sdxl: Sdxl
    samples: list[Sample]
    class_samples: list[Sample]
    schedule: Schedule
    framing: Framing
    prompts: Prompts
    latents: LatentCache | None
    class_latents: LatentCache | None
    device: torch.device

    def __post_init__(self) -> None:
        workers = self.config.data.dataloader_num_workers
        self._loader = ThreadPoolExecutor(workers) if workers and self.latents is None else None
        self._loading: dict[tuple[int, int], list[Future[Tensor]]] = {}

    @property
    def seed(self) -> int:
        return self.framing.seed

    @property
    def resolution(self) -> int:
        assert self.config.data.resolution is not None
        return self.config.data.resolution

    @property
    def slots(self) -> int:
        """Micro-batches of one optimizer step, of all processes."""
        return self.schedule.slots

    @property
    def needs_vae(self) -> bool:
        """Whether batches hold images that are encoded when they are needed, not cached before."""
        return self.latents is None or (bool(self.class_samples) and self.class_latents is None)

    def batch(self, step: int, slot: int) -> Batch:
        """The training batch of (step, slot) on the UNet's device: the instance images, then as many class images.

        Raises RunError when an image is not there any more.
        """
        try:
            return self._batch(step, slot)
        except ImageError as error:
            raise RunError(f"step {step}: {error}; put the training images back as they were to go on") from error

    def with_class_prompt(self, batch: Batch) -> Batch:
        """`batch` as --prior_from_base asks for it: all of each image counts, with the class prompt and its weight."""
        count, prompt = len(batch.latents), str(self.config.data.class_prompt)
        weights = torch.full((count,), float(self.config.objective.prior_loss_weight), device=self.device)
        prompts = self.prompts.conditioning([prompt] * count, None, self.device)
        return replace(batch, weights=weights, mask=None, **prompts)

    def close(self) -> None:
        """End the threads that load images."""
        if self._loader is not None:
            self._loader.shutdown(cancel_futures=True)

    def _batch(self, step: int, slot: int) -> Batch:
        rows, class_rows = self._rows(step, slot), self._class_rows(step, slot)
        both = rows + class_rows
        kept = self._kept(rows, class_rows, step, slot)
        captions = [row.caption for row in both]
        if kept is not None and not self.sdxl.zeroes_no_prompt:
            captions = [caption if is_kept else "" for caption, is_kept in zip(captions, kept.tolist(), strict=True)]
            kept = None
        mean, std = self._posteriors(rows, class_rows, step, slot)
        rng = generator(self.device, self.seed, "vae", step, slot)
        noise = torch.randn(mean.shape, generator=rng, device=self.device)
        weights = None
        if class_rows:  # the mean over all images is then the mean over each kind, the classes' times its weight
            prior = self.config.objective.prior_loss_weight
            weights = torch.tensor([2.0] * len(rows) + [2.0 * prior] * len(class_rows), device=self.device)
        return Batch(
            latents=mean + std * noise,
            add_time_ids=add_time_ids(
                [row.view.original_size for row in both],
                [row.view.crop_top_left for row in both],
                both[0].view.size,
                self.device,
            ),
            weights=weights,
            mask=self._mask(both) if self.config.objective.alpha_mask_loss else None,
            **self.prompts.conditioning(captions, kept, self.device),
        )

    def _kept(self, rows: list[Showing], class_rows: list[Showing], step: int, slot: int) -> Tensor | None:
        """False where a caption is dropped, which those of class images never are; None where none can be."""
        dropped = self.config.data.caption_dropout
        if dropped == 0:
            return None
        draws = torch.rand(len(rows), generator=generator("cpu", self.seed, "caption_dropout", step, slot))
        return torch.cat([draws >= dropped, torch.ones(len(class_rows), dtype=torch.bool)])

    def samples_at(self, step: int, slot: int) -> list[Sample]:
        """The images of the batch of (step, slot): the instance images, then the class images."""
        return [row.sample for row in (*self._rows(step, slot), *self._class_rows(step, slot))]

    def epoch_after(self, step: int) -> int:
        """Whole epochs that are over once optimizer step `step` is done."""
        return (step + 1) // self.schedule.steps_per_epoch

    def _rows(self, step: int, slot: int) -> list[Showing]:
        rows = []
        frame = self.framing.drawn if self.latents is None else self.framing.flipped
        for draw in self.schedule.batch(step * self.slots + slot):
            sample = self.samples[draw.sample]
            caption = drawn_caption(sample.caption, self.config.data, self.seed, sample.id, draw.epoch)
            rows.append(Showing(sample, frame(sample, self.schedule.sizes[draw.sample], draw.epoch), caption))
        return rows

    def _class_rows(self, step: int, slot: int) -> list[Showing]:
        """Class images have no bucket of their own: they are cropped to the size of the batch."""
        if not self.class_samples:
            return []
        place = step * self.slots + slot
        size = self.schedule.sizes[self.schedule.batch(place)[0].sample]
        frame = self.framing.drawn if self.class_latents is None else self.framing.flipped
        rows = []
        for draw in self.schedule.class_order.batch(place):
            sample = self.class_samples[draw.sample]
            rows.append(Showing(sample, frame(sample, size, draw.epoch), sample.caption))
        return rows

    def _posteriors(
        self, rows: list[Showing], class_rows: list[Showing], step: int, slot: int
    ) -> tuple[Tensor, Tensor]:
        """Normalized mean and std (B, 4, h, w) of all rows, from the cache or encoded now."""
        found = []
        for part, cache in ((rows, self.latents), (class_rows, self.class_latents)):
            if cache is not None:
                keys = [(row.sample.id, row.view.is_mirrored) for row in part]
                found.append(cache.posterior(keys, self.device))
            elif part:
                pixels = self._loaded(part, step, slot) if part is rows else self._all_pixels(part)
                found.append(posterior(self.sdxl.vae, torch.stack(pixels).to(self.device)))
        means, stds = zip(*found, strict=True)
        return torch.cat(means), torch.cat(stds)

    def _loaded(self, rows: list[Showing], step: int, slot: int) -> list[Tensor]:
        """The rows' pixels; with loader threads those of the same slot of the next step are begun too."""
        if self._loader is None:
            return self._all_pixels(rows)
        here = self._loading.pop((step, slot), None)
        self._loading = {key: jobs for key, jobs in self._loading.items() if key[0] >= step}
        if (step + 1, slot) not in self._loading:
            after = self._rows(step + 1, slot)
            self._loading[step + 1, slot] = [self._loader.submit(self._pixels, row.sample, row.view) for row in after]
        return self._all_pixels(rows) if here is None else [job.result() for job in here]

    def _all_pixels(self, rows: list[Showing]) -> list[Tensor]:
        return [self._pixels(row.sample, row.view) for row in rows]

    def _pixels(self, sample: Sample, view: View) -> Tensor:
        return self.framing.pixels(sample, view)

    def _mask(self, rows: list[Showing]) -> Tensor:
        """The share of each latent pixel that the image's alpha shows, (B, 1, h, w)."""
        masks = [self.framing.alpha(row.sample, row.view) for row in rows]
        return F.avg_pool2d(torch.stack(masks).to(self.device), self.sdxl.pipeline.vae_scale_factor)


def encoded_batches(
    config: TrainConfig,
    sdxl: Sdxl,
    samples: Sequence[Sample],
    world_size: int = 1,
    class_samples: Sequence[Sample] = (),
) -> Batches:
    """The batches of a run, with all encoded that need not be encoded in each step: captions, and images if asked for.

    `config` has its seed and resolution. VAE and text encoders are on the device where batches are made.
    """
    data, vae, seed, resolution = config.data, sdxl.vae, config.run.seed, config.data.resolution
    assert seed is not None
    assert resolution is not None
    schedule = schedule_of(config, samples, sdxl.size_step, world_size, len(class_samples))
    framing = Framing(data, seed)
    folder = None if data.embedding_cache_dir is None else Path(data.embedding_cache_dir)
    with nullcontext() if folder is None else explain_write_errors(folder, "embedding_cache_dir"):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            remove_partial_files(folder, seconds=_LONGEST_WRITE)
        prompts = prompts_of(config, sdxl, [*samples, *class_samples], folder)
        cached = [(samples, schedule.sizes)] if data.cache_latents else []
        # With buckets a class image has as many sizes as there are buckets, so it is encoded when it is needed.
        if cached and class_samples and not data.use_aspect_ratio_buckets:
            cached.append((class_samples, [(resolution, resolution)] * len(class_samples)))
        caches = [encoded_latents(vae, some, sizes, framing, folder) for some, sizes in cached]
    return Batches(
        config=config,
        sdxl=sdxl,
        samples=list(samples),
        class_samples=list(class_samples),
        schedule=schedule,
        framing=framing,
        prompts=prompts,
        latents=caches[0] if caches else None,
        class_latents=caches[1] if len(caches) > 1 else None,
        device=vae.device,
    )
