"""The model card: use and training of the LoRA, without the user's file names, paths and captions.

It makes no claims about quality, which are for measurements.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCardData
from huggingface_hub.constants import REPOCARD_NAME

from flatlora_diffusion.adapter.new_tokens import FILE_KEYS, new_tokens, replace_placeholders
from flatlora_diffusion.config import INCLUDED_BASES, KLEIN, METHODS, TrainConfig
from flatlora_diffusion.families.labels import Labels
from flatlora_diffusion.families.registry import family_of
from flatlora_diffusion.lora_files.metadata import TrainingSummary, conversion_note, is_hub_id, portable_base_name
from flatlora_diffusion.storage.atomic_io import write_text
from flatlora_diffusion.storage.formatting import count_text
from flatlora_diffusion.storage.run_dir import EMBEDDINGS_FILE, LORA_FILE, RunDir
from flatlora_diffusion.storage.versions import versions

PICTURES_PER_ROW = 4
KLEIN_4B = (KLEIN, KLEIN.replace("-base", ""))  # of one licence, unlike the 9B


def write_model_card(
    run: RunDir, config: TrainConfig, pictures: Sequence[tuple[Path, str]], training: TrainingSummary
) -> Path:
    """Write the run's README.md and return its path; `pictures` are files in the run folder, each with its prompt."""
    labels, trigger_words = training.labels, training.trigger
    parts = [
        f"---\n{_card_data(run, config, pictures, labels).to_yaml()}\n---",
        f"# {_title(run, config)}",
        _summary(config, labels),
        *_picture_tables(run, pictures),
        _trigger_section(trigger_words),
        f"## Use it in diffusers\n\n```python\n{usage_code(config, pictures, trigger_words)}\n```",
        f"## Use it elsewhere\n\n{_elsewhere(run, config, labels)}",
        f"## How it was trained\n\n{_training_data(config, training)}\n\n{_settings_table(config, training)}",
        f"Versions: {', '.join(f'{name} {version}' for name, version in versions().items())}.",
    ]
    card = run.folder / REPOCARD_NAME
    write_text(card, "\n\n".join(parts) + "\n")
    return card


def usage_code(config: TrainConfig, pictures: Sequence[tuple[Path, str]], trigger_words: str) -> str:
    """Python code that generates an image; without a hub id it runs in the LoRA's folder."""
    prompts = [prompt for _, prompt in pictures] + [config.data.instance_prompt, trigger_words, "an icon"]
    prompt = _in_new_tokens(config, next(prompt for prompt in prompts if prompt))
    hub_id = config.run.hub_model_id if config.run.push_to_hub and "/" in (config.run.hub_model_id or "") else None
    is_pivotal, family = config.tokens.train_text_encoder_ti, family_of(config.model)
    clip_skip = "" if config.model.clip_skip is None else f", clip_skip={config.model.clip_skip}"
    sizes = "".join(f", {name}={value}" for name, value in family.call_options(config.model).items())
    options = f"num_inference_steps={family.steps}{clip_skip}{sizes}"
    dtype = "bfloat16" if family.prefers_bf16 else "float16"
    lines = [
        "import torch",
        f"from diffusers import {family.pipeline}",
        *(["from huggingface_hub import hf_hub_download"] if is_pivotal and hub_id else []),
        *(["from safetensors.torch import load_file"] if is_pivotal else []),
        "",
        f'device, dtype = ("cuda", torch.{dtype}) if torch.cuda.is_available() else ("cpu", torch.float32)',
        f"pipeline = {family.pipeline}.{_loading(config)}.to(device, dtype)",
        *_scheduler_lines(config),
        f'pipeline.load_lora_weights("{hub_id or "."}", weight_name="{LORA_FILE}")' + ("" if hub_id else "  # here"),
        *(_embedding_lines(config, hub_id) if is_pivotal else []),
        f"image = pipeline(prompt={json.dumps(prompt, ensure_ascii=False)}, {options}).images[0]",
        'image.save("image.png")',
    ]
    return "\n".join(lines)


