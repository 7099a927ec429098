"""Training batches as a function of (step, slot): images, crops, latents and prompt embeddings."""

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
from flatlora_diffusion.data.crops import Augmentation, View
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.data.images import ImageError
from flatlora_diffusion.data.latents import LatentCache, encode_latents
from flatlora_diffusion.data.prompts import Prompts, augmented_caption, build_prompts
from flatlora_diffusion.data.schedule import Schedule, build_schedule
from flatlora_diffusion.families.base import Base
from flatlora_diffusion.families.batch import Batch
from flatlora_diffusion.storage.atomic_io import explain_write_errors, remove_partial_files
from flatlora_diffusion.storage.rng import generator

_LONGEST_WRITE = 3600.0  # seconds; older temporary files in a shared cache are leftovers


@dataclass(frozen=True)
class BatchItem:
    """An image of a batch with its crop and caption."""

    sample: Sample
    view: View
    caption: str


@dataclass
class Batches:
    """Creates the batch of any (step, slot), where slot = micro_batch * world_size + rank; it has no position.

    Images without cached latents are encoded on demand, on `device`.
    """

    config: TrainConfig
    base: Base
    samples: list[Sample]
    class_samples: list[Sample]
    schedule: Schedule
    augmentation: Augmentation
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
        return self.augmentation.seed

    @property
    def resolution(self) -> int:
        assert self.config.data.resolution is not None
        return self.config.data.resolution

    @property
    def slots(self) -> int:
        """The number of micro-batches per optimizer step, over all processes."""
        return self.schedule.slots

    @property
    def needs_vae(self) -> bool:
        """Whether some images are encoded on demand."""
        return self.latents is None or (bool(self.class_samples) and self.class_latents is None)

    def batch(self, step: int, slot: int) -> Batch:
        """Return the batch of (step, slot) on `device`: instance images, then as many class images.

        Raises:
            RunError: an image no longer exists.
        """
        try:
            return self._batch(step, slot)
        except ImageError as error:
            raise RunError(f"step {step}: {error}; restore the training images and resume the run") from error

    def with_class_prompt(self, batch: Batch) -> Batch:
        """Return `batch` for --prior_from_base: with the class prompt and the prior's weight, without a mask."""
        count, prompt = len(batch.latents), str(self.config.data.class_prompt)
        weights = torch.full((count,), float(self.config.objective.prior_loss_weight), device=self.device)
        prompts = self.prompts.conditioning([prompt] * count, None, self.device)
        return replace(batch, weights=weights, mask=None, prompts=prompts)

    def close(self) -> None:
        """Stop the threads that load images."""
        if self._loader is not None:
            self._loader.shutdown(cancel_futures=True)

    def _batch(self, step: int, slot: int) -> Batch:
        instances, class_images = self._instances(step, slot), self._class_images(step, slot)
        items = instances + class_images
        caption_mask = self._caption_mask(len(instances), len(class_images), step, slot)
        captions = [item.caption for item in items]
        if caption_mask is not None and not self.base.zeros_empty_prompt:
            captions = [caption if keep else "" for caption, keep in zip(captions, caption_mask.tolist(), strict=True)]
            caption_mask = None
        mean, std = self._posteriors(instances, class_images, step, slot)
        rng = generator(self.device, self.seed, "vae", step, slot)
        noise = torch.randn(mean.shape, generator=rng, device=self.device)
        weights = None
        if class_images:  # the mean over the batch becomes mean(instances) + prior_loss_weight * mean(class images)
            prior = self.config.objective.prior_loss_weight
            factors = [2.0] * len(instances) + [2.0 * prior] * len(class_images)
            weights = torch.tensor(factors, device=self.device)
        sizes, crops = zip(*((item.view.original_size, item.view.crop_top_left) for item in items), strict=True)
        geometry = self.base.geometry(sizes, crops, items[0].view.size)
        return Batch(
            latents=mean + std * noise,
            prompts=self.prompts.conditioning(captions, caption_mask, self.device),
            geometry={name: value.to(self.device) for name, value in geometry.items()},
            weights=weights,
            mask=self._mask(items) if self.config.objective.alpha_mask_loss else None,
        )

    def _caption_mask(self, instances: int, class_images: int, step: int, slot: int) -> Tensor | None:
        """False where an instance image's caption is dropped; None without caption dropout."""
        dropout = self.config.data.caption_dropout
        if dropout == 0:
            return None
        draws = torch.rand(instances, generator=generator("cpu", self.seed, "caption_dropout", step, slot))
        return torch.cat([draws >= dropout, torch.ones(class_images, dtype=torch.bool)])

    def samples_at(self, step: int, slot: int) -> list[Sample]:
        """Return the samples in the batch of (step, slot): instance images, then class images."""
        return [item.sample for item in (*self._instances(step, slot), *self._class_images(step, slot))]

    def epoch_after(self, step: int) -> int:
        """Return the number of epochs completed after optimizer step `step`."""
        return (step + 1) // self.schedule.steps_per_epoch

    def _instances(self, step: int, slot: int) -> list[BatchItem]:
        items = []
        choose = self.augmentation.epoch_view if self.latents is None else self.augmentation.flipped_view
        for draw in self.schedule.batch(step * self.slots + slot):
            sample = self.samples[draw.sample]
            caption = augmented_caption(sample.caption, self.config.data, self.seed, sample.id, draw.epoch)
            items.append(BatchItem(sample, choose(sample, self.schedule.sizes[draw.sample], draw.epoch), caption))
        return items

    def _class_images(self, step: int, slot: int) -> list[BatchItem]:
        """Class images have no buckets: they are cropped to the size of the batch."""
        if not self.class_samples:
            return []
        index = step * self.slots + slot
        size = self.schedule.sizes[self.schedule.batch(index)[0].sample]
        choose = self.augmentation.epoch_view if self.class_latents is None else self.augmentation.flipped_view
        items = []
        for draw in self.schedule.class_order.batch(index):
            sample = self.class_samples[draw.sample]
            items.append(BatchItem(sample, choose(sample, size, draw.epoch), sample.caption))
        return items

    def _posteriors(
        self, instances: list[BatchItem], class_images: list[BatchItem], step: int, slot: int
    ) -> tuple[Tensor, Tensor]:
        """Normalized mean and std (B, C, h, w) of all images, from the cache or encoded now."""
        posteriors = []
        for items, cache in ((instances, self.latents), (class_images, self.class_latents)):
            if cache is not None:
                keys = [(item.sample.id, item.view.is_mirrored) for item in items]
                posteriors.append(cache.posterior(keys, self.device))
            elif items:
                pixels = self._load(items, step, slot) if items is instances else self._all_pixels(items)
                posteriors.append(self.base.posterior(torch.stack(pixels).to(self.device)))
        means, stds = zip(*posteriors, strict=True)
        return torch.cat(means), torch.cat(stds)

    def _load(self, items: list[BatchItem], step: int, slot: int) -> list[Tensor]:
        """Load pixels; with loader threads, also start to load the same slot of the next step."""
        if self._loader is None:
            return self._all_pixels(items)
        prefetched = self._loading.pop((step, slot), None)
        self._loading = {key: jobs for key, jobs in self._loading.items() if key[0] >= step}
        if (step + 1, slot) not in self._loading:
            self._loading[step + 1, slot] = [
                self._loader.submit(self.augmentation.pixels, item.sample, item.view)
                for item in self._instances(step + 1, slot)
            ]
        return self._all_pixels(items) if prefetched is None else [future.result() for future in prefetched]

    def _all_pixels(self, items: list[BatchItem]) -> list[Tensor]:
        return [self.augmentation.pixels(item.sample, item.view) for item in items]

    def _mask(self, items: list[BatchItem]) -> Tensor:
        """The mean alpha of each latent pixel, (B, 1, h, w)."""
        masks = [self.augmentation.alpha(item.sample, item.view) for item in items]
        return F.avg_pool2d(torch.stack(masks).to(self.device), self.base.latent_step)


