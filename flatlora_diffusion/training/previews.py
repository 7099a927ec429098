"""Preview images at fixed seeds, and the loss of --validation_data_dir, during a run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from flatlora_diffusion.adapter.new_tokens import replace_placeholders
from flatlora_diffusion.data.sources import load_heldout
from flatlora_diffusion.families.drawing import Drawing, ImageSettings, png_text, portable_base_name
from flatlora_diffusion.families.sampling import eval_on_denoiser_device, generate_images
from flatlora_diffusion.storage.atomic_io import atomic_write
from flatlora_diffusion.training.holdout import HeldoutLoss
from flatlora_diffusion.training.preview_prompts import Picture, read_pictures
from flatlora_diffusion.training.state import TrainState
from flatlora_diffusion.training.trackers import log_to_trackers

logger = logging.getLogger(__name__)


class Previews:
    """Generates the previews of a run and adds them to its events; does nothing if the settings ask for none."""

    def __init__(self, state: TrainState) -> None:
        """Read prompts and validation images. Raises ConfigError for unusable files."""
        self._state = state
        run = state.config.run
        self._pictures = read_pictures(run)
        self._heldout: HeldoutLoss | None = None
        if run.validation_data_dir is not None:
            images = load_heldout(Path(run.validation_data_dir), state.config.data)
            self._heldout = HeldoutLoss(state, images.samples)

    def make(self, name: str, step: int, is_over: Callable[[], bool] = lambda: False) -> None:
        """Generate the images `images/NAME-0.png`, ... after `step` steps and measure the validation loss.

        Once `is_over` no further image is generated and none is saved: a launcher kills a run that does not end within
        its grace period.
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
                    with atomic_write(state.run.images / file) as temporary:
                        image.save(temporary, format="PNG", pnginfo=drawing and png_text(drawing))
            state.run.add_event(
                {
                    "event": "preview",
                    "step": step,
                    "images": files,
                    "prompts": [picture.prompt for picture in self._pictures],
                    "seeds": [picture.seed for picture in self._pictures],
                }
            )
        if self._heldout is not None and not is_over():
            loss = self._heldout.now()
            state.run.add_event({"event": "validation", "step": step, "loss": loss})
            log_to_trackers(state.accelerator, {"validation_loss": loss}, step)
            logger.info("validation loss after %d steps: %.4f", step, loss)

    def _images(self, is_over: Callable[[], bool]) -> list[Image.Image]:
        state = self._state
        images: list[Image.Image] = []
        with eval_on_denoiser_device(state.base):
            for picture in self._pictures:
                if is_over():
                    break
                prompt = replace_placeholders(picture.prompt, state.tokens)
                images += generate_images(state.base, [prompt], [picture.seed], _settings(state, picture))
        return images


def drawing_of(state: TrainState, picture: Picture, step: int) -> Drawing | None:
    """How other tools reproduce the preview `picture` after `step` steps; None if they cannot.

    They have neither the tiny base nor the LoRA of a step before the last, and load new tokens from separate files.
    """
    config = state.config
    is_base = step == 0 and config.adapter.init_lora is None
    if state.tokens or not (is_base or step == state.end):
        return None
    name = state.run.lora_name(config.run.output_name)
    return state.base.describe_image(
        picture.prompt,
        picture.seed,
        _settings(state, picture),
        portable_base_name(state.base_name),
        () if is_base else ((name, 1.0),),
    )


def _settings(state: TrainState, picture: Picture) -> ImageSettings:
    return ImageSettings(state.batches.resolution, negative_prompt=picture.negative_prompt)


def is_due(state: TrainState, step: int) -> bool:
    """Whether previews follow `step`: after epoch 1, then each `validation_epochs` epochs, as in diffusers' script."""
    before, after = (state.batches.epoch_after(s) for s in (step - 1, step))
    every = state.config.run.validation_epochs
    return any((epoch - 1) % every == 0 for epoch in range(before + 1, after + 1))
