"""The LoRA that a run starts from, read from a file in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flatlora_diffusion.lora_files.names import loaded_names
from flatlora_diffusion.lora_files.paths import in_folder
from flatlora_diffusion.lora_files.reading import ImportedLora, lora_of_base
from flatlora_diffusion.lora_files.safe_reading import checked_file
from flatlora_diffusion.storage.model_paths import check_lora


def read_lora(pipeline: Any, path: Path) -> ImportedLora:
    """The LoRA of a file, or of the run folder that holds it, for a pipeline without one.

    Raises ConfigError for a file that cannot be read or that adapts nothing of this base.
    """
    check_lora("init_lora", str(path))
    return lora_of_base(checked_file(in_folder(path)), loaded_names(pipeline))
