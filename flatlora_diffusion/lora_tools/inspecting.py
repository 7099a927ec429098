"""Reports on a LoRA file: parts, ranks, alphas, the size of its update in each block, and which tools read it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flatlora_diffusion.adapter.delta import norm
from flatlora_diffusion.config import DENOISERS, InspectConfig
from flatlora_diffusion.lora_files.lost_alpha import lost_alpha_warning
from flatlora_diffusion.lora_files.reading import FileLayer, ImportedLora
from flatlora_diffusion.lora_files.safe_reading import printable, shortlist
from flatlora_diffusion.lora_tools.converting import read_lora_file
from flatlora_diffusion.lora_tools.tool_support import tool_support

_STYLE_NAMES = {
    "kohya-sgm": "kohya",
    "kohya-diffusers": "kohya with diffusers' block names",
    "comfyui": "ComfyUI's own names",
    "lycoris": "LyCORIS (lycoris_)",
    "peft": "PEFT (lora_A)",
    "diffusers-old": "diffusers before PEFT (lora.down)",
    "processor": "the oldest of diffusers (processor.to_q_lora)",
}
_BLOCK_STEPS = {"mid_block": 3, "down_blocks": 4, "up_blocks": 4}  # of a block's path, by its first
_MAX_TAGS = 5
_MAX_KEYS = 20  # in the text; JSON has all


def inspect_lora(config: InspectConfig) -> str:
    """Return the report as text, or as JSON. Raises ConfigError for a file that cannot be read."""
    report = lora_report(read_lora_file(config.file, config.base))
    return json.dumps(report, indent=2) if config.json else "\n".join(_lines(report))


def lora_report(lora: ImportedLora) -> dict[str, Any]:
    """Build the report as JSON types. `norm` is ||scale * B A||_F over the layers of a block."""
    labels = lora.base.labels
    blocks: dict[tuple[str, str], list[FileLayer]] = defaultdict(list)
    for layer in lora.layers:
        blocks[layer.target.part, _block(layer)].append(layer)
    return {
        "file": lora.file.path.name,
        "base": labels.name if labels.is_demo else lora.base.base,
        "layout": _counts(_STYLE_NAMES[layer.target.style] for layer in lora.layers),
        "dtype": _counts(layer.dtype for layer in lora.layers),
        "ranks": _counts(str(layer.rank) for layer in lora.layers),
        "alphas": _counts("none" if layer.alpha is None else f"{layer.alpha:g}" for layer in lora.layers),
        "warnings": [warning] if (warning := lost_alpha_warning(lora)) else [],
        "trigger_words": trigger_words(lora.file.metadata),
        "blocks": [_block_report(lora, *target, layers) for target, layers in sorted(blocks.items())],
        "unknown_keys": [printable(key) for key in lora.unknown],
        "tools": [
            {"tool": tool, "layers": count, "of": len(lora.layers), "note": note}
            for tool, count, note in tool_support(lora)
        ],
    }


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """The trigger phrase in a file's metadata, or else the most common tags of its training captions."""
    phrase = metadata.get("modelspec.trigger_phrase")
    if phrase:
        return [printable(phrase)]
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
    except (ValueError, RecursionError):
        return []
    tags: Counter[str] = Counter()
    for counts in folders.values() if isinstance(folders, dict) else ():
        if isinstance(counts, dict):
            tags.update({tag: count for tag, count in counts.items() if type(count) is int})
    return [printable(tag.strip()) for tag, _ in tags.most_common(_MAX_TAGS)]


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Format a table: the first column aligned left, the others right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in (head, *rows)
    ]


def _block(layer: FileLayer) -> str:
    """`down_blocks.1.attentions.0`, `mid_block.resnets.1` or `transformer_blocks.3`; a text encoder is one block."""
    if layer.target.part not in DENOISERS:
        return ""
    steps = layer.target.module.split(".")
    is_numbered = len(steps) > 1 and steps[1].isdigit()  # a transformer's block
    return ".".join(steps[: _BLOCK_STEPS.get(steps[0], 2 if is_numbered else 1)])


def _block_report(lora: ImportedLora, part: str, block: str, layers: Sequence[FileLayer]) -> dict[str, Any]:
    norms = [norm(lora.updates[part][layer.target.module]) for layer in layers]
    return {
        "part": part,
        "block": block,
        "layers": len(layers),
        "ranks": sorted({layer.rank for layer in layers}),
        "norm": sum(value**2 for value in norms) ** 0.5,
    }


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _lines(report: Mapping[str, Any]) -> list[str]:
    def summary(name: str) -> str:
        counts = report[name]
        return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{key} ({n})" for key, n in counts.items())

    unknown = report["unknown_keys"]
    rows = [
        (
            f"{block['part']}.{block['block']}".rstrip("."),
            str(block["layers"]),
            "-".join(str(rank) for rank in dict.fromkeys((block["ranks"][0], block["ranks"][-1]))),
            f"{block['norm']:.4g}",
        )
        for block in report["blocks"]
    ]
    tools = [
        (row["tool"], f"{row['layers']} of {row['of']} modules will load", row["note"]) for row in report["tools"]
    ]
    return [
        f"{report['file']}: a LoRA for {report['base']}",
        f"layout   {summary('layout')}",
        f"dtype    {summary('dtype')}",
        f"rank     {summary('ranks')}",
        f"alpha    {summary('alphas')}",
        f"trigger  {', '.join(report['trigger_words']) or 'not in the metadata'}",
        *(f"warning  {warning}" for warning in report["warnings"]),
        "",
        *text_table(("block", "layers", "rank", "||dW||"), rows),
        *([""] if tools else []),
        *(f"{tool:22}{count}{': ' if note else ''}{note}" for tool, count, note in tools),
        *(["", f"{len(unknown)} keys of no layer: {shortlist(unknown, _MAX_KEYS)}"] if unknown else []),
    ]
