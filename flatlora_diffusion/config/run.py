"""The settings of the run itself: its folder, files, previews and reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flatlora_diffusion.config.setting import Section, setting

SaveDtype = Literal["fp16", "bf16", "fp32"]
SelfCheck = Literal["once", "always", "never"]


@dataclass(frozen=True)
class RunConfig(Section):
    """Where the run goes and what it leaves."""

    output_dir: str = setting(
        "lora-dreambooth-model",
        "run folder: weights, checkpoints, log",
        place="run",
        free_on_resume=True,
        is_shared=True,
    )
    output_name: str | None = setting(
        None, "name of the LoRA for other tools; default: the run folder's", free_on_resume=True, is_shared=True
    )
    output_kohya_format: bool = setting(
        False,
        "also write the file for other tools as pytorch_lora_weights_kohya.safetensors, as diffusers names it",
        free_on_resume=True,
    )
    save_dtype: SaveDtype = setting(
        "fp16", "precision of the LoRA files; what a resumed run needs stays fp32", free_on_resume=True
    )
    seed: int | None = setting(
        None,
        "seed of every draw; default: drawn from the system, printed and saved",
        min=0,
        is_settled=True,
        is_shared=True,
    )
    checkpointing_steps: int = setting(
        500, "a resumable checkpoint every N steps", min=1, free_on_resume=True, is_shared=True
    )
    checkpoints_total_limit: int | None = setting(None, "keep only this many checkpoints", min=1, free_on_resume=True)
    resume_from_checkpoint: str | None = setting(
        None, "a checkpoint's name; `latest` starts a run if there is none", free_on_resume=True, is_shared=True
    )
    validation_prompt: str | None = setting(
        None,
        "prompt of the preview images; given several times, or with one a line, of each; default: none are made",
        free_on_resume=True,
        is_lines=True,
    )
    validation_prompts_file: str | None = setting(
        None,
        "JSON Lines with prompt and, if wanted, negative_prompt and seed: one preview image each",
        place="read",
        free_on_resume=True,
        stays_open=True,
    )
    num_validation_images: int = setting(
        4, "preview images of each --validation_prompt", min=1, max=64, free_on_resume=True
    )
    validation_epochs: int = setting(
        50, "previews after every N epochs, beside those of the base and at the end", min=1, free_on_resume=True
    )
    validation_data_dir: str | None = setting(
        None,
        "images that are not trained on: their loss, with fixed noise and timesteps, is logged with the previews",
        place="read",
        free_on_resume=True,
        stays_open=True,
    )
    selfcheck: SelfCheck = setting(
        "once",
        "let the first three steps of a new run check themselves and tell what they found: once for each version on "
        "each kind of CUDA device, always, or never",
        free_on_resume=True,
    )
    report_to: str = setting("tensorboard", "tracker: tensorboard, wandb, comet_ml, all or none", free_on_resume=True)
    logging_dir: str = setting("logs", "folder of the tracker, in the run folder", place="part", free_on_resume=True)
    push_to_hub: bool = setting(
        False,
        "upload LoRA, model card and preview images to the Hugging Face hub",
        free_on_resume=True,
        is_shared=True,
    )
    hub_token: str | None = setting(
        None, "token for it; never saved. Better: log in with `hf auth login`", is_secret=True, free_on_resume=True
    )
    hub_model_id: str | None = setting(
        None, "repository to upload to; default: the run folder's name", free_on_resume=True
    )
    local_rank: int = setting(
        -1, "accepted for old launchers; the environment's LOCAL_RANK is what counts", free_on_resume=True
    )

    @property
    def preview_prompts(self) -> list[str]:
        """Each line of `validation_prompt` once; an empty one is a prompt of its own, as in diffusers' script."""
        if self.validation_prompt is None:
            return []
        lines = [line.strip() for line in self.validation_prompt.splitlines() if line.strip()]
        return list(dict.fromkeys(lines)) or [""]
