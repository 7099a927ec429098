"""The settings of the run: folder, checkpoints, previews, trackers, and an average of several LoRAs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flatlora_diffusion.config.setting import Section, setting

SaveDtype = Literal["fp16", "bf16", "fp32"]
SelfCheck = Literal["once", "always", "never"]


@dataclass(frozen=True)
class RunConfig(Section):
    """Run folder, files, previews and trackers."""

    output_dir: str = setting(
        "lora-dreambooth-model",
        "run folder for LoRA files, checkpoints and logs",
        path_kind="run",
        free_on_resume=True,
        is_shared=True,
    )
    output_name: str | None = setting(
        None, "name of the LoRA in other tools; default: name of the run folder", free_on_resume=True, is_shared=True
    )
    output_kohya_format: bool = setting(
        False,
        "also save the kohya-format LoRA under diffusers' name pytorch_lora_weights_kohya.safetensors",
        free_on_resume=True,
    )
    save_dtype: SaveDtype = setting(
        "fp16", "precision of the saved LoRA; checkpoints for resuming stay fp32", free_on_resume=True
    )
    seed: int | None = setting(
        None,
        "random seed; default: a random one, which is logged and saved",
        min=0,
        is_resolved=True,
        is_shared=True,
    )
    checkpointing_steps: int = setting(
        500, "save a resumable checkpoint every N steps", min=1, free_on_resume=True, is_shared=True
    )
    checkpoints_total_limit: int | None = setting(
        None, "maximum number of checkpoints; older ones are deleted", min=1, free_on_resume=True
    )
    resume_from_checkpoint: str | None = setting(
        None,
        "checkpoint to resume from, or `latest`, which starts a new run if there is none",
        free_on_resume=True,
        is_shared=True,
    )
    validation_prompt: str | None = setting(
        None,
        "prompt of the preview images; several: repeat the flag or one prompt per line; default: no previews",
        free_on_resume=True,
        is_multiline=True,
    )
    validation_prompts_file: str | None = setting(
        None,
        "JSON Lines file with a preview image per line: prompt and optional negative_prompt and seed",
        path_kind="read",
        free_on_resume=True,
        read_at_runtime=True,
    )
    num_validation_images: int = setting(
        4, "preview images per --validation_prompt", min=1, max=64, free_on_resume=True
    )
    validation_epochs: int = setting(
        50, "generate previews every N epochs, and at the start and end", min=1, free_on_resume=True
    )
    validation_data_dir: str | None = setting(
        None,
        "folder of validation images: their loss, with fixed noise and timesteps, is logged with the previews",
        path_kind="read",
        free_on_resume=True,
        read_at_runtime=True,
    )
    image_loss_draws: int = setting(
        0,
        "loss by image: measure each training image (at most 100) at N fixed draws of noise and timestep, at the "
        "start, at each checkpoint and at the end; a measurement takes about as long as images x N / 3 training "
        "samples; 8 is enough to find images learned too well or not at all; 0: no measurement",
        min=0,
        max=64,
        legacy_default=0,
        free_on_resume=True,
        is_shared=True,
    )
    selfcheck: SelfCheck = setting(
        "once",
        "check the first three steps of a new run for numerical errors: once per version and CUDA device model, "
        "always or never",
        free_on_resume=True,
    )
    report_to: str = setting(
        "tensorboard", "experiment tracker: tensorboard, wandb, comet_ml, all or none", free_on_resume=True
    )
    logging_dir: str = setting(
        "logs", "folder of the tracker logs in the run folder", path_kind="part", free_on_resume=True
    )
    push_to_hub: bool = setting(
        False,
        "upload LoRA, model card and preview images to the Hugging Face Hub",
        free_on_resume=True,
        is_shared=True,
    )
    hub_token: str | None = setting(
        None,
        "Hugging Face token for the upload, never saved; `hf auth login` is safer",
        is_secret=True,
        free_on_resume=True,
    )
    hub_model_id: str | None = setting(
        None, "repository to upload to; default: name of the run folder", free_on_resume=True
    )
    local_rank: int = setting(
        -1, "for compatibility with old launchers; the environment variable LOCAL_RANK is used", free_on_resume=True
    )

    @property
    def preview_prompts(self) -> list[str]:
        """The distinct lines of `validation_prompt`; an empty text is an empty prompt, as in diffusers' script."""
        if self.validation_prompt is None:
            return []
        lines = [line.strip() for line in self.validation_prompt.splitlines() if line.strip()]
        return list(dict.fromkeys(lines)) or [""]


@dataclass(frozen=True)
class MembersConfig(Section):
    """Training several LoRAs and saving their average."""

    members: int | None = setting(
        None,
        "train N LoRAs with different seeds one after the other and save their average; N times the time, the memory "
        "of one run; --holdout_images select its strength",
        min=2,
        max=64,
        legacy_default=None,
        affects="draws",
    )
    average_rank: int | None = setting(
        None,
        "reduce the average to this rank by SVD; default: --members times --rank, which is exact",
        min=1,
        max=1024,
        legacy_default=None,
    )
    remove_members: bool = setting(
        False,
        "delete the runs of the members after saving their average",
        legacy_default=False,
        free_on_resume=True,
    )

    @property
    def trainings(self) -> int:
        """Number of LoRAs that the run trains."""
        return self.members or 1
