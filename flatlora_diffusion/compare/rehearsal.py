"""The estimated peaks of `evidence` by phase, from shapes alone: nothing is loaded and no GPU is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flatlora_diffusion.compare.arms import parse_arm, plan_runs
from flatlora_diffusion.compare.evidence_defaults import DOWNLOADS, Part
from flatlora_diffusion.compare.plan_lines import remaining_bytes
from flatlora_diffusion.config import EvidenceConfig, TrainConfig
from flatlora_diffusion.data.sources import load_training_set
from flatlora_diffusion.memory.disk import PIXEL
from flatlora_diffusion.memory.estimate import CONTEXT_BYTES, GIB, estimate_memory, in_gib, resolution_of
from flatlora_diffusion.memory.host import estimate_cpu_memory

PROCESS_BYTES = int(2.5 * GIB)
"""CPU memory of a process with PyTorch and its CUDA libraries: assumed, not measured."""


class Phase(NamedTuple):
    """A phase with its peaks in bytes, over all processes of the comparison."""

    name: str
    gpu: int
    cpu: int


def phases(config: TrainConfig, options: EvidenceConfig, parts: Sequence[Part]) -> list[Phase]:
    """Estimate the peaks of each phase of `parts`, with the settings of `settings_for_gpu`.

    While a run trains in its own process, the comparison's process keeps its CUDA context and the encoders.
    Memory-mapped files do not count as CPU memory, because the system drops their pages when it needs the memory.
    """
    samples = load_training_set(config.data).samples
    encoders = sum(DOWNLOADS.get(name, 0) for name in options.encoders)
    host = estimate_cpu_memory(config, samples)
    loading, training = host.loading - host.mapped, host.offloaded + host.latents + host.prompts
    waiting = PROCESS_BYTES + encoders
    table: list[Phase] = []
    for key in dict.fromkeys(arm for part in parts for arm in part.arms):
        arm = parse_arm(key)
        (planned,) = plan_runs(config, [arm], [0], options.num_checkpoints)
        estimate = estimate_memory(planned.config)
        if not table:
            cpu = waiting + PROCESS_BYTES + loading
            table.append(Phase("loading and encoding", CONTEXT_BYTES + estimate.encoding, cpu))
        step, cpu = sum(estimate.parts.values()), waiting + PROCESS_BYTES + training
        table.append(Phase(f"training steps, {arm.name}", CONTEXT_BYTES + step, cpu))
    drawing = estimate_memory(config.replace(offload=False, validation_prompt="a prompt"))
    table.append(Phase("drawing and measuring", drawing.previews, waiting + loading))
    return table


def disk_bytes(config: TrainConfig, options: EvidenceConfig, parts: Sequence[Part]) -> int:
    """Estimate the bytes of the downloads and of all files of the largest part."""
    part = max(parts, key=lambda part: len(part.arms) * part.num_seeds)
    runs = plan_runs(config, [parse_arm(key) for key in part.arms], range(part.num_seeds), options.num_checkpoints)
    models = [config.model.pretrained_model_name_or_path, *options.encoders]
    pictures = 2 * options.num_prompts * options.pictures_per_prompt * (1 + len(runs) * (1 + options.num_checkpoints))
    size = pictures * PIXEL * resolution_of(config) ** 2
    return sum(map(remaining_bytes, runs)) + int(size + sum(DOWNLOADS.get(name, 0) for name in models))


def rehearsal_lines(config: TrainConfig, options: EvidenceConfig, parts: Sequence[Part]) -> Iterator[str]:
    """Yield the lines of a table of the phases, then the disk space."""
    table = phases(config, options, parts)
    width = max(len(phase.name) for phase in table)
    yield f"{'Estimated peaks':<{width}}  GPU memory  CPU memory"
    for phase in table:
        yield f"{phase.name:<{width}}  {in_gib(phase.gpu):>10}  {in_gib(phase.cpu):>10}"
    yield f"{in_gib(disk_bytes(config, options, parts))} on disk, with the downloads"
