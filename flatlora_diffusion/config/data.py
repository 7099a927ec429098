"""The settings of images and captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flatlora_diffusion.config.setting import Section, setting

Precision = Literal["no", "fp32", "fp16", "bf16"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]


@dataclass(frozen=True)
class DataConfig(Section):
    """The images and their captions."""

    instance_data_dir: str | None = setting(
        None,
        "folder with the training images; captions from .txt/.caption beside them",
        place="read",
        free_on_resume=True,
        stays_open=True,
        is_shared=True,
    )
    dataset_name: str | None = setting(
        None,
        "in place of a folder: a Hugging Face dataset, by hub id or local path",
        place="model",
        free_on_resume=True,
        stays_open=True,
        is_shared=True,
    )
    dataset_config: str | None = setting(
        None,
        "in place of a folder: a dataset file (TOML) of sd-scripts with several folders, their repeats and prompts",
        place="read",
        free_on_resume=True,
        stays_open=True,
        is_shared=True,
    )
    dataset_config_name: str | None = setting(None, "configuration of that dataset", place="part")
    cache_dir: str | None = setting(None, "where downloaded datasets are kept", place="written", free_on_resume=True)
    image_column: str = setting("image", "dataset column with the images")
    caption_column: str | None = setting(
        None, "dataset column, or field of metadata.jsonl, with the captions; default: every image uses the prompt"
    )
    instance_prompt: str | None = setting(None, "prompt for every image without a caption of its own")
    holdout_images: int = setting(
        0,
        "so many of the images, always the same, are not trained on: their loss chooses the checkpoint that becomes "
        "the result",
        min=0,
        max=10_000,
        moves="draws",
    )
    holdout_patience: int = setting(
        0,
        "stop after so many checkpoints in a row without a lower loss of --holdout_images; 0: train all steps",
        min=0,
        free_on_resume=True,
    )
    holdout_folds: int = setting(
        0,
        "for few images: so many runs of --max_train_steps, each without another part of the images, find at how many "
        "steps the held-out loss of all images is lowest; then the run trains on all of them for so many",
        min=0,
        max=100,
    )
    repeats: int = setting(1, "how often each image is used per epoch", min=1, max=10_000, moves="draws")
    with_prior_preservation: bool = setting(
        False, "train on class images too, so that the class keeps its look", moves="draws"
    )
    class_data_dir: str | None = setting(
        None,
        "folder of class images; missing ones are generated into it",
        place="written",
        free_on_resume=True,
        stays_open=True,
    )
    class_prompt: str | None = setting(None, "prompt of the class, without the trigger")
    num_class_images: int = setting(100, "class images to have", min=1, free_on_resume=True)
    sample_batch_size: int = setting(4, "batch size of generating them", min=1, free_on_resume=True)
    prior_generation_precision: Precision | None = setting(
        None, "precision of generating them; default: fp16 on a GPU, fp32 on a CPU", free_on_resume=True
    )
    resolution: int | None = setting(
        None,
        "training size in pixels; default: the base's own (1024 for SDXL, 64 for tiny)",
        min=8,
        max=4096,
        is_settled=True,
        moves="draws",
    )
    use_aspect_ratio_buckets: bool = setting(
        False,
        "keep each image's shape: batches of one shape, all of about resolution x resolution pixels",
        moves="draws",
    )
    center_crop: bool = setting(False, "crop at the centre instead of at random", moves="draws")
    random_flip: bool = setting(False, "mirror images at random, anew in each epoch", moves="draws")
    image_interpolation_mode: Interpolation = setting("lanczos", "filter for resizing", moves="draws")
    background_color: str = setting("white", "colour put behind transparent images: a name or #rrggbb", moves="draws")
    caption_dropout: float = setting(
        0.0,
        "share of samples trained without prompt, as the base has it in guidance: embeddings of zeros, or of "
        "the empty prompt where its force_zeros_for_empty_prompt is false",
        min=0,
        max=1,
    )
    shuffle_tags: bool = setting(False, "shuffle the tags of a caption, with commas between them, for each showing")
    keep_tags: int = setting(0, "so many first tags of a caption are neither shuffled nor dropped", min=0)
    tag_dropout: float = setting(0.0, "share of the other tags that a showing leaves out", min=0, max=1)
    cache_latents: bool = setting(
        False,
        "encode each image once: posterior mean and std, both flips, one seeded crop for the whole run",
        moves="draws",
    )
    cache_text_embeddings: bool = setting(
        False,
        "keep the prompt embeddings in --embedding_cache_dir; in memory they are always cached when frozen",
        free_on_resume=True,
    )
    embedding_cache_dir: str | None = setting(
        None, "keep what is cached in this folder, for later runs", place="written", free_on_resume=True
    )
    dataloader_num_workers: int = setting(
        0, "threads that load the images of the next step", min=0, max=64, free_on_resume=True
    )

    @property
    def draws_captions(self) -> bool:
        """Whether an image's caption is another one in each showing."""
        return self.shuffle_tags or self.tag_dropout > 0

    @property
    def is_given(self) -> bool:
        """Whether some setting names the training images."""
        return bool(self.instance_data_dir or self.dataset_name or self.dataset_config)
