"""The settings of images and captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flatlora_diffusion.config.setting import Section, setting

Precision = Literal["no", "fp32", "fp16", "bf16"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]


@dataclass(frozen=True)
class DataConfig(Section):
    """Training images, captions, crops and caches."""

    instance_data_dir: str | None = setting(
        None,
        "folder of training images, with captions in .txt or .caption files of the same name",
        path_kind="read",
        free_on_resume=True,
        read_at_runtime=True,
        is_shared=True,
    )
    dataset_name: str | None = setting(
        None,
        "Hugging Face dataset (hub id or local path) instead of a folder",
        path_kind="model",
        free_on_resume=True,
        read_at_runtime=True,
        is_shared=True,
    )
    dataset_config: str | None = setting(
        None,
        "sd-scripts dataset config (TOML) instead of a folder: several folders with repeats and prompts",
        path_kind="read",
        free_on_resume=True,
        read_at_runtime=True,
        is_shared=True,
    )
    dataset_config_name: str | None = setting(
        None, "configuration (subset) of the Hugging Face dataset", path_kind="part"
    )
    cache_dir: str | None = setting(
        None, "cache folder of downloaded datasets", path_kind="written", free_on_resume=True
    )
    image_column: str = setting("image", "image column of the dataset")
    caption_column: str | None = setting(
        None, "caption column of the dataset or of metadata.jsonl; default: all images use the instance prompt"
    )
    instance_prompt: str | None = setting(None, "prompt of images without a caption")
    holdout_images: int = setting(
        0,
        "number of images held out from training; the checkpoint with the lowest loss on them is the result",
        min=0,
        max=10_000,
        affects="draws",
    )
    holdout_patience: int = setting(
        0,
        "early stopping after N checkpoints without a lower loss of --holdout_images; 0: no early stopping",
        min=0,
        free_on_resume=True,
    )
    repeats: int = setting(1, "repeats of each image per epoch", min=1, max=10_000, affects="draws")
    with_prior_preservation: bool = setting(
        False, "prior preservation: also train on class (regularization) images", affects="draws"
    )
    class_data_dir: str | None = setting(
        None,
        "folder of class images; missing images are generated",
        path_kind="written",
        free_on_resume=True,
        read_at_runtime=True,
    )
    class_prompt: str | None = setting(None, "prompt of the class images, without the trigger word")
    num_class_images: int = setting(100, "number of class images", min=1, free_on_resume=True)
    sample_batch_size: int = setting(4, "batch size for generating class images", min=1, free_on_resume=True)
    prior_generation_precision: Precision | None = setting(
        None, "precision for generating class images; default: fp16 on GPU, fp32 on CPU", free_on_resume=True
    )
    resolution: int | None = setting(
        None,
        "training resolution in pixels; default: that of the base (1024 for SDXL, 64 for tiny)",
        min=8,
        max=4096,
        is_resolved=True,
        affects="draws",
    )
    use_aspect_ratio_buckets: bool = setting(
        False,
        "aspect ratio bucketing: train at the aspect ratio of each image, with about resolution x resolution pixels",
        affects="draws",
    )
    center_crop: bool = setting(False, "center crop instead of random crop", affects="draws")
    random_flip: bool = setting(False, "random horizontal flip", affects="draws")
    image_interpolation_mode: Interpolation = setting(
        "lanczos", "interpolation filter for resizing images", affects="draws"
    )
    background_color: str = setting(
        "white", "background color of transparent images: a name or #rrggbb", affects="draws"
    )
    caption_dropout: float = setting(
        0.0,
        "caption dropout rate: fraction of samples trained unconditionally, with zero embeddings or, for a base with "
        "force_zeros_for_empty_prompt=false, the empty prompt",
        min=0,
        max=1,
    )
    shuffle_tags: bool = setting(False, "shuffle the comma-separated tags of a caption each time it is used")
    keep_tags: int = setting(0, "keep the first N tags of a caption in place (keep tokens)", min=0)
    tag_dropout: float = setting(
        0.0, "tag dropout rate: fraction of the other tags to drop each time a caption is used", min=0, max=1
    )
    cache_latents: bool = setting(
        False,
        "cache the latents: encode each image once, with one fixed crop per image",
        affects="draws",
    )
    cache_text_embeddings: bool = setting(
        False,
        "cache text encoder outputs in --embedding_cache_dir; in memory they are always cached unless trained",
        free_on_resume=True,
    )
    embedding_cache_dir: str | None = setting(
        None, "folder for cached embeddings, reused by later runs", path_kind="written", free_on_resume=True
    )
    dataloader_num_workers: int = setting(
        0, "threads that load the images of the next steps", min=0, max=64, free_on_resume=True
    )

    @property
    def draws_captions(self) -> bool:
        """Whether the caption of an image changes each time it is used."""
        return self.shuffle_tags or self.tag_dropout > 0

    @property
    def is_given(self) -> bool:
        """Whether a setting names the training images."""
        return bool(self.instance_data_dir or self.dataset_name or self.dataset_config)
