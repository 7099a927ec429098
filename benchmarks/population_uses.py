"""What LoRAs and their averages lose in use: in a base of 4 bits, cut to a lower rank, beside a LoRA of another style.

    python -m benchmarks.population_uses --work FOLDER      # that of `benchmarks.populations`

Each subject of `SUBJECTS` is measured on the list "known 200" of its style under the draws of its group, as it was
trained and in each of `USES`; the price of a use is its loss less that without it. A second LoRA of the other style is
the same subject trained there, in the same group; both styles' lists are measured. Goes on after a stop.

Writes benchmarks/population_uses.json, of which `python -m benchmarks.populations_page` makes its table.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import record
from benchmarks.population_icons import second_style, style_3d
from benchmarks.population_subjects import SUBJECTS as ALL, Subject
from benchmarks.populations import UNIT, Study
from flatlora_diffusion.config import TINY
from flatlora_diffusion.evaluation.probe import draw_losses
from flatlora_diffusion.flatness.perturbed_models import round_to
from flatlora_diffusion.lora_files.loading import lora_scale, loras_loaded
from flatlora_diffusion.lora_files.names import base_names
from flatlora_diffusion.lora_files.paths import LoraFile
from flatlora_diffusion.lora_tools.averaging import average_updates
from flatlora_diffusion.lora_tools.converting import read_lora_file, write_lora
from flatlora_diffusion.storage.atomic_io import atomic_write, file_sha256

LIST = "known 200"
SUBJECTS = ("lora", "average of 3", "Flat-LoRA 0.4", "SAM 0.125")
ALONE, BESIDE = "as trained", "beside a LoRA of the other style"
ALONE_IN_BOTH = "as trained, both styles"
BITS = {"base in fp16": "fp16", "base in NF4": "nf4", "base in int8": "int8", "base in fp8": "fp8"}
CUTS = {"cut to rank 2": 2, "cut to rank 1": 1}
USES = (*BITS, *CUTS, BESIDE)


class Uses:
    """Both styles' studies below one work folder, and what is measured of their LoRAs."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._styles = [
            Study(style_3d(work / "packages", work), work / "3d"),
            Study(second_style(work / "packages", work), work / "second-style"),
        ]

    def rows(self, subject: Subject, group: int) -> dict[str, Tensor]:
        """(icons, draws) losses of each use, in the first style; beside another LoRA those of both styles."""
        first, second = self._styles
        own, other = (self._file(style, subject, group) for style in self._styles)
        found = {use: self._measured(first, [own], group, use) for use in (ALONE, *BITS)}
        for use, rank in CUTS.items():
            found[use] = self._measured(first, [self._cut(own, rank)], group, ALONE)
        found[BESIDE] = torch.cat([self._measured(style, [own, other], group, ALONE) for style in (first, second)])
        found[ALONE_IN_BOTH] = torch.cat([found[ALONE], self._measured(second, [other], group, ALONE)])
        return found

    def base(self, group: int) -> dict[str, Tensor]:
        """The base's own, in each number of bits."""
        return {use: self._measured(self._styles[0], [], group, use) for use in (ALONE, *BITS)}

    def _file(self, style: Study, subject: Subject, group: int) -> Path:
        return next(iter(style.files(subject, group)))[1]

    def _cut(self, file: Path, rank: int) -> Path:
        path = self._work / "cuts" / f"{file_sha256(file)[:24]}-{rank}.safetensors"
        if not path.is_file():
            updates = average_updates([read_lora_file(str(file), TINY).updates], [1.0], rank).updates
            write_lora(updates, base_names(TINY), path, "diffusers", "fp32", {})
        return path

    def _measured(self, style: Study, files: Sequence[Path], group: int, use: str) -> Tensor:
        parts = [style.name, *(file_sha256(file)[:24] for file in files), str(group), use.replace(" ", "-")]
        cache = self._work / "uses" / f"{'_'.join(parts)}.safetensors"
        if not cache.is_file():
            cache.parent.mkdir(parents=True, exist_ok=True)
            losses = self._measure(style, files, group, use)
            with atomic_write(cache) as aside:
                save_file({"losses": losses.float()}, aside)
        return load_file(cache)["losses"].double()

    def _measure(self, style: Study, files: Sequence[Path], group: int, use: str) -> Tensor:
        base = style.loaded
        probe, objective = style.probes(group)[LIST], base.objective()
        loras = [LoraFile(file) for file in files]
        with in_bits(base.denoiser, BITS.get(use)):
            if not loras:
                return draw_losses(base.denoiser, objective, probe)
            with loras_loaded(base.pipeline, loras), lora_scale(base.pipeline, loras, 1.0, merge=False):
                return draw_losses(base.denoiser, objective, probe)


@contextmanager
def in_bits(unet: nn.Module, kind: str | None) -> Iterator[None]:
    """The weights of all linear layers rounded as loaders round a base, NF4 in blocks of 64 by bitsandbytes."""
    layers = [module for module in unet.modules() if isinstance(module, nn.Linear)] if kind else []
    whole = [layer.weight.detach().clone() for layer in layers]
    try:
        for layer in layers:
            layer.weight.data = rounded(layer.weight.data, str(kind))
        yield
    finally:
        for layer, weight in zip(layers, whole, strict=True):
            layer.weight.data = weight


def rounded(weight: Tensor, kind: str) -> Tensor:
    """`weight` in `kind` and back."""
    if kind != "nf4":
        return round_to(weight, kind)  # type: ignore[arg-type]
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    coarse: Tensor = dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    return coarse.to(weight)


def result(uses: Uses, groups: int) -> dict[str, Any]:
    """Losses in 10⁻⁵ by subject, use, group and icon, the mean over draws; and the base's."""
    rows = []
    for group in range(groups):
        for name in SUBJECTS:
            measured = uses.rows(ALL[name], group)
            losses = {use: _by_icon(of_use) for use, of_use in measured.items()}
            rows.append({"subject": name, "group": group, "losses": losses})
            means = {use: round(float(of_use.mean()) / UNIT) for use, of_use in measured.items()}
            print(f"group {group}, {name}: {means}", flush=True)
    base = {str(group): {use: _by_icon(losses) for use, losses in uses.base(group).items()} for group in range(groups)}
    return {"list": LIST, "base": base, "rows": rows}


def _by_icon(losses: Tensor) -> str:
    """The mean over draws of each icon, joined by blanks, as indented JSON is large."""
    return " ".join(f"{float(value) / UNIT:.1f}" for value in losses.mean(dim=1))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of `benchmarks.populations`")
    parser.add_argument("--groups", type=int, default=5, help="groups of three seeds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for the JSON")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)  # of every file that is loaded the same
    torch.set_num_threads(options.threads)
    record.save(options.out / "population_uses.json", result(Uses(options.work.resolve()), options.groups))


if __name__ == "__main__":
    main()
