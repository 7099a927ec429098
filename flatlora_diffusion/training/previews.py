"""What is looked at while a run goes on: preview images at fixed seeds, and the loss of images not trained on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from flatlora_diffusion.adapter.new_tokens import with_new_tokens
from flatlora_diffusion.data.sources import load_heldout
from flatlora_diffusion.sdxl.drawing import Drawing, png_text, portable_base_name
from flatlora_diffusion.sdxl.sampling import describe_drawing, eval_on_unet_device, generate_images
from flatlora_diffusion.storage.atomic_io import atomic_write
from flatlora_diffusion.training.holdout import HeldoutLoss
from flatlora_diffusion.training.preview_prompts import Picture, read_pictures
from flatlora_diffusion.training.state import TrainState
from flatlora_diffusion.training.trackers import tell_trackers

logger = logging.getLogger(__name__)


class Previews:
    """Makes the previews of one run and logs them as events; does nothing when none are asked for."""

    def __init__(self, state: TrainState) -> None:
        """Raises ConfigError for a prompts file or validation images that cannot be used."""
        self._state = state
        run = state.config.run
        self._pictures = read_pictures(run)
        self._heldout: HeldoutLoss | None = None
        if run.validation_data_dir is not None:
            found = load_heldout(Path(run.validation_data_dir), state.config.data)
            self._heldout = HeldoutLoss(state, found.samples)

    def make(self, name: str, step: int, is_over: Callable[[], bool] = lambda: False) -> None:
        """Images `images/NAME-0.png`, ... and the loss after `step` steps. The modules' modes are put back after.

        None is begun once the run `is_over`: a launcher that has asked for the end kills what takes longer than its
        period of grace. A set that is cut so is not kept.
        """
        state = self._state
        if self._pictures:
            images = self._images(is_over)
            if len(images) < len(self._pictures):
                return
            files = [f"{name}-{index}.png" for index in range(len(images))]
            with state.run.writing():
                state.run.images.mkdir(exist_ok=True)
                for file, image, picture in zip(files, images, self._pictures, strict=True):
                    drawing = drawing_of(state, picture, step)
                    with atomic_write(state.run.images / file) as aside:
                        image.save(aside, format="PNG", pnginfo=drawing and png_text(drawing))
            about = {"prompts": [one.prompt for one in self._pictures], "seeds": [one.seed for one in self._pictures]}
            state.run.add_event({"event": "preview", "step": step, "images": files, **about})
        if self._heldout is not None and not is_over():
            loss = self._heldout.now()
            state.run.add_event({"event": "validation", "step": step, "loss": loss})
            tell_trackers(state.accelerator, {"validation_loss": loss}, step)
            logger.info("validation loss after %d steps: %.4f", step, loss)

    def _images(self, is_over: Callable[[], bool]) -> list[Image.Image]:
        state = self._state
        images: list[Image.Image] = []
        with eval_on_unet_device(state.sdxl):
            for picture in self._pictures:
                if is_over():
                    break
                images += generate_images(
                    state.sdxl,
                    [with_new_tokens(picture.prompt, state.tokens)],
                    [picture.seed],
                    resolution=state.batches.resolution,
                    negative_prompt=picture.negative_prompt,
                )
        return images


def drawing_of(state: TrainState, picture: Picture, step: int) -> Drawing | None:
    """How the preview after `step` steps is drawn in other tools; None for one that they cannot draw.

    They have neither the tiny base nor a LoRA between the first step and the last, and new tokens only as embeddings
    in files of their own.
    """
    config = state.config
    is_plain = step == 0 and config.adapter.init_lora is None
    if state.tokens or not (is_plain or step == state.end):
        return None
    name = state.run.lora_name(config.run.output_name)
    return describe_drawing(
        state.sdxl,
        picture.prompt,
        picture.seed,
        state.batches.resolution,
        portable_base_name(state.base),
        () if is_plain else ((name, 1.0),),
        negative_prompt=picture.negative_prompt,
    )


def is_due(state: TrainState, step: int) -> bool:
    """After the first epoch and every `validation_epochs` epochs from there, as in diffusers' script."""
    before, after = (state.batches.epoch_after(s) for s in (step - 1, step))
    every = state.config.run.validation_epochs
    return any((epoch - 1) % every == 0 for epoch in range(before + 1, after + 1))