def build_batches(
    config: TrainConfig,
    base: Base,
    samples: Sequence[Sample],
    world_size: int = 1,
    class_samples: Sequence[Sample] = (),
) -> Batches:
    """Create the batches of a run; encodes captions, and images if latents are cached.

    Args:
        config: settings with seed and resolution.
        base: the base; its VAE and text encoders are on the device of the batches.
    """
    data, seed, resolution = config.data, config.run.seed, config.data.resolution
    assert seed is not None
    assert resolution is not None
    schedule = build_schedule(config, samples, base.size_step, world_size, len(class_samples))
    augmentation = Augmentation(data, seed)
    folder = None if data.embedding_cache_dir is None else Path(data.embedding_cache_dir)
    with nullcontext() if folder is None else explain_write_errors(folder, "embedding_cache_dir"):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            remove_partial_files(folder, seconds=_LONGEST_WRITE)
        prompts = build_prompts(config, base, [*samples, *class_samples], folder)
        cached = [(samples, schedule.sizes)] if data.cache_latents else []
        # With buckets a class image can have the size of any bucket, so it is encoded on demand.
        if cached and class_samples and not data.use_aspect_ratio_buckets:
            cached.append((class_samples, [(resolution, resolution)] * len(class_samples)))
        caches = [encode_latents(base, images, sizes, augmentation, folder) for images, sizes in cached]
    return Batches(
        config=config,
        base=base,
        samples=list(samples),
        class_samples=list(class_samples),
        schedule=schedule,
        augmentation=augmentation,
        prompts=prompts,
        latents=caches[0] if caches else None,
        class_latents=caches[1] if len(caches) > 1 else None,
        device=base.vae.device,
    )