def _card_data(
    run: RunDir, config: TrainConfig, pictures: Sequence[tuple[Path, str]], labels: Labels
) -> ModelCardData:
    prompt = config.data.instance_prompt
    method = ["flat-lora"] if config.perturb.method == "flat-lora" else []
    base = [] if labels.is_demo else [labels.tag]
    return ModelCardData(
        license=_license(config),
        library_name="diffusers",
        base_model=_hub_id(config),
        tags=["text-to-image", "diffusers", "lora", *method, *base, "template:sd-lora"],
        instance_prompt=None if prompt is None else _in_new_tokens(config, prompt),
        widget=[
            {"text": _in_new_tokens(config, prompt), "output": {"url": _relative(run, path)}}
            for path, prompt in pictures
        ]
        or None,
    )


def _hub_id(config: TrainConfig) -> str | None:
    """The base's hub id; None for an included base, a folder or a file."""
    name = config.model.pretrained_model_name_or_path
    return name if is_hub_id(name) and not Path(name).exists() else None


def _license(config: TrainConfig) -> str:
    """The licence of the base if it is known without a request to the hub."""
    if config.model.pretrained_model_name_or_path in INCLUDED_BASES:
        return "apache-2.0"
    hub_id = _hub_id(config) or ""
    if hub_id in KLEIN_4B:
        return "apache-2.0"
    return "openrail++" if hub_id.startswith("stabilityai/stable-diffusion-xl-") else "other"


def _base(config: TrainConfig) -> str:
    name, family = portable_base_name(config), family_of(config.model).name
    return f"{'an' if family == 'SDXL' else 'a'} {family} base in a local folder" if name is None else _code(name)


def _title(run: RunDir, config: TrainConfig) -> str:
    on_hub = (config.run.hub_model_id or "").split("/")[-1]
    return config.run.output_name or on_hub or run.folder.resolve().name


def _summary(config: TrainConfig, labels: Labels) -> str:
    base = labels.name if labels.is_demo else _base(config)
    if config.perturb.method != "flat-lora":
        name = METHODS[config.perturb.method].title
        how = "" if config.perturb.method == "lora" else f" by {name}"
        return f"A LoRA for {base}, trained with flatlora-diffusion{how}. It is used like any other LoRA."
    return (
        f"A LoRA for {base}, trained with flatlora-diffusion by Flat-LoRA "
        "([arXiv:2409.14396](https://arxiv.org/abs/2409.14396)): each step's gradient is taken at randomly perturbed "
        "base weights. It is used like any other LoRA."
    )


def _picture_tables(run: RunDir, pictures: Sequence[tuple[Path, str]]) -> list[str]:
    """A table for each row of pictures, with the prompts as its header."""
    rows = [pictures[start : start + PICTURES_PER_ROW] for start in range(0, len(pictures), PICTURES_PER_ROW)]
    return [
        _table(
            [_code(prompt).replace("|", r"\|") for _, prompt in row],
            [[f"![{path.stem}]({_relative(run, path)})" for path, _ in row]],
        )
        for row in rows
    ]


def _trigger_section(trigger_words: str) -> str:
    if not trigger_words:
        return "## Trigger words\n\nNone: the captions of the images share no words."
    return f"## Trigger words\n\nWrite {_code(trigger_words)} in the prompt."


def _loading(config: TrainConfig) -> str:
    """The call that loads the base; a local file or BASE_FOLDER is expected in the working folder."""
    name = portable_base_name(config) or "BASE_FOLDER"
    name = f"samples/{INCLUDED_BASES[name].name}" if name in INCLUDED_BASES else name
    if name.endswith(".safetensors"):
        return f'from_single_file("{name}")'
    choices = {"revision": config.model.revision, "variant": config.model.variant}
    options = "".join(f', {key}="{value}"' for key, value in choices.items() if value is not None)
    return f'from_pretrained("{name}"{options})'


def _scheduler_lines(config: TrainConfig) -> list[str]:
    """Code that changes the base's scheduler to that of the training, if they differ."""
    changes: dict[str, object] = {}
    if config.model.prediction_type is not None:
        changes["prediction_type"] = config.model.prediction_type
    if config.model.zero_terminal_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if not changes:
        return []
    return [
        f"changes = {changes}",
        "pipeline.scheduler = type(pipeline.scheduler).from_config({**pipeline.scheduler.config, **changes})",
    ]


