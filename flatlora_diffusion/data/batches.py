"""Batches by their key: which images step and slot train on, how they are cropped, and their latents and prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flatlora_diffusion.config import RunError, TrainConfig
from flatlora_diffusion.data.buckets import bucket_sizes
from flatlora_diffusion.data.crops import View, choose_view, mirrored_view, pixels_of, view_image
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.data.epochs import steps_per_epoch
from flatlora_diffusion.data.images import ImageError, load_alpha, load_image
from flatlora_diffusion.data.latents import LatentCache
from flatlora_diffusion.data.order import BucketOrder, Draw, Order
from flatlora_diffusion.data.prompts import FrozenPrompts, TokenizedPrompts
from flatlora_diffusion.ground.atomic import remove_half_written, writing_into
from flatlora_diffusion.ground.seeds import generator
from flatlora_diffusion.sdxl.objective import Batch
from flatlora_diffusion.sdxl.pipeline import Sdxl, add_time_ids, posterior

_LONGEST_WRITE = 3600.0  # seconds; a file that another run has not finished in that time it never will


@dataclass(frozen=True)
class Row:
    """One image of a batch and how it is seen."""

    sample: Sample
    view: View


class Feed:
    """Makes the batch of any (step, slot), where slot = micro_batch * world_size + rank. Holds no position."""

    def __init__(
        self,
        config: TrainConfig,
        sdxl: Sdxl,
        samples: Sequence[Sample],
        world_size: int = 1,
        class_samples: Sequence[Sample] = (),
        tokens: Mapping[str, list[str]] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`config` has its seed and resolution; `tokens` are pivotal tuning's, by placeholder.

        `device` is where batches are made, by default the UNet's; VAE and text encoders are there.
        """
        assert config.run.seed is not None
        assert config.data.resolution is not None
        self.slots = config.optim.gradient_accumulation_steps * world_size  # micro-batches of one optimizer step
        self.config, self.sdxl = config, sdxl
        self.samples, self.class_samples = list(samples), list(class_samples)
        self.seed: int = config.run.seed
        self.resolution: int = config.data.resolution
        self.device = sdxl.unet.device if device is None else device
        self.sizes = self._sizes()
        self.order = self._order()
        self.steps_per_epoch = steps_per_epoch(config, self.order.samples_per_epoch, world_size)
        self._class_order = Order(self.seed, "class_order", len(class_samples), 1, config.optim.train_batch_size)
        data = config.data
        folder = None if data.embedding_cache_dir is None else Path(data.embedding_cache_dir)
        if folder is not None:
            with writing_into(folder, "embedding_cache_dir"):
                folder.mkdir(parents=True, exist_ok=True)
            remove_half_written(folder, seconds=_LONGEST_WRITE)
        captions = [sample.caption for sample in (*samples, *class_samples)]
        text_folder = folder if data.cache_text_embeddings else None
        self._prompts: FrozenPrompts | TokenizedPrompts = (
            TokenizedPrompts(sdxl.pipeline, tokens or {})
            if config.trains_text
            else FrozenPrompts(sdxl, captions, text_folder)
        )
        self._cache = self._cached(self.samples, self.sizes, folder)
        square = [(self.resolution, self.resolution)] * len(class_samples)
        # With buckets a class image has as many sizes as there are buckets, so it is encoded when it is needed.
        is_square = not data.use_aspect_ratio_buckets
        self._class_cache = self._cached(self.class_samples, square, folder) if is_square else None
        workers = data.dataloader_num_workers
        self._loader = ThreadPoolExecutor(workers) if workers and self._cache is None else None
        self._loading: dict[tuple[int, int], list[Future[Tensor]]] = {}

    @property
    def needs_vae(self) -> bool:
        """Whether batches hold images that are encoded when they are needed, not cached before."""
        return self._cache is None or (bool(self.class_samples) and self._class_cache is None)

    def batch(self, step: int, slot: int) -> Batch:
        """The training batch of (step, slot) on the UNet's device: the instance images, then as many class images.

        Raises RunError when an image is not there any more.
        """
        try:
            return self._batch(step, slot)
        except ImageError as error:
            raise RunError(f"step {step}: {error}; put the training images back as they were to go on") from error

    def close(self) -> None:
        """End the threads that load images."""
        if self._loader is not None:
            self._loader.shutdown(cancel_futures=True)

    def _batch(self, step: int, slot: int) -> Batch:
        rows, class_rows = self._rows(step, slot), self._class_rows(step, slot)
        both = rows + class_rows
        dropped = self.config.data.caption_dropout
        kept = None
        if dropped > 0:
            draws = torch.rand(len(rows), generator=generator("cpu", self.seed, "caption_dropout", step, slot))
            kept = torch.cat([draws >= dropped, torch.ones(len(class_rows), dtype=torch.bool)])
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
            **self._prompts.conditioning([row.sample.caption for row in both], kept, self.device),
        )

    def samples_at(self, step: int, slot: int) -> list[Sample]:
        """The images of the batch of (step, slot): the instance images, then the class images."""
        return [row.sample for row in (*self._rows(step, slot), *self._class_rows(step, slot))]

    def epoch_after(self, step: int) -> int:
        """Whole epochs that are over once optimizer step `step` is done."""
        return (step + 1) // self.steps_per_epoch

    def _sizes(self) -> list[tuple[int, int]]:
        """The training size (height, width) of each sample."""
        square = (self.resolution, self.resolution)
        if not self.config.data.use_aspect_ratio_buckets:
            return [square] * len(self.samples)
        shapes = [(sample.height, sample.width) for sample in self.samples]
        return bucket_sizes(shapes, self.resolution, self.sdxl.size_step)

    def _order(self) -> Order | BucketOrder:
        repeats, size = self.config.data.repeats, self.config.optim.train_batch_size
        if not self.config.data.use_aspect_ratio_buckets:
            return Order(self.seed, "order", len(self.samples), repeats, size)
        known = sorted(set(self.sizes))
        return BucketOrder(self.seed, "order", [known.index(one) for one in self.sizes], repeats, size)

    def _rows(self, step: int, slot: int) -> list[Row]:
        rows = []
        for draw in self.order.batch(step * self.slots + slot):
            sample = self.samples[draw.sample]
            rows.append(Row(sample, self._view(sample, self.sizes[draw.sample], draw, is_cached=bool(self._cache))))
        return rows

    def _class_rows(self, step: int, slot: int) -> list[Row]:
        """Class images have no bucket of their own: they are cropped to the size of the batch."""
        if not self.class_samples:
            return []
        size = self.sizes[self.order.batch(step * self.slots + slot)[0].sample]
        rows = []
        for draw in self._class_order.batch(step * self.slots + slot):
            sample = self.class_samples[draw.sample]
            rows.append(Row(sample, self._view(sample, size, draw, is_cached=bool(self._class_cache))))
        return rows

    def _view(self, sample: Sample, size: tuple[int, int], draw: Draw, is_cached: bool) -> View:
        """Crop and flip by (seed, sample, epoch); a cached image keeps its crop and is only flipped anew."""
        data = self.config.data
        rng = generator("cpu", self.seed, "augmentation", sample.id, draw.epoch)
        original = (sample.height, sample.width)
        view = choose_view(original, size, data.center_crop, data.random_flip, rng)
        return mirrored_view(self._cached_view(sample, size), view.is_mirrored) if is_cached else view

    def _cached_view(self, sample: Sample, size: tuple[int, int]) -> View:
        rng = generator("cpu", self.seed, "cached_crop", sample.id)
        return choose_view((sample.height, sample.width), size, self.config.data.center_crop, False, rng)

    def _cached(
        self, samples: Sequence[Sample], sizes: Sequence[tuple[int, int]], folder: Path | None
    ) -> LatentCache | None:
        data = self.config.data
        if not data.cache_latents or not samples:
            return None
        views = [self._cached_view(sample, size) for sample, size in zip(samples, sizes, strict=True)]
        settings = data.image_interpolation_mode, data.background_color
        return LatentCache(self.sdxl.vae, samples, views, self._pixels, settings, folder)

    def _pixels(self, sample: Sample, view: View) -> Tensor:
        data = self.config.data
        image = load_image(sample.source, data.background_color)
        return pixels_of(view_image(image, view, data.image_interpolation_mode))

    def _posteriors(self, rows: list[Row], class_rows: list[Row], step: int, slot: int) -> tuple[Tensor, Tensor]:
        """Normalized mean and std (B, 4, h, w) of all rows, from the cache or encoded now."""
        found = []
        for part, cache in ((rows, self._cache), (class_rows, self._class_cache)):
            if cache is not None:
                keys = [(row.sample.id, row.view.is_mirrored) for row in part]
                found.append(cache.posterior(keys, self.device))
            elif part:
                pixels = self._loaded(part, step, slot) if part is rows else [self._pixels(*_key(row)) for row in part]
                found.append(posterior(self.sdxl.vae, torch.stack(pixels).to(self.device)))
        means, stds = zip(*found, strict=True)
        return torch.cat(means), torch.cat(stds)

    def _loaded(self, rows: list[Row], step: int, slot: int) -> list[Tensor]:
        """The rows' pixels; with loader threads those of the same slot of the next step are begun too."""
        if self._loader is None:
            return [self._pixels(*_key(row)) for row in rows]
        here = self._loading.pop((step, slot), None)
        following = [self._loader.submit(self._pixels, *_key(row)) for row in self._rows(step + 1, slot)]
        self._loading = {key: jobs for key, jobs in self._loading.items() if key[0] > step}
        self._loading[step + 1, slot] = following
        return [job.result() for job in here] if here is not None else [self._pixels(*_key(row)) for row in rows]

    def _mask(self, rows: list[Row]) -> Tensor:
        """The share of each latent pixel that the image's alpha shows, (B, 1, h, w)."""
        interpolation = self.config.data.image_interpolation_mode
        masks = [pixels_of(view_image(load_alpha(row.sample.source), row.view, interpolation)) for row in rows]
        return F.avg_pool2d(torch.stack(masks).to(self.device), self.sdxl.pipeline.vae_scale_factor)


def _key(row: Row) -> tuple[Sample, View]:
    return row.sample, row.view
