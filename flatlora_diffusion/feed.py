"""Batches by their key: which images step and slot train on, how they are cropped, and their latents and prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.dataset import Sample, augmentation_rng, sample_at
from flatlora_diffusion.images import crop_and_flip, load_image
from flatlora_diffusion.loss import Batch
from flatlora_diffusion.sdxl import Sdxl, add_time_ids, encode_images, encode_prompts
from flatlora_diffusion.seeds import generator


class Feed:
    """Makes the batch of any (step, slot), where slot = micro_batch * world_size + rank. Holds no position."""

    def __init__(self, config: TrainConfig, sdxl: Sdxl, samples: list[Sample], world_size: int) -> None:
        assert config.run.seed is not None
        assert config.data.resolution is not None
        self.slots = config.optim.gradient_accumulation_steps * world_size  # micro-batches of one optimizer step
        self.config = config
        self.sdxl = sdxl
        self.samples = samples
        self.seed: int = config.run.seed
        self.resolution: int = config.data.resolution
        self.device = sdxl.unet.device
        # The text encoders are frozen, so each caption is encoded once.
        captions = sorted({sample.caption for sample in samples})
        self._prompts = {caption: _cpu(encode_prompts(sdxl.pipeline, [caption])) for caption in captions}

    def batch(self, step: int, slot: int) -> Batch:
        """The training batch of (step, slot) on the UNet's device."""
        data, size = self.config.data, (self.resolution, self.resolution)
        chosen = self._draw(step, slot)
        views = [
            crop_and_flip(
                load_image(sample.path, data.background_color),
                self.resolution,
                data.center_crop,
                data.random_flip,
                augmentation_rng(self.seed, sample.id, epoch),
                data.image_interpolation_mode,
            )
            for epoch, sample in chosen
        ]
        pixels, original_sizes, crops = zip(*views, strict=True)
        prompt_embeds, pooled = self._prompt_embeds([sample for _, sample in chosen], step, slot)
        return Batch(
            latents=self._latents(torch.stack(pixels).to(self.device), step, slot),
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled,
            add_time_ids=add_time_ids(original_sizes, crops, size, self.device),
        )

    def samples_at(self, step: int, slot: int) -> list[Sample]:
        """The images of the batch of (step, slot)."""
        return [sample for _, sample in self._draw(step, slot)]

    def _draw(self, step: int, slot: int) -> list[tuple[int, Sample]]:
        """(epoch, sample) of each image, the row of all epochs cut into batches."""
        size = self.config.optim.train_batch_size
        first = (step * self.slots + slot) * size
        places = [sample_at(self.seed, len(self.samples), index) for index in range(first, first + size)]
        return [(epoch, self.samples[sample]) for epoch, sample in places]

    def _latents(self, pixels: Tensor, step: int, slot: int) -> Tensor:
        vae, factor = self.sdxl.vae, self.sdxl.pipeline.vae_scale_factor
        shape = (len(pixels), vae.config.latent_channels, self.resolution // factor, self.resolution // factor)
        rng = generator(self.device, self.seed, "vae", step, slot)
        return encode_images(vae, pixels, torch.randn(shape, generator=rng, device=self.device))

    def _prompt_embeds(self, samples: list[Sample], step: int, slot: int) -> tuple[Tensor, Tensor]:
        """Embeddings of the captions; a dropped caption is all zeros, as SDXL's unconditional half."""
        pairs = [self._prompts[sample.caption] for sample in samples]
        prompt_embeds, pooled = (torch.cat(parts).to(self.device) for parts in zip(*pairs, strict=True))
        if self.config.data.caption_dropout > 0:
            draws = torch.rand(len(samples), generator=generator("cpu", self.seed, "caption_dropout", step, slot))
            kept = (draws >= self.config.data.caption_dropout).to(self.device, prompt_embeds.dtype)
            prompt_embeds, pooled = prompt_embeds * kept[:, None, None], pooled * kept[:, None]
        return prompt_embeds, pooled


def _cpu(embeds: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return embeds[0].cpu(), embeds[1].cpu()