def _embedding_lines(config: TrainConfig, hub_id: str | None) -> list[str]:
    tokens = [name for names in new_tokens(config.tokens).values() for name in names]
    file = f'"{EMBEDDINGS_FILE}"' if hub_id is None else f'hf_hub_download("{hub_id}", "{EMBEDDINGS_FILE}")'
    return [
        f"tokens, embeddings = {json.dumps(tokens)}, load_file({file})",
        *(
            f'pipeline.load_textual_inversion(list(embeddings["{key}"]), token=tokens, '
            f"tokenizer=pipeline.{encoder.replace('text_encoder', 'tokenizer')}, text_encoder=pipeline.{encoder})"
            for encoder, key in FILE_KEYS.items()
        ),
    ]


def _in_new_tokens(config: TrainConfig, text: str) -> str:
    """`text` with pivotal tuning's new tokens in place of the placeholders."""
    return replace_placeholders(text, new_tokens(config.tokens)) if config.tokens.train_text_encoder_ti else text


def _elsewhere(run: RunDir, config: TrainConfig, labels: Labels) -> str:
    if labels.is_demo:
        return f"It is for {labels.name}, which other programs do not have."
    file = f"{run.lora_name(config.run.output_name)}.safetensors"
    text = f"Put `{file}` into the LoRA folder of {labels.programs}."
    proofs = [event for event in run.events() if event["event"] == "proof"] if run.events_file.is_file() else []
    description = conversion_note(config.adapter, proofs[-1].get("missed_by_plain_lora", 0.0) if proofs else 0.0)
    if config.adapter.use_dora:
        description = description or "a plain LoRA made of a DoRA"
        text += f" It is {description}; the DoRA is in `{LORA_FILE}`, for diffusers only."
    elif description:
        text += f" It is {description}; the merged pipeline is exact."
    return text


def _training_data(config: TrainConfig, training: TrainingSummary) -> str:
    images = f"Trained on {count_text(training.images, 'image')}"
    if training.class_images:
        images += f", and on {count_text(training.class_images, 'image')} of the class"
    if config.objective.prior_from_base:
        images += ", with the base's own predictions to preserve the class"
    return f"{images}. Neither the images, nor their names, nor captions of their own are published here."


def _settings_table(config: TrainConfig, training: TrainingSummary) -> str:
    data, adapter, perturb, optim = config.data, config.adapter, config.perturb, config.optim
    is_complete = training.step == optim.max_train_steps
    rows: list[tuple[str, object]] = [("base", _base(config)), ("method", perturb.method)]
    if perturb.effective_rho:
        rows.append(("rho", f"{perturb.effective_rho:g}"))
    if perturb.draws_noise:
        rows.append(("sigma", f"{perturb.effective_sigma:g}, {perturb.sigma_schedule}"))
        rows.append(("draws of eps", perturb.perturb_draw))
    kinds = [adapter.adapter, *(["dora"] * adapter.use_dora), *(["rslora"] * adapter.use_rslora)]
    rows += [
        ("adapter", ", ".join(dict.fromkeys(kind for kind in kinds if kind != "lora")) or "lora"),
        ("rank", adapter.rank),
        ("alpha", f"{adapter.rank if adapter.lora_alpha is None else adapter.lora_alpha:g}"),
        ("learning rate", f"{optim.learning_rate:g}, {optim.lr_scheduler}"),
        ("optimizer", optim.optimizer),
        ("steps", training.step if is_complete else f"{training.step} of {optim.max_train_steps}"),
        ("batch size", f"{optim.train_batch_size} x {optim.gradient_accumulation_steps} accumulated"),
        ("resolution", data.resolution),
        ("seed", config.run.seed),
    ]
    if training.average:
        rows.append(("result", training.average))
    return _table(["setting", "value"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def _code(text: str) -> str:
    """`text` as a code span on a single line, so that `<s0>` or `*` in it are not markup."""
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"


def _relative(run: RunDir, path: Path) -> str:
    return path.relative_to(run.folder).as_posix()
